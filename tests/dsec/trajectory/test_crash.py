"""kill -9 at every crash point of the log, over and over, around real commands that count how often they ran.

The program below is what an Edge does with the log: begin, run, end, answer. Commands are processes of their own that
go on when it is killed, and write down how they ended, as the agent in a sandbox does. Each run is forked, killed at a
crash point, and run again until it finishes; then every counter file must say one, and every answer that was ever given
must still be the answer.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import Fenced, OutcomeUnknown
from dsec.trajectory import NOT_STARTED, Live, TrajectoryLog, failpoint
from dsec.types import Spec

STEPS = 5
LONG = 2  # the step whose output becomes a blob
SPEC = Spec(memory=64)

POINTS = {
    "log.epoch": 1,
    "log.before_begin": STEPS,
    "segment.torn": 2 * STEPS,
    "segment.written": 2 * STEPS,
    "segment.durable": 2 * STEPS,
    "log.begun": STEPS,
    "box.before_send": STEPS,
    "box.running": STEPS,
    "box.exited": STEPS,
    "log.before_end": STEPS,
    "blob.torn": 1,
    "blob.stored": 1,
    "log.before_reply": STEPS,
    "log.journal": 1,
    "box.half_snapshot": 2,
    "box.snapshot": 2,
    "segment.roll": 5,
    "segment.rolled": 5,
}
"""Crash points, each with how often a run passes it. `box.*` are this program's own."""


def command(step: int) -> str:
    """Counts, then leaves an exit record that is there whole or not at all; its output differs each time it runs."""
    fill = "; head -c 70000 /dev/zero | tr '\\0' z" if step == LONG else ""
    return (
        f"printf x >> box/count-{step}; (echo $$-$(date +%s%N){fill}) > exit-{step}.new; mv exit-{step}.new exit-{step}"
    )


async def program(log_folder: Path, place: Path, policy: Any, exact: bool) -> None:
    log = TrajectoryLog(log_folder, segment_size=1500)
    t = await log.open("t", SPEC)

    async def journal(step: int) -> Any:
        if not (place / f"sent-{step}").exists():
            return NOT_STARTED
        for _ in range(1000):
            if (place / f"exit-{step}").exists():
                return {"stdout": (place / f"exit-{step}").read_text()}
            await asyncio.sleep(0.005)
        raise AssertionError("a command was sent and never ended")

    t.attach("alive", journal=journal if exact else None)
    for step in range(STEPS):
        if t.snapshot_due(every_steps=2, on_unknown=policy):
            name = f"snapshot-{t.steps}"
            shutil.rmtree(place / name, ignore_errors=True)
            (place / name).mkdir()
            failpoint.crash("box.half_snapshot")
            shutil.copytree(place / "box", place / name, dirs_exist_ok=True)
            failpoint.crash("box.snapshot")
            await t.snapshot(name)
        ticket = await t.begin("run", {"command": command(step)}, on_unknown=policy)
        if isinstance(ticket, Live):
            if ticket.restore:
                shutil.rmtree(place / "box")
                shutil.copytree(place / ticket.restore, place / "box")
            failpoint.crash("box.before_send")
            (place / f"exit-{step}").unlink(missing_ok=True)
            child = subprocess.Popen(["sh", "-c", command(step)], cwd=place, start_new_session=True)
            (place / f"sent-{step}").touch()
            failpoint.crash("box.running")
            child.wait()
            failpoint.crash("box.exited")
            result = await t.end(ticket, {"stdout": (place / f"exit-{step}").read_text(), "attempt": ticket.attempt})
        else:
            result = ticket.result
        with open(place / "answers", "a") as file:
            file.write(f"{step} {result['stdout'].splitlines()[0]} {len(result['stdout'])}\n")
    log.close()


def attempt(setting: str, *arguments: Any) -> int:
    """Runs the program in a child with a crash point armed; -9: killed, 0: finished, 3: an outcome was unknown."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        failpoint.arm(setting)
        asyncio.run(program(*arguments))
        code = 0
    except OutcomeUnknown:
        code = 3
    except BaseException as problem:
        print("child:", repr(problem), file=sys.stderr)
    os._exit(code)


def counts(place: Path) -> list[int]:
    return [len(path.read_text()) if (path := place / "box" / f"count-{step}").exists() else 0 for step in range(STEPS)]


def check_answers(place: Path) -> None:
    answers = [line.split(" ", 1) for line in (place / "answers").read_text().splitlines()]
    assert len({step for step, _ in answers}) == STEPS
    assert len({(step, answer) for step, answer in answers}) == STEPS, f"an acknowledged answer changed: {answers}"


def fresh(folder: Path) -> Path:
    (folder / "box").mkdir(parents=True)
    return folder


def life(folder: Path, rng: random.Random, settings: list[str], tally: Counter[str]) -> None:
    """One task, killed at each of `settings` in turn and resumed until done; the journal makes every count exact."""
    place = fresh(folder)
    for setting in [*settings, ""]:
        code = attempt(setting, folder / "log", place, "fail", True)
        assert code in (0, -9), (setting, code)
        if code == 0:
            break
        tally[setting.partition(":")[0]] += 1
    assert code == 0
    assert counts(place) == [1] * STEPS, (settings, counts(place))
    check_answers(place)
    shutil.rmtree(folder)


def random_settings(rng: random.Random, number: int) -> list[str]:
    return [f"{name}:{rng.randint(1, POINTS[name])}" for name in rng.choices(list(POINTS), k=number)]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_point(tmp_path: Path, point: str) -> None:
    rng, tally = random.Random(point), Counter[str]()
    settings = [f"{point}:{nth}" for nth in {1, (POINTS[point] + 1) // 2}]
    if point == "log.journal":  # a journal is asked only after another crash
        settings = ["box.exited:2", "log.journal:1"]
    life(tmp_path / "life", rng, settings, tally)
    assert tally[point] >= 1, f"nothing ever reached {point}"


def test_a_program_that_is_never_killed(tmp_path: Path) -> None:
    life(tmp_path / "life", random.Random(0), [], Counter())


@pytest.mark.slow
def test_a_thousand_kills(tmp_path: Path) -> None:
    rng, tally = random.Random(20261122), Counter[str]()
    started, lives = time.monotonic(), 0
    while sum(tally.values()) < 1000:
        life(tmp_path / str(lives), rng, random_settings(rng, 12), tally)
        lives += 1
    print(f"{sum(tally.values())} kills in {lives} lives, {time.monotonic() - started:.0f} s: {dict(tally)}")
    assert set(POINTS) == set(tally), f"never killed at {set(POINTS) - set(tally)}"


@pytest.mark.parametrize("policy", ["fail", "retry", "restore_then_retry"])
def test_without_a_journal_the_policy_decides(tmp_path: Path, policy: str) -> None:
    """The sandbox's agent knows nothing. fail: said, never twice. retry: at most twice. Rolled back: exactly once."""
    rng = random.Random(policy)
    unknown = 0
    for life in range(4):
        place, crashes = fresh(tmp_path / str(life)), 0
        setting, now = f"{rng.choice(('box.running', 'box.exited', 'log.before_end'))}:{rng.randint(1, STEPS)}", policy
        while (code := attempt(setting, place / "log", place, now, False)) != 0:
            setting = ""
            if code == 3:
                assert policy == "fail" and crashes == 1
                time.sleep(0.05)  # let the orphan finish
                assert max(counts(place)) == 1, counts(place)
                unknown, now = unknown + 1, "retry"  # the caller has been told, and decides
            else:
                assert code == -9
                crashes += 1
        assert crashes == 1
        check_answers(place)
        expected = [1] * STEPS if policy == "restore_then_retry" else None
        assert counts(place) == expected if expected else sorted(counts(place)) == [1] * (STEPS - 1) + [2]
    assert unknown == (4 if policy == "fail" else 0)


def test_a_paused_writer_wakes_up_fenced(tmp_path: Path) -> None:
    """A stops (SIGSTOP) with a BEGIN on the disk; B takes over; A goes on, is told so, and does not run the command."""
    for point in ("log.before_begin", "segment.written:3", "segment.durable:3"):
        folder = tmp_path / point.replace(":", "-")
        (folder / "log").mkdir(parents=True)

        async def old(folder: Path = folder, point: str = point) -> None:
            log = TrajectoryLog(folder / "log", "a")
            t = await log.open("t", SPEC)
            try:
                for step in range(3):
                    ticket = await t.begin("run", {"step": step})
                    assert isinstance(ticket, Live)
                    (folder / f"ran-{step}").touch()
                    await t.end(ticket, {})
                    failpoint.arm(f"{point.partition(':')[0]}:1:STOP")
            except Fenced:
                (folder / "fenced").touch()

        if not (child := os.fork()):
            asyncio.run(old())
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)

        async def new(folder: Path = folder) -> int:
            log = TrajectoryLog(folder / "log", "b")
            t = await log.open("t", SPEC)
            log.close()
            return t.steps

        steps = asyncio.run(new())
        os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ran = sorted(path.name for path in folder.glob("ran-*"))
        assert (folder / "fenced").exists()
        assert steps in (len(ran), len(ran) + 1), (point, steps, ran)
        assert ran == ["ran-0"]
