"""Files of a trajectory: captured on a schedule and before a preemption, complete or invisible when the Edge dies, and
a resume says which it has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec.edge.box import Box
from dsec.errors import Diverged, DsecError, InvalidRequest, OutcomeUnknown, Preempted, SandboxFailed, StateLost
from dsec.images.layers import Images
from dsec.trajectory import TrajectoryLog
from dsec.trajectory.key import identity
from dsec.types import Spec
from tests.dsec.conftest import Host, until


@pytest.fixture
def own(make_host: Callable[[str], Host]) -> Iterator[Host]:
    host = make_host("root")
    yield host
    host.stop()


def kept(host: Host) -> list[str]:
    """Complete ones: a name with a dot is a capture on its way."""
    return sorted(path.name for path in (host.home / "snapshots").iterdir() if not path.name.startswith("."))


def ask(host: Host, op: str, **args: Any) -> dict[str, Any]:
    async def body() -> dict[str, Any]:
        transport = host.transport()
        try:
            return dict((await transport.call(op, args))[0])
        finally:
            await transport.close()

    return asyncio.run(body())


def count(box: Any, **options: Any) -> Any:
    return box.commands.run("echo x >> n; wc -l < n", **options)


def runs(box: Any) -> bool:
    """Whether a step of it does. (To look for a file would be another step.)"""
    return any(command["exit_code"] is None for command in box.commands.list())


def doomed(box: Any, command: str) -> threading.Thread:
    """A command that runs on while the test does, and whose failure is no surprise."""

    def run() -> None:
        with contextlib.suppress(DsecError):
            box.commands.run(command)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: runs(box))
    return thread


def test_every_second_step_and_what_a_resume_says(own: Host) -> None:
    spec = {"trajectory": "s/1", "snapshot_steps": 2, "timeout": 60}
    box = own.create(**spec)
    assert box.get_info().resumed == {"files": "alive", "step": 0, "steps": 0}
    for number in range(7):
        assert count(box).stdout == f"{number + 1}\n"
    assert len(kept(own)) == 2, "the newest two"
    box.kill()
    again = own.create(**spec)
    assert again.get_info().resumed == {"files": "behind", "step": 6, "steps": 7}
    for number in range(6):
        result = count(again)
        assert result.replayed and result.stdout == f"{number + 1}\n"
    assert count(again).replayed, "the last one is known"
    with pytest.raises(StateLost):  # but its files are not: it may not run again unasked
        again.commands.run("cat n")
    again.kill()

    third = own.create(trajectory="s/2", snapshot_steps=2, timeout=60)
    for _ in range(2):
        count(third)
    assert third.commands.run("wc -l < n > m; cat m", idempotent=True).stdout == "2\n"
    third.kill()
    fourth = own.create(trajectory="s/2", snapshot_steps=2, timeout=60)
    assert fourth.get_info().resumed == {"files": "behind", "step": 2, "steps": 3}
    for _ in range(2):
        assert count(fourth).replayed
    assert fourth.commands.run("wc -l < n > m; cat m", idempotent=True).stdout == "2\n"
    assert fourth.commands.run("cat m n").stdout == "2\nx\nx\n", "the tail ran again on the snapshot's files"


def test_the_clock_saves_what_waits_between_two_steps(own: Host) -> None:
    box = own.create(trajectory="s/3", snapshot_seconds=0.3, timeout=60)
    count(box)
    first = until(lambda: kept(own))
    time.sleep(1.0)
    assert kept(own) == first, "nothing was done, so nothing new is kept"
    box.kill()
    again = own.create(trajectory="s/3", timeout=60)
    assert again.get_info().resumed == {"files": "alive", "step": 1, "steps": 1}
    assert count(again).replayed and count(again).stdout == "2\n"


def test_a_preemption_waits_for_the_step_that_runs_and_keeps_all_files(own: Host) -> None:
    box = own.create(trajectory="s/4", timeout=60)
    count(box)
    slow = "sleep 0.7; echo slow >> n"
    running = threading.Thread(target=lambda: box.commands.run(slow))
    running.start()
    until(lambda: runs(box))
    assert ask(own, "preempt", id=box.id, notice=50)["snapshot"] in kept(own)
    running.join()
    with pytest.raises(Preempted):
        count(box)
    box.kill()
    again = own.create(trajectory="s/4", timeout=60)
    assert again.get_info().resumed == {"files": "alive", "step": 2, "steps": 2}
    assert count(again).replayed and again.commands.run(slow).replayed
    assert again.commands.run("cat n").stdout == "x\nslow\n"


def test_a_preemption_that_comes_too_late_says_so(own: Host) -> None:
    box = own.create(trajectory="s/5", timeout=60)
    running = doomed(box, "sleep 60")
    with pytest.raises(InvalidRequest, match="1 steps running"):
        ask(own, "preempt", id=box.id, notice=0.5)
    assert not kept(own) and "1 steps running" in box.get_info().resumed["snapshot_failed"]
    box.kill()
    running.join()


def test_what_is_captured_while_a_step_runs_is_the_state_after_no_step(tmp_path: Path) -> None:
    async def body() -> None:
        log = TrajectoryLog(tmp_path)
        t = await log.open("t", Spec())
        at = t.quiet()
        ticket = await t.begin("run", {"command": "a"})
        with pytest.raises(InvalidRequest, match="1 steps running"):
            await t.snapshot("s", at)
        await t.end(ticket, {})  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="1 steps ran while"):
            await t.snapshot("s", at)
        assert not t.snapshots and (await t.snapshot("s", t.quiet())).step == 1
        log.close()

    asyncio.run(body())


def test_a_schedule_needs_files() -> None:
    for wrong in ({"substrate": "function", "snapshot_steps": 1}, {"snapshot_steps": -1}, {"snapshot_seconds": -0.5}):
        with pytest.raises(InvalidRequest, match="schedule"):
            Spec.from_dict(wrong)
    stated = Spec(snapshot_steps=3, snapshot_seconds=9.0).stated()
    assert identity(stated, b"") == identity(Spec().stated(), b""), "what is kept does not change what a command does"


POINTS = ["edge.half_snapshot", "edge.captured", "segment.torn:6", "segment.written:6", "segment.durable:6"]
"""Around the first snapshot; the sixth group of the log (OPEN, two steps) is its record."""


@pytest.mark.parametrize("point", POINTS)
def test_an_edge_killed_while_it_captures(make_host: Callable[[str], Host], point: str) -> None:
    """Nothing runs twice, no snapshot is half there, and none is left that the log does not know."""
    os.environ["DSEC_FAILPOINT"] = point
    try:
        own = make_host("root")
    finally:
        del os.environ["DSEC_FAILPOINT"]
    spec = {"trajectory": "s/6", "snapshot_steps": 2, "timeout": 60}
    box = own.create(**spec)
    with pytest.raises((SandboxFailed, OSError, DsecError)):
        for _ in range(3):
            count(box)
    assert own.process and own.process.wait(60) == -signal.SIGKILL
    (own.home / "edge.sock").unlink(missing_ok=True)
    own.start()
    assert not list((own.home / "snapshots").glob(".*")), "half of one"
    again = own.create(**spec)
    assert again.id == box.id
    for number in range(5):
        assert count(again).stdout == f"{number + 1}\n"
    assert len(kept(own)) in (1, 2) and all(name.startswith("auto-") for name in kept(own))
    again.kill()
    last = own.create(**spec)
    assert last.get_info().resumed == {"files": "behind", "step": 4, "steps": 5}
    own.stop()


def test_a_sandbox_that_dies_in_a_command_leaves_its_outcome_unknown(own: Host) -> None:
    box = own.create(trajectory="s/7", timeout=60)
    box.log_snapshot()
    command = "echo x >> n; sleep 60"
    running = doomed(box, command)
    pid = Box.saved(own.home / "sandboxes" / box.id)["running"]["pid"]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    running.join(60)
    again = own.create(trajectory="s/7", timeout=60)
    with pytest.raises(OutcomeUnknown):
        again.commands.run(command)
    assert again.get_info().resumed == {"files": "behind", "step": 0, "steps": 1}


def small_root(folder: Path, text: str) -> Path:
    (folder / "usr/bin").mkdir(parents=True)
    for name in ("dev", "proc", "tmp", "root", "etc"):
        (folder / name).mkdir()
    os.symlink("usr/bin", folder / "bin")
    files = {str(shutil.which(program)) for program in ("sh", "cat")}
    for program in list(files):
        files |= set(re.findall(r"(/\S+)", subprocess.run(["ldd", program], capture_output=True, text=True).stdout))
    for file in files:
        target = folder / (f"usr/bin/{Path(file).name}" if Path(file).name in ("sh", "cat") else file.lstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (folder / "version").write_text(text)
    return folder


@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="apt-get install erofs-utils")
def test_another_image_under_the_same_name_is_noticed(own: Host, tmp_path: Path) -> None:
    images = Images(own.home)
    images.add("tiny", small_root(tmp_path / "one", "one"))
    box = own.create(image="tiny", trajectory="s/8", timeout=60)
    assert box.commands.run("cat /version").stdout == "one"
    box.log_snapshot()
    images.add("tiny", small_root(tmp_path / "two", "two"))
    alive = own.create(image="tiny", trajectory="s/8", timeout=60)
    assert alive.id == box.id and alive.commands.run("cat /version").replayed, "it still is what it was made of"
    alive.kill()
    other = own.create(image="tiny", trajectory="s/8", timeout=60)
    assert other.get_info().resumed["files"] == "lost", "a snapshot lies on the image that it was taken on"
    with pytest.raises(Diverged) as parted:
        other.commands.run("cat /version")
    assert parted.value.fields["field"] == "image"
    other.kill()
    own.stop()
    assert str(own.home) not in Path("/proc/mounts").read_text(), "both are unmounted, also the one without a name"
