"""Fast-forward: what was done is not done again, what is unknown is said, and files are not results."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import Diverged, Fenced, InvalidRequest, OutcomeUnknown, StateLost
from dsec.trajectory import NOT_STARTED, Live, LogCorrupt, LogFull, Replay, Trajectory, TrajectoryLog
from dsec.trajectory.log import LogReader, quarantine
from dsec.types import Spec

SPEC = Spec(memory=64, env={"TOKEN": "sesame"})


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(body())  # type: ignore[arg-type]


async def step(t: Trajectory, command: str, **options: Any) -> dict[str, Any]:
    """One command whose result tells whether it ran now."""
    ticket = await t.begin("run", {"command": command}, **options)
    if isinstance(ticket, Replay):
        return ticket.result
    return await t.end(ticket, {"stdout": f"did {command}", "exit_code": 0, "duration": time.time()})


async def recorded(folder: Path, *commands: str, **options: Any) -> None:
    log = TrajectoryLog(folder)
    t = await log.open("t", SPEC)
    for command in commands:
        await step(t, command, **options)
    log.close()


def test_a_resume_replays_every_result_and_then_goes_live(tmp_path: Path) -> None:
    async def body() -> None:
        await recorded(tmp_path, "a", "b")
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        assert (t.steps, t.files, t.unfinished) == (2, "lost", [])
        for command in "ab":
            ticket = await t.begin("run", {"command": command})
            assert isinstance(ticket, Replay) and ticket.result["stdout"] == f"did {command}"
        with pytest.raises(StateLost) as lost:
            await t.begin("run", {"command": "c"})
        assert lost.value.step == 2
        t.attach("alive")
        assert (await step(t, "c"))["stdout"] == "did c"
        log.close()

    run(body)


def test_results_of_every_size_and_kind_come_back_equal(tmp_path: Path) -> None:
    results = [
        {"stdout": "", "exit_code": 0, "data": b"", "none": None, "list": [1, {"a": 2.5}]},
        {"stdout": "x" * 5000, "stderr": "é\0\ud800" * 999, "data": bytes(range(256))},
        {"stdout": "y" * 200_000, "data": b"\xff" * 100_000, "more": b"z" * (64 << 10)},
    ]

    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        for i, result in enumerate(results):
            ticket = await t.begin("read", {"path": str(i)})
            assert isinstance(ticket, Live)
            assert await t.end(ticket, result) == result
        log.close()
        assert len(list((tmp_path / "blobs").glob("*/*"))) == 2
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        for i, result in enumerate(results):
            ticket = await t.begin("read", {"path": str(i)})
            assert isinstance(ticket, Replay) and ticket.result == result
        log.close()

    run(body)


def test_a_different_question_is_divergence_and_names_the_field(tmp_path: Path) -> None:
    async def body() -> None:
        await recorded(tmp_path, "a", "b")
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        await step(t, "a")
        with pytest.raises(Diverged) as caught:
            await t.begin("run", {"command": "x"})
        error = caught.value
        assert (error.step, error.field, error.expected, error.got) == (1, "args.command", "b", "x")
        with pytest.raises(Diverged, match=r"kind was 'run', is 'write'"):
            await t.begin("write", {"command": "b"})
        assert (await step(t, "b"))["stdout"] == "did b"  # still at the same step
        other = await log.open("t", SPEC.but(memory=65))
        with pytest.raises(Diverged, match=r"spec\.memory was 64, is 65"):
            await other.begin("run", {"command": "a"})
        same = await log.open("t", SPEC.but(timeout=9.0, metadata={"a": "b"}))
        assert isinstance(await same.begin("run", {"command": "a"}), Replay), "how long it may live is not what it does"
        other = await log.open("t", SPEC, image_digest="sha256:0")
        with pytest.raises(Diverged, match="image"):
            await other.begin("run", {"command": "a"})
        log.close()

    run(body)


def test_one_differing_step_changes_every_later_key(tmp_path: Path) -> None:
    async def keys_of(*commands: str) -> list[str]:
        log = TrajectoryLog(tmp_path / "".join(commands))
        (tmp_path / "".join(commands) / "secret").write_bytes(bytes(32))
        log.secret = bytes(32)
        t = await log.open("t", SPEC)
        found = []
        for command in commands:
            ticket = await t.begin("run", {"command": command})
            assert isinstance(ticket, Live)
            found.append(ticket.key)
            await t.end(ticket, {})
        log.close()
        return found

    one, other = run(lambda: keys_of("a", "b", "c")), run(lambda: keys_of("a", "x", "c"))
    assert [x == y for x, y in zip(one, other)] == [True, False, False]


def test_secrets_are_not_on_the_disk(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(
            tmp_path, redact=lambda d: {k: v.replace("hunter2", "***") if k == "stdout" else v for k, v in d.items()}
        )
        t = await log.open("t", SPEC)
        ticket = await t.begin("run", {"command": "a", "env": {"KEY": "open-" + "says-me"}})
        assert isinstance(ticket, Live)
        assert (await t.end(ticket, {"stdout": "password hunter2"}))["stdout"] == "password hunter2"
        again = await log.open("t", SPEC)
        ticket = await again.begin("run", {"command": "a", "env": {"KEY": "open-says-me"}})
        assert isinstance(ticket, Replay) and ticket.result["stdout"] == "password ***"
        with pytest.raises(Diverged, match=r"env\.KEY"):
            await (await log.open("t", SPEC)).begin("run", {"command": "a", "env": {"KEY": "other"}})
        log.close()

    run(body)
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"did" not in everything and b'"run"' in everything
    for secret in (b"sesame", b"open-says-me", b"hunter2"):
        assert secret not in everything


# BEGIN without END


async def half_done(folder: Path, **options: Any) -> TrajectoryLog:
    """A log whose step 1 was begun by a process that died; opened anew."""
    log = TrajectoryLog(folder)
    t = await log.open("t", SPEC)
    await step(t, "a")
    await t.snapshot({"layer": "after a"})
    await t.begin("run", {"command": "b"}, **options)
    log.close()
    return TrajectoryLog(folder)


def test_unknown_outcomes_by_policy(tmp_path: Path) -> None:
    async def body() -> None:
        log = await half_done(tmp_path)
        t = await log.open("t", SPEC)
        t.attach("alive")
        assert t.unfinished == [1] and t.newest_snapshot and t.newest_snapshot.step == 1
        await step(t, "a")
        for _ in range(2):  # asking again does not make it known
            with pytest.raises(OutcomeUnknown) as caught:
                await t.begin("run", {"command": "b"})
            assert caught.value.step == 1
        ticket = await t.begin("run", {"command": "b"}, on_unknown="restore_then_retry")
        assert isinstance(ticket, Live) and (ticket.restore, ticket.attempt) == ({"layer": "after a"}, 2)
        log.close()
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        t.attach("alive")
        await step(t, "a")
        ticket = await t.begin("run", {"command": "b"}, on_unknown="retry")
        assert isinstance(ticket, Live) and ticket.attempt == 3 and ticket.restore is None
        await t.end(ticket, {"stdout": "third time"})
        assert isinstance(await step(t, "c"), dict)
        log.close()

    run(body)


def test_an_idempotent_step_is_simply_run_again(tmp_path: Path) -> None:
    async def body() -> None:
        log = await half_done(tmp_path, idempotent=True)
        t = await log.open("t", SPEC)
        t.attach("alive")
        await step(t, "a")
        assert isinstance(await t.begin("run", {"command": "b"}, idempotent=True), Live)
        log.close()

    run(body)


@pytest.mark.parametrize("answer", [{"stdout": "from the journal"}, NOT_STARTED, None])
def test_the_sandboxes_own_journal_decides(tmp_path: Path, answer: Any) -> None:
    async def body() -> None:
        log = await half_done(tmp_path)
        asked = []

        async def journal(step: int) -> Any:
            asked.append(step)
            return answer

        t = await log.open("t", SPEC)
        t.attach("alive", journal=journal)
        await step(t, "a")
        if answer is None:
            with pytest.raises(OutcomeUnknown):
                await t.begin("run", {"command": "b"})
        else:
            ticket = await t.begin("run", {"command": "b"})
            assert isinstance(ticket, Live if answer is NOT_STARTED else Replay)
            if isinstance(ticket, Replay):
                assert ticket.result == answer
        assert asked == [1]
        log.close()
        if isinstance(answer, dict):  # it is in the log now
            log = TrajectoryLog(tmp_path)
            t = await log.open("t", SPEC)
            await step(t, "a")
            assert await step(t, "b") == answer
            log.close()

    run(body)


def test_an_aborted_step_did_not_happen(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        ticket = await t.begin("run", {"command": "a"})
        assert isinstance(ticket, Live)
        await t.abort(ticket, "preempted before it ran")
        log.close()
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        t.attach("alive")
        assert (await step(t, "a"))["stdout"] == "did a"
        log.close()

    run(body)


def test_a_cancelled_caller_leaves_a_step_that_did_not_happen(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        task = asyncio.create_task(t.begin("run", {"command": "a"}))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        again = await log.open("t", SPEC)
        again.attach("alive")
        assert (await step(again, "a"))["stdout"] == "did a"
        log.close()

    run(body)


# Files are not results


def test_restored_files_catch_up_through_idempotent_steps_only(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        await step(t, "a")
        await t.snapshot("s1")
        await step(t, "b", idempotent=True)
        await step(t, "c")
        log.close()

        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        t.attach("behind", 1)
        await step(t, "a")
        ticket = await t.begin("run", {"command": "b"}, idempotent=True)
        assert isinstance(ticket, Live) and ticket.rerun
        assert (await t.end(ticket, {"stdout": "did b differently", "exit_code": 0}))["stdout"] == "did b"
        assert t.nondeterministic == [1]
        assert isinstance(await t.begin("run", {"command": "c"}), Replay) and t.files == "lost"
        with pytest.raises(StateLost):
            await step(t, "d")

        t = await log.open("t", SPEC)  # rebuild="reexecute": everything again, in a fresh sandbox
        t.attach("behind", 0, reexecute=True)
        for command in "abc":
            ticket = await t.begin("run", {"command": command})
            assert isinstance(ticket, Live) and ticket.rerun
            await t.end(ticket, {"stdout": f"did {command}", "exit_code": 0, "duration": 7})
        assert t.files == "alive" and t.nondeterministic == []
        await step(t, "d")
        log.close()

    run(body)


def test_the_snapshot_schedule(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        assert not t.snapshot_due(1)
        await step(t, "a")
        assert t.snapshot_due(every_steps=1) and not t.snapshot_due(every_steps=2) and not t.snapshot_due()
        assert t.snapshot_due(every_seconds=1e-9) and not t.snapshot_due(every_seconds=1e9)
        assert t.snapshot_due(on_unknown="restore_then_retry")
        ticket = await t.begin("run", {"command": "b"})
        assert isinstance(ticket, Live) and not t.snapshot_due(1)
        with pytest.raises(InvalidRequest, match="1 steps running"):
            await t.snapshot("too early")
        await t.end(ticket, {})
        assert (await t.snapshot("s")).step == 2
        assert not t.snapshot_due(1)
        log.close()

    run(body)


# Branches


def test_a_fork_shares_the_prefix_and_nothing_else(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        for command in "abc":
            await step(t, command)
        child = await t.fork(2, "other")
        assert (child.cursor, child.steps, child.files) == (2, 2, "lost")
        child.attach("alive")
        await step(child, "x")
        grandchild = await child.fork()
        assert grandchild.branch == "other.1"
        grandchild.attach("alive")
        await step(grandchild, "y")
        with pytest.raises(InvalidRequest, match="already has a branch 'other'"):
            await t.fork(2, "other")
        await step(t, "d")
        log.close()
        log = TrajectoryLog(tmp_path)
        for branch, commands in (("main", "abcd"), ("other", "abx"), ("other.1", "abxy")):
            t = await log.open("t", SPEC, branch)
            assert t.steps == len(commands)
            for command in commands:
                assert isinstance(await t.begin("run", {"command": command}), Replay)
        log.close()

    run(body)


def test_divergence_may_branch_or_truncate_when_asked(tmp_path: Path) -> None:
    async def body() -> None:
        await recorded(tmp_path, "a", "b", "c")
        log = TrajectoryLog(tmp_path)
        for _ in range(2):  # the second time it finds the branch that the first made
            t = await log.open("t", SPEC, on_divergence="branch")
            t.attach("behind", 1)
            await step(t, "a")
            assert (await step(t, "x"))["stdout"] == "did x"
            assert t.branch == "main.1"
        assert (await step(t, "y"))["stdout"] == "did y", "the branch was found with its files as they are"
        t = await log.open("t", SPEC, on_divergence="branch")
        await step(t, "a")
        with pytest.raises(StateLost):
            await step(t, "z")
        t = await log.open("t", SPEC, on_divergence="truncate")
        t.attach("behind", 1)
        await step(t, "a")
        await step(t, "q")
        assert t.steps == 2
        log.close()
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", SPEC)
        assert [(await step(t, c))["stdout"] for c in "aq"] == ["did a", "did q"] and t.steps == 2
        log.close()

    run(body)


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
        assert LogReader(tmp_path).branch("t").ignored == 2

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
        assert json.loads(json.dumps(LogReader(tmp_path).names()[0])) == ["t0", "main"]

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
        log = TrajectoryLog(tmp_path, durability=durability, sync=lambda fd: (gate.wait(10), None)[1])
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
