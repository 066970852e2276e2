"""Fast-forward: what was done is not done again, what is unknown is said, and files are not results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import Diverged, InvalidRequest, OutcomeUnknown, StateLost
from dsec.trajectory import NOT_STARTED, Live, Replay, Trajectory, TrajectoryLog
from dsec.trajectory import key as keys
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
        later = await log.open("t", SPEC, image_digest="sha256:0")
        assert isinstance(await later.begin("run", {"command": "a"}), Replay), "recorded when nobody knew the digest"
        await step(await log.open("u", SPEC, image_digest="sha256:0"), "a")
        other = await log.open("u", SPEC, image_digest="sha256:1")
        with pytest.raises(Diverged, match="image was 'sha256:0', is 'sha256:1'"):
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


@pytest.mark.parametrize("odd", ["plain", 'quo"ted\\', "\u00e9\u2028\x00\n\ud800", ""])
def test_a_key_is_that_of_one_canonical_list(odd: str) -> None:
    """However it is put together: logs that are there were written so."""
    args = {"z": [1, 2.5, None, True], "command": odd, "env": {odd: odd}}
    whole = keys.encode([keys.SCHEMA, odd, odd + "b", 7, odd, args, "s" * 64, odd, keys.ROOT])
    assert keys.operation_key(odd, odd + "b", 7, odd, args, "s" * 64, odd, keys.ROOT) == keys.digest(whole)
    assert keys.canonical(args, b"x")["z"] == args["z"]


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
