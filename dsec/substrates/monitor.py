"""One process that runs a machine: how it ends, its last words, and the way to the agent in its guest.

QEMU (qemu.py), Firecracker (firecracker.py) and libkrun (libkrun.py) are monitors. Each is confined before it is
executed (confine.c), and none is believed: what it left in its folder is opened without following links.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsec.errors import Capacity, SandboxFailed, Timeout
from dsec.guest import build
from dsec.guest.protocol import Agent, Process
from dsec.launch.cgroups import Cgroup
from dsec.substrates.process import Watched

HANG = 1.0
"""Seconds a guest has to end a command that is killed, before the machine is."""
PORT = 1024
"""The agent's, where a machine has vsock."""


class Monitor(ABC):
    """A running one. Its files are in `folder`: log (its standard error, and while it boots, its guest's console)."""

    name = ""
    forks = False
    """Whether a running one can be saved and go on, so that it has snapshots and forks."""

    def __init__(self, pid: int, folder: Path, group: Cgroup | None) -> None:
        self.folder, self.group = folder, group
        self.blame = ""  # why we killed it
        self.process = Watched(pid, self.why)
        self.pid, self.started, self.end = pid, self.process.started, self.process.end

    def why(self) -> str:
        """Why it ended: what we killed it for, its last words, or that it was switched off."""
        if self.blame:
            return self.blame
        if lines := self._log().splitlines():
            return lines[-1]
        killed = self.group is not None and self.group.stats().oom_kills
        return f"{self.name} ran out of its memory" if killed else "the machine is off"

    def _log(self) -> str:
        """The end of what it said."""
        with contextlib.suppress(OSError):
            return _printable((self.folder / "log").read_bytes()[-2000:].decode(errors="replace"))
        return ""

    async def console(self) -> str:
        """The last lines the guest wrote to its console, for error messages; "" when nobody tells."""
        return self._log()

    @abstractmethod
    async def agent(self, deadline: float) -> GuestAgent:
        """A connection to the agent of its guest. Raises SandboxFailed, or Timeout after `deadline` seconds."""

    async def stop(self) -> None:
        """The guest stands still."""
        self.process.signal(signal.SIGSTOP)

    async def cont(self) -> None:
        self.process.signal(signal.SIGCONT)

    async def save(self, target: Path) -> None:
        """Writes a stopped machine as `device` and `ram` into the folder `target`, to be cloned from."""
        raise SandboxFailed(f"{self.name} cannot save a machine")

    async def kill(self) -> None:
        """SIGKILL, and waits for the end (at most 5 s: then the kernel is stuck with it)."""
        self.process.signal(signal.SIGKILL)
        await self.process.ended(5)


class GuestAgent(Agent):
    """The agent of a machine, whose kernel is the guest's: that a kill works is for the guest to prove, in time."""

    closed = False

    def send(self, kind: bytes, id: int, payload: bytes = b"") -> None:
        super().send(kind, id, payload)
        if (kind == b"K" or (kind == b"S" and payload == b"\x09")) and id in self._processes:
            asyncio.get_running_loop().call_later(HANG, self._check, self._processes[id])

    def _check(self, process: Process) -> None:
        if not process.done.done():
            self._fail(f"the guest did not end a killed command within {HANG} s")

    def close(self) -> None:
        self.closed = True
        super().close()


def confined(
    home: Path, folder: Path, group: Cgroup | None, program: list[str], *, files: int, kvm: bool,
    shown: Sequence[tuple[Path, str]] = (), box: Path | None = None, fds: Sequence[int] = (),
) -> int:  # fmt: skip
    """Starts a monitor behind confine.c; its pid. `files`: MiB its own files may grow to; `shown`: files of the host
    and the names under which it finds them in its own root, read-only; `box`: a folder that it may write, as /box."""
    confine = build.program(Path(__file__).with_name("confine.c"), home / "cache")
    walls = [str(confine), "--files", str((files + 16) << 20)]
    walls += [part for path in (group.folders if group else []) for part in ("--cgroup", str(path))]
    walls += ["--uid", str(group.base)] if group is not None and os.geteuid() == 0 else []
    walls += ["--group", str(os.stat("/dev/kvm").st_gid)] if kvm else []
    walls += [part for path, name in shown for part in ("--show", f"{name}={path}")]
    walls += ["--box", str(box)] if box is not None else []
    with (folder / "log").open("ab") as log:
        try:
            process = subprocess.Popen(
                [*walls, "--", *program],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": os.defpath, "LANG": "C"},
                start_new_session=True,
            )
        except BlockingIOError as error:
            raise Capacity(f"this host can start no more processes: {error}") from None
    process.returncode = 0  # reaped by _exited, not by Popen
    return process.pid


def box_of(folder: Path, group: Cgroup | None) -> Path:
    """A folder of the monitor's own below its sandbox's."""
    box = folder / "box"
    box.mkdir(mode=0o700)
    if group is not None and os.geteuid() == 0:
        os.chown(box, group.base, group.base)
    return box


def taken(box: Path, name: str, target: Path) -> None:
    """Copies a regular file that a monitor has made in its box, whatever it has put there instead."""
    fd = os.open(box / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as source, target.open("xb") as copy:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SandboxFailed(f"the machine's {name} is no file")
        shutil.copyfileobj(source, copy, 1 << 20)
    os.unlink(box / name)


@contextlib.contextmanager
def socket_in(box: Path, name: str) -> Iterator[str]:
    """A path to connect to: the socket that a monitor has made in its box, never what a link of that name leads to."""
    fd = os.open(box / name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise SandboxFailed(f"the machine's {name} is no socket")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


async def until(monitor: Monitor, deadline: float, what: str, seconds: float = 0.01) -> None:
    """One wait of a loop that waits for a monitor: raises when it has ended or `deadline` (monotonic) is over."""
    if monitor.end.done():
        raise SandboxFailed(f"{monitor.name} ended before {what}: {monitor.end.result()}")
    if asyncio.get_running_loop().time() > deadline:
        raise Timeout(
            f"{monitor.name}: no {what} in time; the end of its console: {(await monitor.console())[-400:]!r}"
        )
    await asyncio.sleep(seconds)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text[-2000:]).strip()


@contextlib.contextmanager
def reachable(folder: Path, name: str) -> Iterator[str]:
    """A path to a unix socket in `folder`; one over 107 bytes goes through the folder's descriptor."""
    path = os.fspath(folder / name)
    if len(os.fsencode(path)) < 108:
        yield path
        return
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
