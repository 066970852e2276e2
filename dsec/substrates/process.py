"""One process that a sandbox depends on, watched by its pidfd: another one of the same number is never hit."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

from dsec.launch.cgroups import started

_LIBC = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438  # Linux 5.6


class Watched:
    """``end`` tells, when the process is over, what `why` says then. It need not be our child: Edges adopt."""

    def __init__(self, pid: int, why: Callable[[], str]) -> None:
        self.pid, self.started = pid, started(pid)
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._why = why
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.end.set_result(why())
        else:
            asyncio.get_running_loop().add_reader(self._fd, self._exited)

    def _exited(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        with contextlib.suppress(ChildProcessError):  # an adopted one is not our child
            os.waitpid(self.pid, os.WNOHANG)
        if not self.end.done():
            self.end.set_result(self._why())

    def signal(self, number: int) -> None:
        """A signal to it, if it has not ended."""
        if not self.end.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def rewind(self, file: Path) -> None:
        """Sets the position of a file that it has open to the beginning; opening the file anew does not reach that."""
        wanted = file.stat()
        for each in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(each.stat(), wanted):
                    fd = _LIBC.syscall(_PIDFD_GETFD, self._fd, int(each.name), 0)
                    if fd < 0:
                        raise OSError(ctypes.get_errno(), f"process {self.pid}: {os.strerror(ctypes.get_errno())}")
                    os.lseek(fd, 0, os.SEEK_SET)
                    os.close(fd)

    async def ended(self, seconds: float) -> bool:
        """Waits for its end, at most so long."""
        await asyncio.wait([self.end], timeout=seconds)
        return self.end.done()
