"""A layer that is mounted before it is here: one FUSE file whose missing chunks are fetched, checked and kept.

    lazy/<digest>/file      the file that EROFS is mounted from (a FUSE mount of a single regular file)
    lazy/<digest>/data      sparse: what has been fetched, at its place
    lazy/<digest>/bitmap    which chunks of `data` are true; written after they are on the disk
    lazy/<digest>/status    JSON: bytes fetched, errors

One process per layer opens the device and starts a worker that serves it (fuse.py, loader.py) and one that reads ahead.
A dead worker is replaced and nobody who reads notices. If both are dead the kernel closes the connection: reads fail,
nothing hangs. They import little, because every first start of an image waits for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from dsec.errors import DsecError, ImageError, NotFound
from dsec.images import erofs
from dsec.images.fuse import FuseFile
from dsec.images.loader import FETCHERS, Loader, Sparse
from dsec.images.manifest import Layer, fetch_chunk, start_chunks
from dsec.images.store import open_store

if TYPE_CHECKING:
    from dsec.images.layers import Images

TRACE_SECONDS = 10.0  # what is asked for in this time after the first read is the start trace
RESTARTS = 5  # of a worker in a row, before the file is given up
STEADY_SECONDS = 60.0  # a worker that lived this long starts a new row
FLUSH_SECONDS = 0.5
READAHEAD = 256 << 10  # bytes the kernel reads ahead, and takes of one advice
READY_SECONDS = 20.0
ORDER = struct.Struct("<QQ")  # offset and bytes to read ahead; a pipe never tears so little


class Served:
    """One layer as its process sees it. `latency` (seconds added to each fetch) is for benchmarks."""

    def __init__(self, images: Path, digest: str, latency: float, store: str) -> None:
        self.digest, self.latency, self.folder = digest, latency, images / "lazy" / digest
        self.whole, self.trace, self.guess = (
            images / "layers" / f"{digest}.{suffix}" for suffix in ("erofs", "trace", "guess")
        )
        self.layer = Layer.decode((images / "layers" / f"{digest}.json").read_bytes(), digest)
        self.store = open_store(store)

    def known(self) -> list[int] | None:
        """The start trace, or the guess at one, if there is either."""
        file = next((file for file in (self.trace, self.guess) if file.exists()), None)
        trace: list[int] | None = json.loads(file.read_bytes()) if file else None
        return trace

    def fetch(self, chunk: str) -> bytes:
        if self.latency:
            time.sleep(self.latency)
        return fetch_chunk(self.store, chunk)

    def work(self, fd: int, again: bool, here: list[int], reader: int, orders: int) -> None:
        """Serves the file until it is unmounted. `here`: chunks that whoever mounts has already put in its place.
        `reader`: the process that reads ahead as `orders` say."""

        def warm(offset: int, size: int) -> None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # advice may be lost
                os.write(orders, ORDER.pack(offset, size))

        trace = self.known()
        sparse = Sparse(self.folder, self.layer)
        sparse.vouch(here)
        loader = Loader(sparse, self.fetch, trace, warm, recording=not self.trace.exists())
        loader.threads.add(reader)
        loader.fetched = sum(min(self.layer.chunk, self.layer.size - i * self.layer.chunk) for i in here)
        loader.start()
        stop = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(loader, stop))
        keeper.start()
        try:
            FuseFile(fd, self.layer.size, loader.read).run(again)
        finally:
            stop.set()
            keeper.join()

    def _keep(self, loader: Loader, stop: threading.Event) -> None:
        """Makes what was fetched durable, writes status and, once, the trace. A full disk is noted and waited for."""
        while True:
            last = stop.wait(FLUSH_SECONDS)
            try:
                if loader.sparse.dirty:
                    loader.sparse.flush()
                _replace(self.folder / "status", json.dumps(loader.status()).encode())
                if loader.recording and loader.started and (last or time.monotonic() - loader.started > TRACE_SECONDS):
                    self._record(loader)
                if not loader.sparse.missing and not loader.sparse.dirty and not self.whole.exists():
                    os.link(self.folder / "data", self.whole)  # whole: the next mount needs no daemon
            except OSError as problem:
                loader.note("nothing more is kept for now", problem)
            if last:
                return

    def _record(self, loader: Loader) -> None:
        """Keeps the order of this start, here and, when nobody was quicker, for all other hosts."""
        # What was guessed may have been read without asking us: the kernel had it.
        found = list(dict.fromkeys([*loader.trace, *loader.asked]))[: start_chunks(self.layer)]
        loader.recording, data = False, json.dumps(found).encode()
        _replace(self.trace, data)
        try:
            if not self.store.has(f"traces/{self.digest}.json"):
                self.store.put(f"traces/{self.digest}.json", data)
        except (DsecError, OSError) as problem:  # a store that may only be read
            print(f"the start trace stays on this host: {problem}", file=sys.stderr, flush=True)


def _reader(target: Path, orders: int) -> None:
    """Has the kernel read ahead what it is told, until nobody is left to tell.

    It keeps no file open, which would keep the mount. It is a process of its own, because a
    worker that waits for a request which it must answer itself cannot even be killed.
    """
    with contextlib.suppress(OSError):  # sysfs may be missing or read-only
        device = os.stat(target).st_dev
        Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text(str(READAHEAD >> 10))
    while order := os.read(orders, ORDER.size):
        with contextlib.suppress(OSError):
            fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            os.fstat(fd)  # a kernel that has not asked for the size yet takes no advice
            offset, size = ORDER.unpack(order)
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
            os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    os.rename(new, path)


def _supervise(images: Path, digest: str, ready: int, latency: float) -> None:
    """Mounts the file, runs a worker, and another if it dies; gives up (the mount then fails reads) after RESTARTS."""
    served = Served(images, digest, latency, os.environ["DSEC_STORE"])
    target = served.folder / "file"
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=100444,user_id=0,group_id=0,allow_other"
    erofs.mount(Path("dsec"), target, "fuse", options)
    orders, told = os.pipe()
    if (reader := os.fork()) == 0:
        os.close(ready)
        os.close(fd)
        os.close(told)
        try:
            _reader(target, orders)
        finally:
            os._exit(0)
    os.close(orders)
    os.set_blocking(told, False)
    os.write(ready, b"m")
    here = json.loads(sys.stdin.readline() or "[]")
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
                served.work(fd, again, [] if again else here, reader, told)
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
    command = [sys.executable, "-m", "dsec.images.lazy", str(images.folder), digest, str(write), str(latency)]
    with open(read, "rb", buffering=0) as pipe:
        with open(write, "wb"), open(folder / "log", "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[write],
                start_new_session=True,
                env={**os.environ, "DSEC_STORE": str(images.url)},
            )
        served = Served(images.folder, digest, latency, str(images.url))
        ahead = Ahead(served)  # its start takes longer than most traces
        told = select.poll()  # takes descriptors above 1,023, which select refuses
        told.register(pipe, select.POLLIN)
        mounted = told.poll(READY_SECONDS * 1000) and pipe.read(1) == b"m"
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # a dead one is seen in the next line
            stdin.write(json.dumps(ahead.over()).encode() + b"\n")
        if not mounted or not told.poll(READY_SECONDS * 1000) or pipe.read() != b"ready":
            process.kill()
            process.wait()
            tail = (folder / "log").read_text()[-400:]
            raise ImageError(f"layer {digest[:12]} cannot be loaded on demand: {tail}")
    threading.Thread(target=process.wait, daemon=True).start()  # so that it leaves no zombie
    return target


class Ahead:
    """Fetches what the start trace lists while the process that will serve it starts."""

    def __init__(self, served: Served) -> None:
        self._sparse, self._here, self._ended = Sparse(served.folder, served.layer), list[int](), False
        chunks = served.layer.chunks
        wanted = [index for index in served.known() or [] if 0 <= index < len(chunks) and not self._sparse.has(index)]
        order, lock = iter(wanted), threading.Lock()

        def work() -> None:
            while not self._ended:
                with lock:
                    index = next(order, None)
                if index is None:
                    return
                with contextlib.suppress(DsecError, OSError):  # whoever reads the chunk is told
                    self._sparse.keep(index, served.fetch(chunks[index]))
                    self._here.append(index)

        self._threads = [threading.Thread(target=work, daemon=True) for _ in range(FETCHERS if wanted else 0)]
        for thread in self._threads:
            thread.start()

    def over(self) -> list[int]:
        """The chunks that are here by now; those on their way are still put in their place, for nobody."""
        self._ended = True
        threading.Thread(target=self._close, daemon=True).start()
        return list(self._here)

    def _close(self) -> None:
        for thread in self._threads:
            thread.join()
        self._sparse.close()


def _fetch_trace(images: Images, digest: str) -> None:
    """The start trace, else the guess at one, unless one of them is here."""
    for suffix, kind in (("json", "trace"), ("guess", "guess")):
        path = images.folder / "layers" / f"{digest}.{kind}"
        with contextlib.suppress(NotFound):
            if not path.exists():
                _replace(path, images.store.get(f"traces/{digest}.{suffix}"))
            return


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
