"""A layer that is mounted before it is here: one FUSE file whose missing chunks are fetched, checked and kept.

    lazy/<digest>/file      the file that EROFS is mounted from (a FUSE mount of a single regular file)
    lazy/<digest>/data      sparse: what has been fetched, at its place
    lazy/<digest>/bitmap    which chunks of `data` are true; written after they are on the disk
    lazy/<digest>/status    JSON: bytes fetched, errors

The kernel's FUSE protocol (linux/fuse.h) is spoken here directly: one read-only file needs few requests, and the
device stays open in a parent that starts a dead worker again and has the kernel send anew what it had been asked
(FUSE_NOTIFY_RESEND, Linux 6.9). If both are dead the kernel closes the connection: reads fail, nothing hangs.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from dsec.errors import DsecError, ImageError
from dsec.images import erofs
from dsec.images.manifest import Layer, fetch_chunk

if TYPE_CHECKING:
    from dsec.images.layers import Images

THREADS = 8  # reads answered at once, and chunks prefetched at once
TRACE_SECONDS = 10.0  # what is asked for in this time after the first read is the start trace
RESTARTS = 5  # of a worker in a row, before the file is given up
STEADY_SECONDS = 60.0  # a worker that lived this long starts a new row
FLUSH_SECONDS = 0.5
READY_SECONDS = 20.0


class Sparse:
    """The chunks of one layer that are here. `keep` may be lost in a crash, a wrong one is never believed."""

    def __init__(self, folder: Path, layer: Layer) -> None:
        self.layer, self.folder = layer, folder
        self.data = os.open(folder / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.map = os.open(folder / "bitmap", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.data, layer.size)
        size = -(-len(layer.chunks) // 8)
        self.bits = bytearray(os.pread(self.map, size, 0).ljust(size, b"\0"))
        self.missing = sum(not self.has(index) for index in range(len(layer.chunks)))
        self.dirty = False
        self._lock = threading.Lock()

    def has(self, index: int) -> bool:
        return bool(self.bits[index >> 3] >> (index & 7) & 1)

    def keep(self, index: int, data: bytes) -> None:
        os.pwrite(self.data, data, index * self.layer.chunk)
        with self._lock:
            self.bits[index >> 3] |= 1 << (index & 7)
            self.missing -= 1
            self.dirty = True

    def flush(self) -> None:
        """Data first, then the bits that vouch for it."""
        with self._lock:
            bits, self.dirty = bytes(self.bits), False
        os.fdatasync(self.data)
        os.pwrite(self.map, bits, 0)
        os.fdatasync(self.map)


class Loader:
    """Brings chunks in, each once however many ask for it, and remembers the order in which they were asked for."""

    def __init__(self, sparse: Sparse, fetch: Callable[[str], bytes], trace: list[int] | None) -> None:
        self.sparse, self.fetch, self.layer = sparse, fetch, sparse.layer
        self.fetched, self.errors = 0, list[str]()
        self.known, self.asked = trace, dict[int, None]()
        self.started = 0.0
        self._flights: dict[int, Future[None]] = {}
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the layer; whatever is missing is fetched first. DsecError or OSError if it cannot be had."""
        self.started = self.started or time.monotonic()
        last = min(offset + size, self.layer.size) - 1
        for index in range(offset // self.layer.chunk, last // self.layer.chunk + 1):
            self.asked.setdefault(index)
            self.ensure(index)
        return os.pread(self.sparse.data, last - offset + 1, offset)

    def ensure(self, index: int) -> None:
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
            self.sparse.keep(index, data)
            self.fetched += len(data)
        except (DsecError, OSError) as problem:
            self.errors = [*self.errors[-9:], str(problem)]
            print(f"chunk {index}: {problem}", file=sys.stderr, flush=True)
            flight.set_exception(problem)
            raise
        else:
            flight.set_result(None)
        finally:
            with self._lock:
                del self._flights[index]
        return None

    def prefetch(self) -> None:
        """Fetches what the trace lists, in its order; errors are left to whoever reads the chunk."""
        order = iter([index for index in self.known or [] if 0 <= index < len(self.layer.chunks)])
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    index = next(order, None)
                if index is None:
                    return
                try:
                    self.ensure(index)
                except (DsecError, OSError):
                    continue

        for _ in range(THREADS):
            threading.Thread(target=work, daemon=True).start()

    def status(self) -> dict[str, object]:
        return {
            "size": self.layer.size,
            "chunks": len(self.layer.chunks),
            "missing": self.sparse.missing,
            "fetched": self.fetched,
            "errors": self.errors,
        }


# The kernel's side (struct names as in linux/fuse.h)

IN = struct.Struct("<IIQQIIIHH")  # fuse_in_header
OUT = struct.Struct("<IiQ")  # fuse_out_header
INIT_IN = struct.Struct("<IIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
READ_IN = struct.Struct("<QQII")
OPCODES = {26: "INIT", 3: "GETATTR", 14: "OPEN", 15: "READ", 17: "STATFS", 18: "RELEASE", 25: "FLUSH"}
SILENT = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET: no answer is expected
ASYNC_READ, MAX_PAGES, INIT_EXT = 1 << 0, 1 << 22, 1 << 30
HAS_RESEND = 1 << 7  # in flags2
KEEP_CACHE = 2
NOTIFY_RESEND = 7
BUFFER = 1 << 20


class FuseFile:
    """Answers the kernel's questions about one read-only file."""

    def __init__(self, fd: int, size: int, read: Callable[[int, int], bytes]) -> None:
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
            _, opcode, unique, _, *_ = IN.unpack_from(request)
            if opcode in SILENT:
                continue
            try:
                answer = self._answer(opcode, request[IN.size :])
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

    def _answer(self, opcode: int, body: bytes) -> bytes:
        name = OPCODES.get(opcode)
        if name == "READ":
            _, offset, size, _ = READ_IN.unpack_from(body)
            return self.read(offset, size) if offset < self.size else b""
        if name == "GETATTR":
            mode, blocks = stat.S_IFREG | 0o444, -(-self.size // 512)
            return struct.pack("<QII", 3600, 0, 0) + ATTR.pack(
                1, self.size, blocks, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
            )
        if name == "OPEN":
            return struct.pack("<QIi", 0, KEEP_CACHE, 0)
        if name == "INIT":
            _, minor, readahead, flags = INIT_IN.unpack_from(body)
            wanted = (ASYNC_READ | MAX_PAGES | INIT_EXT) & flags
            return INIT_OUT.pack(7, min(minor, 40), readahead, wanted, 64, 48, 4096, 1, 64, 0, HAS_RESEND)
        if name == "STATFS":
            return struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if name in ("RELEASE", "FLUSH"):
            return b""
        raise OSError(errno.ENOSYS, "not a request for one file")


# Processes


def _worker(images: Images, digest: str, fd: int, again: bool, latency: float) -> None:
    """Serves the file until it is unmounted. `latency` (seconds added to each fetch) is for benchmarks."""
    folder = images.folder / "lazy" / digest
    layer = images.layer(digest)

    def fetch(chunk: str) -> bytes:
        if latency:
            time.sleep(latency)
        return fetch_chunk(images.store, chunk)

    trace_file = images.folder / "layers" / f"{digest}.trace"
    trace = json.loads(trace_file.read_bytes()) if trace_file.exists() else None
    loader = Loader(Sparse(folder, layer), fetch, trace)
    loader.prefetch()
    stop = threading.Event()

    def keep() -> None:
        """Makes what was fetched durable, writes the status and, once, the trace."""
        traced = trace is not None
        while True:
            last = stop.wait(FLUSH_SECONDS)
            if loader.sparse.dirty:
                loader.sparse.flush()
            _replace(folder / "status", json.dumps(loader.status()).encode())
            if not traced and loader.started and (last or time.monotonic() - loader.started > TRACE_SECONDS):
                _replace(trace_file, json.dumps(list(loader.asked)).encode())
                traced = True
            if not loader.sparse.missing and not images.present(digest):
                os.link(folder / "data", images.file(digest))  # whole: the next mount needs no daemon
            if last:
                return

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        FuseFile(fd, layer.size, loader.read).run(again)
    finally:
        stop.set()
        keeper.join()


def _replace(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.rename(new, path)


def _supervise(images: Images, digest: str, ready: int, latency: float) -> None:
    """Mounts the file, runs a worker, and another if it dies; gives up (the mount then fails reads) after RESTARTS."""
    target = images.folder / "lazy" / digest / "file"
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=100444,user_id=0,group_id=0,allow_other"
    erofs.mount(Path("dsec"), target, "fuse", options)
    parent, failures, again = os.getpid(), 0, False
    while failures <= RESTARTS:
        started = time.monotonic()
        if (child := os.fork()) == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no worker without its parent
            if os.getppid() != parent:
                os._exit(1)
            if not again:
                os.close(ready)
            code = 1
            try:
                _worker(images, digest, fd, again, latency)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if not again:
            os.write(ready, b"ready")
            os.close(ready)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        again, failures = True, failures + 1 if time.monotonic() - started < STEADY_SECONDS else 1
        print(f"worker ended with {code}, restart {failures} of {RESTARTS}", file=sys.stderr, flush=True)
        time.sleep(0.05 * 2**failures)


def serve(images: Images, digest: str, latency: float = 0.0) -> Path:
    """Starts the process that serves a layer's file (unless one does) and returns the file; ImageError if it cannot."""
    folder = images.folder / "lazy" / digest
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "file"
    images.layer(digest)
    if os.path.ismount(target):  # the caller has made sure that it is alive
        return target
    target.touch()
    _fetch_trace(images, digest)
    read, write = os.pipe()
    command = [sys.executable, "-m", "dsec.images.lazy", str(images.folder.parent), digest, str(write), str(latency)]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[write],
            start_new_session=True,
            env={**os.environ, "DSEC_STORE": str(images.url)},
        )
    os.close(write)
    with open(read, "rb") as pipe:
        if not select.select([pipe], [], [], READY_SECONDS)[0] or pipe.read() != b"ready":
            process.kill()
            process.wait()
            tail = (folder / "log").read_text()[-400:]
            raise ImageError(f"layer {digest[:12]} cannot be loaded on demand: {tail}")
    threading.Thread(target=process.wait, daemon=True).start()  # so that it leaves no zombie
    return target


def _fetch_trace(images: Images, digest: str) -> None:
    path = images.folder / "layers" / f"{digest}.trace"
    if not path.exists() and images.store.has(f"traces/{digest}.json"):
        _replace(path, images.store.get(f"traces/{digest}.json"))


if __name__ == "__main__":
    from dsec.images.layers import Images

    _supervise(Images(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
