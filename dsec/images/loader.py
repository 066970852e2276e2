"""Brings the chunks of a layer in: each once however many ask for it, ahead of the reader where it can be guessed.

What is fetched, most urgent first: what is being read; what follows it (one chunk after a jump, twice as many each time
a reader goes on from there); what the start trace lists. What came in ahead is also given to the kernel's page cache.
What the disk has no room for is handed out all the same, and not kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import PriorityQueue

from dsec.errors import DsecError
from dsec.images.manifest import Layer

FETCHERS = 8  # chunks that are fetched ahead at once: they mostly wait for the store
NEAR, FAR = 1, 32  # chunks ahead of a reader: after a jump, and at most
NOW, SOON, TRACE = range(3)  # how urgent


class Sparse:
    """The chunks of one layer that are here. `keep` may be lost in a crash, a wrong one is never believed."""

    def __init__(self, folder: Path, layer: Layer) -> None:
        self.layer, self.folder = layer, folder
        self.data = os.open(folder / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.map = os.open(folder / "bitmap", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.data, layer.size)
        size = -(-len(layer.chunks) // 8)
        self.bits = bytearray(os.pread(self.map, size, 0).ljust(size, b"\0"))
        self.durable = bytes(self.bits)
        self.missing = sum(not self.has(index) for index in range(len(layer.chunks)))
        self.dirty = False
        self._lock = threading.Lock()

    def has(self, index: int) -> bool:
        return bool(self.bits[index >> 3] >> (index & 7) & 1)

    def keep(self, index: int, data: bytes) -> None:
        if os.pwrite(self.data, data, index * self.layer.chunk) != len(data):  # the last room was less
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with self._lock:
            self.bits[index >> 3] |= 1 << (index & 7)
            self.missing -= 1
            self.dirty = True

    def vouch(self, indexes: list[int]) -> None:
        """Chunks that another process has put into `data`, which may not be on the disk yet."""
        with self._lock:
            for index in indexes:
                if not self.has(index):
                    self.bits[index >> 3] |= 1 << (index & 7)
                    self.missing -= 1
                    self.dirty = True

    def close(self) -> None:
        os.close(self.data)
        os.close(self.map)

    def flush(self) -> None:
        """Data first, then the bits that vouch for it. OSError if the disk fails: what may be lost is forgotten."""
        with self._lock:
            bits, self.dirty = bytes(self.bits), False
        try:
            os.fdatasync(self.data)
            os.pwrite(self.map, bits, 0)
            os.fdatasync(self.map)
        except OSError:
            with self._lock:
                self.bits[:] = self.durable
                self.missing = sum(not self.has(index) for index in range(len(self.layer.chunks)))
            raise
        self.durable = bits


class Loader:
    """`trace`: the chunks that a start asks for, in its order, recorded or guessed. `recording`: what this one asks for
    shall be known (default: if there is no trace). `warm(offset, size)` has the kernel read a range ahead."""

    def __init__(
        self,
        sparse: Sparse,
        fetch: Callable[[str], bytes],
        trace: list[int] | None,
        warm: Callable[[int, int], None] = lambda offset, size: None,
        recording: bool | None = None,
    ) -> None:
        self.sparse, self.fetch, self.layer, self.warm = sparse, fetch, sparse.layer, warm
        self.fetched, self.errors = 0, list[str]()
        self.recording = trace is None if recording is None else recording
        self.asked, self.known = dict[int, None](), frozenset(trace or [])
        self.threads = set[int]()  # whose reads nobody waits for
        self.started = 0.0  # when the first chunk was asked for that the trace does not have
        self._windows = dict[int, int]()  # chunk at which a reader would go on -> how far it was read ahead
        self._wanted = PriorityQueue[tuple[int, int, int]]()  # urgency, turn, chunk
        self._turn = 0
        self._flights: dict[int, Future[bytes | None]] = {}
        self._lock = threading.Lock()
        self.trace = [index for index in trace or [] if 0 <= index < len(self.layer.chunks)]
        for index in self.trace:
            self._want(TRACE, index)

    def start(self) -> None:
        for index in self.trace:
            if self.sparse.has(index):
                self.warm(index * self.layer.chunk, self.layer.chunk)
        for _ in range(FETCHERS):
            threading.Thread(target=self._work, daemon=True).start()

    def read(self, offset: int, size: int, thread: int = 0) -> bytes:
        """Bytes of the layer; whatever is missing is fetched first. DsecError or OSError if it cannot be had."""
        last = min(offset + size, self.layer.size) - 1
        wanted = range(offset // self.layer.chunk, last // self.layer.chunk + 1)
        if thread not in self.threads:
            for index in wanted[1:]:
                self._want(NOW, index)
            for index in wanted:
                self._note(index)
        loose = {index: data for index in wanted if (data := self.ensure(index)) is not None}
        if not loose:
            return os.pread(self.sparse.data, last - offset + 1, offset)
        size, start = self.layer.chunk, wanted[0] * self.layer.chunk
        parts = [loose.get(index) or os.pread(self.sparse.data, size, index * size) for index in wanted]
        return b"".join(parts)[offset - start : last - start + 1]

    def _note(self, index: int) -> None:
        """A chunk is asked for: remembered for the trace, and what may follow is fetched ahead."""
        with self._lock:
            if index in self.asked:
                return
            self.asked[index] = None
            if index in self.known:
                return  # it comes with the trace, and so does what follows it
            self.started = self.started or time.monotonic()
            before = self._windows.pop(index, 0)
            ahead = self._windows[index + 1] = min(2 * before, FAR) or NEAR
        for following in range(index + max(before, 1), min(index + ahead + 1, len(self.layer.chunks))):
            self._want(SOON, following)

    def _want(self, urgency: int, index: int) -> None:
        if not self.sparse.has(index):
            self._turn += 1
            self._wanted.put((urgency, self._turn, index))

    def _work(self) -> None:
        self.threads.add(threading.get_native_id())
        while True:
            urgency, _, index = self._wanted.get()
            try:
                self.ensure(index)
                if urgency == TRACE or (urgency == SOON and not self.recording):
                    self.warm(index * self.layer.chunk, self.layer.chunk)
            except (DsecError, OSError):
                continue  # whoever reads the chunk is told

    def ensure(self, index: int) -> bytes | None:
        """Returns when the chunk is here; its bytes if there was no room to keep it."""
        with self._lock:
            if self.sparse.has(index):
                return None
            flight = self._flights.get(index)
            if mine := flight is None:
                flight = self._flights[index] = Future()
        assert flight is not None
        if not mine:
            return flight.result()
        try:
            data = self.fetch(self.layer.chunks[index])
            self.fetched += len(data)
            flight.set_result(None if self._keep(index, data) else data)
        except (DsecError, OSError) as problem:
            self.note(f"chunk {index}", problem)
            flight.set_exception(problem)
            raise
        finally:
            with self._lock:
                del self._flights[index]
        return flight.result()

    def _keep(self, index: int, data: bytes) -> bool:
        try:
            self.sparse.keep(index, data)
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.note(f"chunk {index} is not kept", problem)
            return False
        return True

    def note(self, what: str, problem: Exception) -> None:
        """One more line for the status and the log."""
        self.errors = [*self.errors[-9:], str(problem)]
        with contextlib.suppress(OSError):  # the log may lie on the same full disk
            print(f"{what}: {problem}", file=sys.stderr, flush=True)

    def status(self) -> dict[str, object]:
        return {
            "size": self.layer.size,
            "chunks": len(self.layer.chunks),
            "missing": self.sparse.missing,
            "fetched": self.fetched,
            "errors": self.errors,
        }
