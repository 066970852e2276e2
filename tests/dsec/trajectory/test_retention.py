"""Deleting trajectories and giving their room back: what is kept replays as before, whatever is killed when."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import InvalidRequest, NotFound
from dsec.trajectory import Live, Replay, TrajectoryLog, failpoint, retention
from dsec.trajectory.log import LogReader
from dsec.trajectory.retention import compact, delete, expire
from dsec.trajectory.segment import segments
from dsec.trajectory.show import verify
from dsec.types import Spec

SPEC = Spec(memory=64)
STEPS, LONG = 4, 2  # the step whose output becomes a blob
OLD = 12
"""Trajectories, each with a branch; every third is kept."""


def answer(name: str, step: int) -> str:
    return f"{name} {step} " + "z" * (70_000 if step == LONG else 300)


async def play(log: TrajectoryLog, name: str, steps: int = STEPS) -> int:
    """The program `name` from its first line -> how many of its steps were replayed."""
    t, replayed = await log.open(name, SPEC), 0
    t.attach("alive")
    for step in range(steps):
        ticket = await t.begin("run", {"command": f"{name} {step}"})
        if isinstance(ticket, Live):
            await t.end(ticket, {"stdout": answer(name, step)})
        else:
            assert ticket.result == {"stdout": answer(name, step)}
            replayed += 1
    if steps == STEPS and not t.children:
        (await t.fork(2)).release()
    t.release()
    return replayed


def fill(folder: Path, count: int = OLD) -> None:
    async def body() -> None:
        log = TrajectoryLog(folder, segment_size=4000)
        for number in range(count):
            await play(log, f"t{number}")
        log.close()

    asyncio.run(body())


def opened(folder: Path, body: Any) -> Any:
    async def run() -> Any:
        log = TrajectoryLog(folder, segment_size=4000)
        try:
            return await body(log)
        finally:
            log.close()

    return asyncio.run(run())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in segments(folder / "shards" / "local"))


def named(folder: Path) -> set[str]:
    """The trajectories of a log."""
    with contextlib.closing(LogReader(folder)) as log:
        return {name for name, branch in log.names() if branch == "main"}


def kept(number: int) -> bool:
    return number % 3 == 0


def check(folder: Path, replays: dict[str, int]) -> None:
    """The log is whole, also for an index made anew, and each program finds what it has recorded."""

    async def body(log: TrajectoryLog) -> None:
        for name, steps in replays.items():
            found = log.find(name)
            assert sum(entry.ended is not None for entry in (found.entries if found else ())) == steps, name

    for _ in range(2):
        opened(folder, body)
        _, problems = verify(folder)
        assert not problems, problems
        for index in (folder / "shards").glob("*.index*"):
            index.unlink()

    async def again(log: TrajectoryLog) -> None:
        for name, steps in replays.items():
            assert await play(log, name) == min(steps, STEPS), name

    opened(folder, again)


def test_a_deleted_trajectory_starts_anew_and_the_others_do_not(tmp_path: Path) -> None:
    fill(tmp_path, 3)

    async def body(log: TrajectoryLog) -> None:
        assert await delete(log, "t1") == ["main", "main.1"]
        with pytest.raises(NotFound):
            await delete(log, "t1")
        assert log.find("t1") is None and log.find("t1", "main.1") is None

    opened(tmp_path, body)
    assert named(tmp_path) == {"t0", "t2"}
    check(tmp_path, {"t0": STEPS, "t1": 0, "t2": STEPS})
    check(tmp_path, {"t0": STEPS, "t1": STEPS, "t2": STEPS})


def test_one_that_is_open_is_neither_deleted_nor_moved(tmp_path: Path) -> None:
    fill(tmp_path, 6)

    async def body(log: TrajectoryLog) -> None:
        t = await log.open("t0", SPEC)
        with pytest.raises(InvalidRequest, match="open"):
            await delete(log, "t0")
        for number in range(1, 6):
            await delete(log, f"t{number}")
        for step in range(STEPS):
            assert isinstance(await t.begin("run", {"command": f"t0 {step}"}), Replay)
        t.attach("alive")
        log.writer.sync = lambda fd: time.sleep(0.05)
        ticket = await t.begin("run", {"command": "more"}, idempotent=True)  # its BEGIN is still on its way
        assert isinstance(ticket, Live)
        assert (await compact(log, share=10.0, age=0.0)).segments == 0, "the oldest segment is its own"
        await t.end(ticket, {})
        t.release()
        found = log.find("t0")
        assert found and len(found.entries) == STEPS + 1
        assert (await compact(log, share=10.0, age=0.0)).segments > 0

    opened(tmp_path, body)
    check(tmp_path, {"t0": STEPS + 1, "t1": 0})


def test_commands_go_on_while_it_looks_and_what_they_record_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that is opened, used and let go at any moment of a compaction has records that its copy has not."""
    monkeypatch.setattr(retention, "SLICE", -1.0)  # the loop is free after every record
    fill(tmp_path, 3)
    rounds, broken_off = 30, 0

    async def body(log: TrajectoryLog) -> None:
        nonlocal broken_off
        for number in range(rounds):
            compaction = asyncio.create_task(compact(log, share=10.0, age=0.0))
            for _ in range(number * 4):
                await asyncio.sleep(0)
            broken_off += not compaction.done()
            assert await play(log, "t1", STEPS + 1 + number) == STEPS + number
            await compaction

    opened(tmp_path, body)
    assert broken_off > rounds / 2, "the loop was free while it looked"
    check(tmp_path, {"t0": STEPS, "t1": STEPS + rounds, "t2": STEPS})


def test_room_comes_back_and_what_is_kept_replays(tmp_path: Path) -> None:
    fill(tmp_path)
    before, blobs = size(tmp_path), len(list((tmp_path / "blobs").glob("*/*")))

    async def body(log: TrajectoryLog) -> Any:
        for number in range(OLD):
            if not kept(number):
                await delete(log, f"t{number}")
        assert (await compact(log, age=1000.0)).bytes < before, "blobs that were stored just now are left alone"
        assert len(list((tmp_path / "blobs").glob("*/*"))) == blobs
        again = await compact(log, share=10.0, age=0.0)
        for number in range(OLD):
            assert (log.find(f"t{number}") is not None) == kept(number)
        return again

    freed = opened(tmp_path, body)
    assert freed.moved and size(tmp_path) < before * 2 / 3, (freed, before, size(tmp_path))
    assert len(list((tmp_path / "blobs").glob("*/*"))) == sum(map(kept, range(OLD)))
    check(tmp_path, {f"t{number}": STEPS * kept(number) for number in range(OLD)})
    opened(tmp_path, lambda log: compact(log, share=10.0))  # what was moved is moved again
    check(tmp_path, {f"t{number}": STEPS for number in range(OLD)})


def test_what_is_old_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 3)

    async def body(log: TrajectoryLog) -> list[str]:
        now = time.time()
        assert await expire(log, 60.0) == []
        monkeypatch.setattr(time, "time", lambda: now + 100)
        await play(log, "t1", STEPS + 1)
        return await expire(log, 60.0)

    assert opened(tmp_path, body) == ["t0", "t2"]


def test_another_edge_on_the_folder_sees_both(tmp_path: Path) -> None:
    fill(tmp_path, 6)

    async def body() -> None:
        one = TrajectoryLog(tmp_path, segment_size=4000)
        other = TrajectoryLog(tmp_path, "other", segment_size=4000)
        assert other.find("t1") and other.find("t5")
        for number in range(5):
            await delete(one, f"t{number}")
        assert (await compact(one, share=10.0, age=0.0)).segments > 0
        assert other.find("t1") is None
        assert await play(other, "t5") == STEPS and await play(other, "t1") == 0
        await delete(one, "t5")
        await delete(one, "t1")
        assert one.find("t5") is None and other.find("t1") is None, "a DELETE counts in every shard"
        for number in range(6, 12):
            await play(one, f"t{number}")
        for number in range(6, 12):
            await delete(one, f"t{number}")
        await compact(one, share=10.0, age=0.0)
        one.close()
        other.close()

    asyncio.run(body())
    for index in (tmp_path / "shards").glob("*.index*"):
        index.unlink()
    assert not named(tmp_path), "it stays as long as the other shard has what it deletes"
    assert not verify(tmp_path)[1]


POINTS = [
    *("log.deleting:1", "log.deleting:4", "log.deleted:1", "log.deleted:3", "log.moved:1", "log.moved:2"),
    *("log.unlinked:1", "log.unlinked:2", "blob.gone:1", "blob.gone:3"),
    *(f"segment.{name}:{nth}" for name in ("torn", "written", "durable") for nth in (1, 6, 16, 17, 18)),
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_point(tmp_path: Path, point: str) -> None:
    """kill -9 in a deletion or a compaction: everything kept replays, and doing it again finishes it."""
    fill(tmp_path)

    async def body(log: TrajectoryLog) -> None:
        for number in range(OLD):
            if not kept(number) and log.find(f"t{number}"):
                await delete(log, f"t{number}")
        await compact(log, share=10.0, age=0.0)

    if not (child := os.fork()):
        failpoint.arm(point)
        opened(tmp_path, body)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == -signal.SIGKILL, f"{point} was never reached"
    gone = [number for number in range(OLD) if not kept(number)]
    left = {number for number in gone if f"t{number}" in named(tmp_path)}
    check(tmp_path, {f"t{number}": STEPS for number in range(OLD) if kept(number) or number in left})
    opened(tmp_path, body)
    assert named(tmp_path) == {f"t{n}" for n in range(OLD) if kept(n)}
    check(tmp_path, {f"t{number}": STEPS * kept(number) for number in range(OLD)})
    assert not list((tmp_path / "blobs").glob("*/gone.*"))
