"""Deleting trajectories, and giving their room back.

A log is append-only, so a trajectory is deleted by a record: DELETE ends all epochs up to its own. `compact` then frees
segments from the oldest on. A segment of which nothing is wanted is unlinked; where a little is, the whole history of
each such branch is first written again, as one MOVED frame at the end of the log (one frame: there in whole or not at
all), and what it holds a copy of is ignored from then on. Segments are never changed; none is taken from the middle.

All of it happens on the loop on which commands run too, in slices between which the loop is theirs for as long. What
was decided in an earlier slice holds only if nothing was written in that branch since.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dsec.errors import InvalidRequest, NotFound
from dsec.trajectory.failpoint import crash
from dsec.trajectory.index import MOVED
from dsec.trajectory.key import stream_of
from dsec.trajectory.log import KINDS, Branch, names, records, undeleted
from dsec.trajectory.segment import pack, segments, sync_folder, unpack

if TYPE_CHECKING:
    from dsec.trajectory.log import TrajectoryLog

SHARE = 0.5
"""A segment is freed while moving what is wanted of it costs at most this part of its size."""
AGE = 3600.0
"""Seconds since a blob was last stored before it may be swept: its record may still be on its way."""


SLICE = 0.002
"""Seconds for which the loop is held at a time; the rows of one branch are read in one go."""
T = TypeVar("T")


async def gently(items: Iterable[T]) -> AsyncIterator[T]:
    """The items, at most half of the loop's time and no more than about `SLICE` of it at once."""
    began = time.monotonic()
    for item in items:
        yield item
        if (took := time.monotonic() - began) > SLICE:
            await asyncio.sleep(took)
            began = time.monotonic()


class Freed(NamedTuple):
    """What `compact` did."""

    segments: int
    bytes: int
    moved: int
    """Branches that were written again."""


async def delete(log: TrajectoryLog, trajectory: str) -> list[str]:
    """Deletes a trajectory with all its branches -> their names. It may be started anew, from nothing.

    NotFound if there is none, InvalidRequest while a sandbox is at work in it.
    """
    log.index.catch_up(log.writer.durable)
    found = [branch for name, branch in names(log) if name == trajectory]
    if not found:
        raise NotFound(f"the log has no trajectory {trajectory!r}")
    if any(branch.trajectory == trajectory for branch in log.branches.values()):
        raise InvalidRequest(f"{trajectory!r} is open; kill its sandbox first")
    for name in sorted(found, reverse=True):  # children before what they were forked from
        branch = Branch(trajectory, name)
        branch.epoch = log.take_epoch(branch.stream, None, log.index.newest(branch.stream))
        crash("log.deleting")
        await log.append(branch, "DELETE", time=time.time())
        crash("log.deleted")
    log.index.catch_up(log.writer.durable)
    return sorted(found)


async def expire(log: TrajectoryLog, seconds: float) -> list[str]:
    """Deletes trajectories in which nothing was done for so long -> their names."""
    log.index.catch_up(log.writer.durable)
    last: dict[str, float] = {}
    frames: dict[str, dict[int, int]] = {}
    async with log.tending:
        async for trajectory, branch in gently(names(log)):
            stream = stream_of(trajectory, branch)
            frames.setdefault(trajectory, {})[stream] = len(log.index.frames(stream))
            kept, _ = records(log, trajectory, branch)
            times = (log.read(place)[0].get("time", 0.0) for *_, place in reversed(kept))
            last[trajectory] = max(last.get(trajectory, 0.0), next(filter(None, times), 0.0))
    opened = {branch.trajectory for branch in log.branches.values()}
    old = [name for name, when in last.items() if when < time.time() - seconds and name not in opened]
    return [name for name in old if untouched(log, frames[name]) and await delete(log, name)]


def untouched(log: TrajectoryLog, frames: dict[int, int]) -> bool:
    """True if branches have as many frames in the log as they had, by stream."""
    log.index.catch_up(log.writer.durable)
    return all(len(log.index.frames(stream)) == count for stream, count in frames.items())


async def compact(log: TrajectoryLog, share: float = SHARE, age: float = AGE) -> Freed:
    """Frees the oldest segments of this process's own shard, as far as that is worth it, then unreferenced blobs."""
    async with log.tending:
        try:
            return await _compact(log, share, age)
        finally:
            log.written = None


async def _compact(log: TrajectoryLog, share: float, age: float) -> Freed:
    freed, own = [0, 0, 0], log.writer.folder
    log.index.catch_up(log.writer.durable)
    for path in segments(own):
        if log.writer.durable is None or str(path) == log.writer.durable.path:
            break  # it is being written
        size = path.stat().st_size
        log.written = set()
        await log.writer.settled()  # what was queued before is in the index; what comes now is in `written`
        log.index.catch_up(log.writer.durable)
        wanted = await _wanted(log, path, share * size)
        log.index.catch_up(log.writer.durable)
        if wanted is None or any(_changed(log, each) for each in wanted):
            break
        # all at once, so that whoever opens one of them from now on writes behind its copy
        await asyncio.gather(*(log.append(each.branch, "MOVED", each.frames) for each in wanted))
        crash("log.moved")
        log.index.catch_up(log.writer.durable)
        moved = {each.branch.trajectory for each in wanted}
        if moved & {branch.trajectory for branch in log.branches.values()}:
            break  # opened meanwhile: it may have read where its records lay
        log.forget(str(path))
        path.unlink()
        crash("log.unlinked")
        sync_folder(own)
        log.index.catch_up(log.writer.durable)
        freed = [freed[0] + 1, freed[1] + size, freed[2] + len(wanted)]
    freed[1] += await asyncio.to_thread(log.blobs.sweep, await _blobs(log), age)
    return Freed(*freed)


class Copy(NamedTuple):
    """A branch that needs a segment."""

    branch: Branch
    frames: bytes
    """All that it has, in order."""
    rows: int
    """Its frames in the index when they were read, deleted ones included."""


async def _wanted(log: TrajectoryLog, path: Path, most: float) -> list[Copy] | None:
    """What a segment is needed for, if that can be moved now and is at most so many bytes. Not now: a branch that is
    open here, or has records in the shard of another Edge (whose place in time is told by positions in ours)."""
    found, total = list[Copy](), 0
    async for stream, _ in gently(log.index.within(log.shard, path.name)):
        every = log.index.frames(stream)
        kept = undeleted(every)
        rows = [row for row in kept if row[1].path == str(path)]
        ends = [epoch for _, place, epoch, mark in every if KINDS[mark & 15] == "DELETE" and place.path == str(path)]
        if ends and any(epoch <= max(ends) and place.path != str(path) for _, place, epoch, _ in every):
            return None  # what this DELETE deletes is still somewhere else
        if not rows:
            continue
        first = log.read(rows[0][1])[0]
        branch = Branch(first["trajectory"], first["branch"])
        total += sum(place.length for _, place, *_ in kept)
        if total > most or _changed(log, Copy(branch, b"", len(every))):
            return None
        frames = []
        async for _, place, epoch, mark in gently(kept):
            branch.epoch = max(branch.epoch, epoch)
            fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                frame = unpack(os.pread(fd, place.length, place.offset))
            finally:
                os.close(fd)
            assert mark & 15 != MOVED
            frames.append(pack(stream, epoch, mark, frame.header, frame.payload, 0))
        found.append(Copy(branch, b"".join(frames), len(every)))
    return found


def _changed(log: TrajectoryLog, copy: Copy) -> bool:
    """True if there is, or may be on its way, a record of the branch that was not copied."""
    stream = copy.branch.stream
    assert log.written is not None
    if stream in log.written or any(copy.branch.trajectory == branch.trajectory for branch in log.branches.values()):
        return True
    return len(log.index.frames(stream)) != copy.rows or log.index.shards_of(stream) != {log.shard}


async def _blobs(log: TrajectoryLog) -> set[str]:
    """Digests that any record of any shard names."""
    found: set[str] = set()
    async for trajectory, branch in gently(names(log)):
        async for kind, _, _, place in gently(records(log, trajectory, branch)[0]):
            if kind == "END":
                found |= {blob for *_, blob in log.read(place)[0]["parts"] if blob}
    return found


def sweep_snapshots(log: TrajectoryLog, folder: Path) -> int:
    """Drops the Edge's own snapshots of trajectories that the log does not have any more -> how many."""
    log.index.catch_up(log.writer.durable)
    gone = [path for path in folder.glob("auto-*") if not undeleted(log.index.frames(int(path.name.split("-")[1], 16)))]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return len(gone)
