"""A log that stays within bounds by itself: what an Edge does every so often, without anybody's command.

    DSEC_LOG_EVERY=3600   seconds between two looks; 0: never
    DSEC_LOG_KEEP=0       seconds after which a trajectory in which nothing was done is deleted; 0: never
    DSEC_LOG_MIB=0        what the log may take: beyond it those longest untouched are deleted; 0: no bound

Each look also compacts, which deletes nothing that anybody could ask for. Never deleted: what is open here, what
another Edge has written in (its lease would be broken) and, for the sake of the bound alone, what was touched within
`REST`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dsec.errors import InvalidRequest, NotFound
from dsec.trajectory import key as keys
from dsec.trajectory.log import names, records
from dsec.trajectory.retention import Freed, compact, delete, gently, untouched

if TYPE_CHECKING:
    from dsec.trajectory.log import TrajectoryLog

REST = 3600.0
"""Seconds for which a trainer may be away without losing its trajectory to the bound."""


@dataclass(frozen=True)
class Bounds:
    """See the module."""

    every: float = 3600.0
    keep: float = 0.0
    mib: float = 0.0

    @classmethod
    def from_environment(cls) -> Bounds:
        """Raises InvalidRequest for what is no number, or a negative one."""
        found = {}
        for name in ("every", "keep", "mib"):
            text = os.environ.get(f"DSEC_LOG_{name.upper()}", "")
            try:
                value = float(text or getattr(cls, name))
            except ValueError:
                value = -1.0
            if not value >= 0:
                raise InvalidRequest(f"DSEC_LOG_{name.upper()} is a number, 0 or more, not {text!r}")
            found[name] = value
        return cls(**found)


class Closed(NamedTuple):
    """A trajectory that may be deleted: nobody is at work in it, and all of it is this Edge's."""

    last: float
    """When something was last done in it."""
    name: str
    bytes: int
    """Its frames and the blobs that only it names."""
    frames: dict[int, int]
    """How many each of its branches had."""


async def tend(log: TrajectoryLog, bounds: Bounds, rest: float = REST) -> tuple[list[str], Freed]:
    """One look -> the trajectories that were deleted, and what compaction freed."""
    log.index.catch_up(log.writer.durable)
    now = time.time()
    doomed: list[Closed] = []
    if bounds.keep or bounds.mib:
        async with log.tending:
            every = await closed(log)
        doomed = [each for each in every if bounds.keep and each.last < now - bounds.keep]
        excess = size(log.folder) - bounds.mib * (1 << 20) - sum(each.bytes for each in doomed)
        for each in every[len(doomed) :] if bounds.mib else []:
            if excess <= 0 or each.last > now - rest:
                break
            doomed.append(each)
            excess -= each.bytes
    deleted = []
    for each in doomed:
        if not untouched(log, each.frames):
            continue  # since it was looked at
        try:
            await delete(log, each.name)
        except (InvalidRequest, NotFound):  # opened, or deleted, meanwhile
            continue
        deleted.append(each.name)
    return deleted, await compact(log)


async def closed(log: TrajectoryLog) -> list[Closed]:
    """What may be deleted, the longest untouched first."""
    opened = {branch.trajectory for branch in log.branches.values()}
    last: dict[str, float] = {}
    weight: dict[str, int] = {}
    foreign: set[str] = set()
    blobs: dict[str, set[str]] = {}
    frames: dict[str, dict[int, int]] = {}
    async for trajectory, branch in gently(names(log)):
        stream = keys.stream_of(trajectory, branch)
        if log.index.shards_of(stream) != {log.shard}:
            foreign.add(trajectory)
        rows = log.index.frames(stream)
        frames.setdefault(trajectory, {})[stream] = len(rows)
        weight[trajectory] = weight.get(trajectory, 0) + sum(place.length for _, place, *_ in rows)
        async for kind, _, _, place in gently(records(log, trajectory, branch)[0]):
            header = log.read(place)[0]
            last[trajectory] = max(last.get(trajectory, 0.0), header.get("time", 0.0))
            if kind == "END":
                for *_, blob in header["parts"]:
                    if blob:
                        blobs.setdefault(blob, set()).add(trajectory)
    for blob, users in blobs.items():
        path = log.blobs.path(blob)
        if len(users) == 1 and path.exists():
            weight[next(iter(users))] += path.stat().st_size
    found = last.keys() - opened - foreign
    return sorted(Closed(last[name], name, weight[name], frames[name]) for name in found)


def size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, files in os.walk(folder) for name in files)
