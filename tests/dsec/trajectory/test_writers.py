"""Several writers, full disks, damaged logs: one goes on, and nothing is acknowledged that is not on the disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_replay import SPEC, recorded, run, step

from dsec.errors import Fenced, OutcomeUnknown
from dsec.trajectory import Live, LogCorrupt, LogFull, Replay, TrajectoryLog
from dsec.trajectory.log import LogReader, quarantine

# Two at once


def test_of_two_resumes_exactly_one_wins(tmp_path: Path) -> None:
    async def body() -> None:
        await recorded(tmp_path, "a")
        log = TrajectoryLog(tmp_path)
        handles = await asyncio.gather(*(log.open("t", SPEC) for _ in range(8)))
        assert len({t.epoch for t in handles}) == 8
        ran = 0
        for t in handles:
            t.attach("alive")
            try:
                await step(t, "a")
                await step(t, "b")
                ran += 1
            except Fenced:
                pass
        assert ran == 1
        log.close()

    run(body)


def test_a_command_that_runs_on_is_waited_for_by_the_next_client(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        old = await log.open("t", SPEC)
        ticket = await old.begin("run", {"command": "long"})
        assert isinstance(ticket, Live)
        new = await log.open("t", SPEC)  # the client died and came back; the Edge lived
        waiting = asyncio.create_task(new.begin("run", {"command": "long"}))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await old.end(ticket, {"stdout": "done"})
        found = await waiting
        assert isinstance(found, Replay) and found.result == {"stdout": "done"}
        with pytest.raises(Fenced):
            await old.begin("run", {"command": "next"})
        log.close()
        log = TrajectoryLog(tmp_path)
        assert (await log.open("t", SPEC)).unfinished == []
        log.close()

    run(body)


def test_two_edges_on_one_folder(tmp_path: Path) -> None:
    """B takes over while A is stopped; A wakes, is told so before it acts, and what it wrote is ignored."""

    async def body() -> None:
        a = TrajectoryLog(tmp_path, "a")
        with pytest.raises(Fenced):
            TrajectoryLog(tmp_path, "a")
        t = await a.open("t", SPEC)
        await step(t, "one")
        late = await t.begin("run", {"command": "two"})
        assert isinstance(late, Live)
        b = TrajectoryLog(tmp_path, "b")
        u = await b.open("t", SPEC)
        u.attach("alive")
        assert u.steps == 2 and u.unfinished == [1]
        assert (await step(u, "one"))["stdout"] == "did one"
        with pytest.raises(Fenced):
            await t.end(late, {"stdout": "too late"})
        with pytest.raises(Fenced):
            await t.begin("run", {"command": "three"})
        with pytest.raises(OutcomeUnknown):
            await u.begin("run", {"command": "two"})
        ticket = await u.begin("run", {"command": "two"}, on_unknown="retry")
        assert isinstance(ticket, Live)
        await u.end(ticket, {"stdout": "by b"})
        a.close()
        b.close()
        for shard in ("a", "b", "c"):  # whoever reads finds the same
            log = TrajectoryLog(tmp_path, shard)
            t = await log.open("t", SPEC)
            assert [(await step(t, c))["stdout"] for c in ("one", "two")] == ["did one", "by b"] and t.steps == 2
            log.close()
        with contextlib.closing(LogReader(tmp_path)) as reader:
            assert reader.branch("t").ignored == 2

    run(body)


def test_a_leases_epoch_must_be_newer(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        assert (await log.open("t", SPEC, epoch=7)).epoch == 7
        for stale in (6, 7):
            with pytest.raises(Fenced):
                await log.open("t", SPEC, epoch=stale)
        assert (await log.open("t", SPEC)).epoch == 8
        log.close()
        subprocess.run(["rm", "-r", str(tmp_path / "epochs")], check=True)  # lost, the log was not
        log = TrajectoryLog(tmp_path)
        assert (await log.open("t", SPEC)).epoch == 9
        log.close()

    run(body)


def test_steps_that_overlap_keep_their_order(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        tickets = await asyncio.gather(*(t.begin("run", {"command": str(i)}) for i in range(20)))
        assert [ticket.step for ticket in tickets] == list(range(20))
        await asyncio.gather(*(t.end(ticket, {"n": ticket.step}) for ticket in reversed(tickets)))  # type: ignore[arg-type]
        log.close()
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        found = await asyncio.gather(*(t.begin("run", {"command": str(i)}) for i in range(20)))
        assert [ticket.result for ticket in found] == [{"n": i} for i in range(20)]  # type: ignore[union-attr]
        log.close()

    run(body)


def test_two_questions_at_once_while_the_first_still_runs(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        old = await log.open("t", SPEC)
        tickets = await asyncio.gather(*(old.begin("run", {"command": c}) for c in "ab"))
        new = await log.open("t", SPEC)
        waiting = [asyncio.create_task(new.begin("run", {"command": c})) for c in "ab"]
        await asyncio.sleep(0.01)
        for ticket in reversed(tickets):
            await old.end(ticket, {"n": ticket.step})  # type: ignore[arg-type]
        found = await asyncio.gather(*waiting)
        assert [ticket.result for ticket in found] == [{"n": 0}, {"n": 1}]  # type: ignore[union-attr]
        assert new.cursor == 2
        log.close()

    run(body)


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_no_room_means_no_acknowledgement(small_disk: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(small_disk / "log")
        t = await log.open("t", SPEC)
        ticket = await t.begin("run", {"command": "a"})
        assert isinstance(ticket, Live)
        for size in (60_000, 300_000):  # in the record, and as a blob
            with pytest.raises(LogFull):
                for _ in range(8):
                    ticket = await t.begin("run", {"command": "a"}) if t.cursor != ticket.step + 1 else ticket
                    await t.end(ticket, {"data": bytes(size)})  # type: ignore[arg-type]
                    ticket = await t.begin("run", {"command": "a"})
        assert not list((small_disk / "log" / "blobs").rglob("new.*"))
        await t.end(ticket, {"stdout": "short enough"})  # type: ignore[arg-type]
        log.close()
        with pytest.raises(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        with pytest.raises(LogFull):  # whatever meets it first: the index, or the OPEN
            log = TrajectoryLog(small_disk / "log")
            await log.open("t", SPEC)
        log.close()
        subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
        log = TrajectoryLog(small_disk / "log")
        t = await log.open("t", SPEC)
        assert t.unfinished == []
        log.close()

    run(body)


def test_a_full_disk_at_begin_leaves_the_program_where_it_was(small_disk: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(small_disk / "log")
        t = await log.open("t", SPEC)
        ballast = small_disk / "ballast"
        with pytest.raises(OSError), open(ballast, "wb") as file:
            file.write(bytes(1 << 20))
        with pytest.raises(LogFull):
            for i in range(1000):
                await step(t, f"{i}" + "x" * 500)
        at = t.cursor
        ballast.unlink()
        await step(t, "again")
        assert t.cursor == at + 1
        log.close()
        log = TrajectoryLog(small_disk / "log")
        assert (await log.open("t", SPEC)).steps == at + 1
        log.close()

    run(body)


def test_the_index_is_made_anew_from_the_segments(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path, segment_size=2000)
        for i in range(30):
            await step(await log.open(f"t{i}", SPEC), "a")
        log.close()
        for damage in (Path.unlink, lambda path: path.write_bytes(b"no database" * 1000)):
            for path in (tmp_path / "shards").glob("local.index*"):
                damage(path)
            log = TrajectoryLog(tmp_path, segment_size=2000)
            for i in range(30):
                assert (await log.open(f"t{i}", SPEC)).steps == 1
            log.close()
        with contextlib.closing(LogReader(tmp_path)) as reader:
            assert json.loads(json.dumps(reader.names()[0])) == ["t0", "main"]

    run(body)


def test_a_damaged_log_is_put_aside_and_its_trajectories_stay_closed(tmp_path: Path) -> None:
    async def body() -> None:
        await recorded(tmp_path, "a", "b")
        path = next((tmp_path / "shards" / "local").glob("*.seg"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(LogCorrupt):
            TrajectoryLog(tmp_path)
        kept = quarantine(tmp_path, "local")
        assert (kept / path.name).read_bytes() == data
        log = TrajectoryLog(tmp_path)
        with pytest.raises(LogCorrupt, match="may be in it"):
            await log.open("t", SPEC)  # to start it anew would run its commands again
        await step(await log.open("new", SPEC), "a")
        with pytest.raises(Fenced):
            quarantine(tmp_path, "local")
        log.close()
        log = TrajectoryLog(tmp_path)
        assert (await log.open("new", SPEC)).steps == 1
        log.close()

    run(body)


def test_a_step_whose_sandbox_is_gone_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        for lose in (True, False):
            t = await log.open(f"t{lose}", SPEC)
            ticket = await t.begin("run", {"command": "a"})
            assert isinstance(ticket, Live)
            again = await log.open(f"t{lose}", SPEC)
            again.attach("alive")
            waiting = asyncio.create_task(again.begin("run", {"command": "a"}))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            if lose:
                t.lose(ticket)
            else:
                t.release()
            with pytest.raises(OutcomeUnknown if lose else Fenced):
                await waiting
            third = await log.open(f"t{lose}", SPEC)
            third.attach("alive")
            with pytest.raises(OutcomeUnknown):
                await third.begin("run", {"command": "a"})
        log.close()

    run(body)


@pytest.mark.parametrize("durability", ["begin+end", "end", "async"])
def test_what_is_awaited_before_the_answer(tmp_path: Path, durability: Any) -> None:
    """With a disk that hangs: BEGIN of what is not idempotent, and END, hold back the answer; nothing else does."""
    gate = threading.Event()
    gate.set()

    async def held(work: Awaitable[Any]) -> tuple[bool, Any]:
        """Whether it waits for the disk, and its result once the disk goes on."""
        gate.clear()
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait([task], timeout=0.1)
        gate.set()
        return not done, await task

    async def body() -> None:
        log = TrajectoryLog(tmp_path, durability=durability, sync=lambda fd: (gate.wait(60), None)[1])
        t = await log.open("t", SPEC)
        waited, ticket = await held(t.begin("run", {"command": "a"}))
        assert waited == (durability == "begin+end")
        waited, _ = await held(t.end(ticket, {}))
        assert waited == (durability != "async")
        waited, ticket = await held(t.begin("read", {"path": "b"}, idempotent=True))
        assert not waited
        waited, _ = await held(t.end(ticket, {}))
        assert waited == (durability != "async")
        log.close()

    run(body)
