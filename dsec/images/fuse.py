"""The kernel's FUSE protocol for one read-only file, spoken directly (struct names as in linux/fuse.h).

One file needs few kinds of request, and the open device can stay with a parent that starts a dead worker again and has
the kernel send anew what it had been asked (FUSE_NOTIFY_RESEND, Linux 6.9).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from collections.abc import Callable

from dsec.errors import DsecError

THREADS = 8  # reads answered at once

IN = struct.Struct("<IIQQIIIHH")  # fuse_in_header
OUT = struct.Struct("<IiQ")  # fuse_out_header
INIT_IN = struct.Struct("<IIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
READ_IN = struct.Struct("<QQII")
OPCODES = {26: "INIT", 3: "GETATTR", 15: "READ", 17: "STATFS"}
# OPEN, RELEASE, FLUSH are answered ENOSYS, once each: the kernel then opens and closes without asking.
SILENT = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET: no answer is expected
ASYNC_READ, MAX_PAGES, INIT_EXT = 1 << 0, 1 << 22, 1 << 30
HAS_RESEND = 1 << 7  # in flags2
NOTIFY_RESEND = 7
PAGES = 256  # of a read at most: 1 MiB
BUFFER = 1 << 16


class FuseFile:
    """Answers the kernel's questions about one read-only file by `read(offset, size, thread)`, the thread that asks."""

    def __init__(self, fd: int, size: int, read: Callable[[int, int, int], bytes]) -> None:
        self.fd, self.size, self.read = fd, size, read

    def run(self, resend: bool) -> None:
        """Serves until the file is unmounted."""
        if resend:  # a worker before this one took requests along into its grave
            os.write(self.fd, OUT.pack(OUT.size, NOTIFY_RESEND, 0))
        threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _loop(self) -> None:
        while True:
            try:
                request = os.read(self.fd, BUFFER)
            except OSError as problem:
                if problem.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                if problem.errno == errno.ENODEV:  # unmounted
                    return
                raise
            _, opcode, unique, _, _, _, thread, *_ = IN.unpack_from(request)
            if opcode in SILENT:
                continue
            try:
                answer = self._answer(opcode, thread, request[IN.size :])
                status = 0
            except OSError as problem:
                answer, status = b"", -(problem.errno or errno.EIO)
            except DsecError:
                answer, status = b"", -errno.EIO
            try:
                os.writev(self.fd, [OUT.pack(OUT.size + len(answer), status, unique), answer])
            except OSError as problem:
                if problem.errno not in (errno.ENOENT, errno.ENODEV):  # the asker is gone
                    raise

    def _answer(self, opcode: int, thread: int, body: bytes) -> bytes:
        name = OPCODES.get(opcode)
        if name == "READ":
            _, offset, size, _ = READ_IN.unpack_from(body)
            return self.read(offset, size, thread) if offset < self.size else b""
        if name == "GETATTR":
            mode, blocks = stat.S_IFREG | 0o444, -(-self.size // 512)
            return struct.pack("<QII", 3600, 0, 0) + ATTR.pack(
                1, self.size, blocks, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
            )
        if name == "INIT":
            _, minor, readahead, flags = INIT_IN.unpack_from(body)
            wanted = (ASYNC_READ | MAX_PAGES | INIT_EXT) & flags
            return INIT_OUT.pack(7, min(minor, 40), readahead, wanted, 64, 48, 4096, 1, PAGES, 0, HAS_RESEND)
        if name == "STATFS":
            return struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        raise OSError(errno.ENOSYS, "not a request for one file")
