"""What a container can have before anything of its specification is known: a folder, an id range with its cgroup, the
socket of its agent, and a launcher that has done its first steps and waits (launch.c, --wait).

A start then has only its mounts left to make. Nothing of an image is chosen here and no mount namespace is made: one
made ahead would not have the mounts that the host makes later. An Edge that dies leaves folders without a state, which
the next one abandons; their launchers end by themselves, because nobody holds the other end of their sockets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsec.launch.cgroups import Cgroup, Hierarchy

MOST = 60_000  # bytes of arguments: less than a socket holds


@dataclass
class Begun:
    """See the module. `pid` is 0 where no launcher waits."""

    folder: Path
    group: Cgroup | None
    listener: socket.socket
    pid: int = 0
    control: socket.socket | None = None
    """Our end of the launcher's socket."""
    limits: tuple[float, int, int] | None = None
    """What its cgroup was limited to, if anything."""

    @classmethod
    def begin(cls, folder: Path, groups: Hierarchy, root: bool) -> Begun:
        group = None
        if groups.limits or root:
            group = Cgroup.claim(groups)
            group.note(folder)
        listener = socket.socket(socket.AF_UNIX)
        try:
            _bind(listener, folder / "agent.sock")
        except BaseException:
            listener.close()
            if group is not None:
                group.remove()
            raise
        return cls(folder, group, listener)

    def limit(self, cpu: float, memory: int, pids: int) -> None:
        """See Cgroup.limit; most sandboxes want what was already set while nobody waited."""
        if self.group is not None and self.limits != (cpu, memory, pids):
            self.group.limit(cpu, memory, pids)
            self.limits = (cpu, memory, pids)

    @property
    def first(self) -> list[str]:
        """The launcher's arguments that are known by now."""
        if self.group is None:
            return []
        return [
            *(part for path in self.group.joins for part in ("--cgroup", str(path))),
            "--base",
            str(self.group.base),
        ]

    def wait(self, pid: int, control: socket.socket) -> None:
        """A launcher waits for its arguments at the other end of `control`."""
        control.setblocking(False)  # it reads nothing before the shutdown
        self.pid, self.control = pid, control

    def go(self, arguments: Sequence[str]) -> int:
        """Sends the launcher on its way; its pid, or 0 if none waits (it may have died)."""
        data = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
        sent = False
        if self.control is not None and len(data) <= MOST:
            with contextlib.suppress(ConnectionError, BlockingIOError):
                self.control.sendall(struct.pack("<I", len(data)) + data)
                self.control.shutdown(socket.SHUT_WR)
                sent = True
        if not sent:
            self.dismiss()
            return 0
        pid, self.pid = self.pid, 0  # whoever runs the sandbox has it now
        self.hang_up()
        return pid

    def dismiss(self) -> None:
        """Ends a launcher that still waits."""
        self.hang_up()
        if self.pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            self.pid = 0

    def hang_up(self) -> None:
        if self.control is not None:
            self.control.close()
            self.control = None

    def close(self) -> None:
        """Closes what is open here; a launcher that still waits ends."""
        self.dismiss()
        self.listener.close()


def _bind(listener: socket.socket, path: Path) -> None:
    """A unix socket's path holds 107 bytes; a longer one goes through its folder's descriptor."""
    if len(os.fsencode(path)) < 108:
        listener.bind(str(path))
    else:
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            listener.bind(f"/proc/self/fd/{fd}/{path.name}")
        finally:
            os.close(fd)
    listener.listen(4)
