"""Layers that are mounted before they are here: only what is read is fetched, nothing wrong is kept, nothing hangs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import ImageError
from dsec.images import lazy
from dsec.images.layers import Images
from dsec.images.loader import FAR, NEAR, SOON, Loader, Sparse
from dsec.images.manifest import CHUNK, Layer, chunk_key, start_chunks
from tests.dsec.conftest import until

FILES = 24


@pytest.fixture
def pushed(tmp_path: Path) -> tuple[Images, str, str]:
    """(another host, the image's name, its layer's digest): an image in a store that the host has not fetched."""
    root = tmp_path / "root"
    root.mkdir()
    for i in range(FILES):
        (root / f"f{i}").write_bytes(os.urandom(CHUNK + 1000))
    here = Images(tmp_path / "here", str(tmp_path / "store"))
    image = here.add("mine", root)
    here.push("mine")
    return Images(tmp_path / "there", str(tmp_path / "store")), "mine", image.layers[0][1]


def want(tmp_path: Path, i: int) -> bytes:
    return (tmp_path / "root" / f"f{i}").read_bytes()


def status(images: Images, digest: str) -> dict[str, Any]:
    """The status, once it has been written anew twice."""
    file = images.folder / "lazy" / digest / "status"
    for _ in range(2):
        before = file.stat().st_ino if file.exists() else None
        until(lambda: file.exists() and file.stat().st_ino != before)  # noqa: B023
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def all_of(digest: str) -> list[int]:
    """Every process of a layer."""
    found = subprocess.run(["pgrep", "-f", f"dsec.images.lazy .* {digest}"], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def gone(digest: str) -> None:
    until(lambda: not all_of(digest))


def serves(pid: int) -> bool:
    try:
        return any(os.readlink(fd) == "/dev/fuse" for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False  # it has just ended


def processes(digest: str) -> list[int]:
    """The supervisor of a layer, then its worker: those that hold the device."""
    found = all_of(digest)
    children = subprocess.run(["pgrep", "-P", ",".join(map(str, found)) or "0"], capture_output=True, text=True).stdout
    return sorted(filter(serves, found), key=lambda pid: str(pid) in children.split())


def slow_store(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    real = lazy.serve
    monkeypatch.setattr("dsec.images.lazy.serve", lambda images, digest: real(images, digest, seconds))


pytestmark = pytest.mark.usefixtures("mountable")


def test_only_what_is_read_is_fetched_and_a_whole_layer_needs_no_daemon(
    tmp_path: Path, pushed: tuple[Images, str, str]
) -> None:
    images, name, digest = pushed
    (mounted,) = images.mount(name)
    assert (mounted / "f7").read_bytes() == want(tmp_path, 7)
    found = status(images, digest)
    assert 0 < found["fetched"] <= 0.25 * found["size"], found
    assert images.mount(name) == [mounted] and len(processes(digest)) == 2, "one daemon however often it is asked for"
    for i in range(FILES):
        assert (mounted / f"f{i}").read_bytes() == want(tmp_path, i)
    assert status(images, digest)["missing"] == 0
    assert images.verify(name) == []
    images.unmount(name)
    gone(digest)
    (mounted,) = images.mount(name)
    assert processes(digest) == [] and (mounted / "f1").read_bytes() == want(tmp_path, 1)


def test_a_process_with_a_thousand_open_files_mounts_on_demand(tmp_path: Path, pushed: tuple[Images, str, str]) -> None:
    images, name, _ = pushed
    many, (soft, hard) = 1100, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * many:
        pytest.skip(f"may open {hard} files, {2 * many} are wanted")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * many), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(many):
            stack.enter_context(open("/dev/null"))
        (mounted,) = images.mount(name)
    assert (mounted / "f7").read_bytes() == want(tmp_path, 7)


def test_a_server_that_cannot_be_started_leaves_no_descriptor(
    pushed: tuple[Images, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, name, _ = pushed
    images.get(name)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        images.mount(name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_fetched_stays_fetched(tmp_path: Path, pushed: tuple[Images, str, str]) -> None:
    images, name, digest = pushed
    (mounted,) = images.mount(name)
    assert (mounted / "f3").read_bytes() == want(tmp_path, 3)
    status(images, digest)
    for pid in processes(digest):
        os.kill(pid, signal.SIGKILL)
    (tmp_path / "store/chunks").rename(tmp_path / "store/away")  # what is here must do
    (mounted,) = images.mount(name)
    assert (mounted / "f3").read_bytes() == want(tmp_path, 3)
    with pytest.raises(OSError) as caught:
        (mounted / "f20").read_bytes()
    assert caught.value.errno == errno.EIO
    assert "is not in" in status(images, digest)["errors"][0]
    (tmp_path / "store/away").rename(tmp_path / "store/chunks")
    assert (mounted / "f20").read_bytes() == want(tmp_path, 20), "a failed read is not held against the chunk"


def test_a_corrupt_chunk_is_an_error_and_never_data(tmp_path: Path, pushed: tuple[Images, str, str]) -> None:
    images, name, digest = pushed
    layer = images.layer(digest) if images.get(name) else None
    assert layer
    whole = (tmp_path / "here/images/layers" / f"{digest}.erofs").read_bytes()
    index = whole.index(want(tmp_path, 5)[:4096]) // CHUNK
    (tmp_path / "store" / chunk_key(layer.chunks[index])).write_bytes(bytes(CHUNK))
    (mounted,) = images.mount(name)
    with pytest.raises(OSError) as caught:
        (mounted / "f5").read_bytes()
    assert caught.value.errno == errno.EIO
    assert f"chunk {layer.chunks[index]} is corrupt" in status(images, digest)["errors"][0]
    start = index * CHUNK
    (tmp_path / "store" / chunk_key(layer.chunks[index])).write_bytes(whole[start : start + CHUNK])
    assert (mounted / "f5").read_bytes() == want(tmp_path, 5)


def test_a_killed_worker_is_replaced_and_its_readers_never_know(
    tmp_path: Path, pushed: tuple[Images, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, name, digest = pushed
    slow_store(monkeypatch, 0.3)
    (mounted,) = images.mount(name)
    with ThreadPoolExecutor(6) as pool:
        reads = [pool.submit((mounted / f"f{i}").read_bytes) for i in range(6)]
        for _ in range(2):
            time.sleep(0.4)
            supervisor, worker = until(lambda: len(found := processes(digest)) == 2 and found)
            os.kill(worker, signal.SIGKILL)
            until(lambda: worker not in processes(digest))  # noqa: B023
        for i, read in enumerate(reads):
            assert read.result(timeout=60) == want(tmp_path, i)
    assert processes(digest)[0] == supervisor


def test_when_all_of_it_is_dead_reads_fail_and_nothing_hangs(
    tmp_path: Path, pushed: tuple[Images, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, name, digest = pushed
    images.mount(name)
    status(images, digest)  # what a mount reads is kept
    for pid in processes(digest):
        os.kill(pid, signal.SIGKILL)
    gone(digest)
    slow_store(monkeypatch, 600.0)
    (mounted,) = images.mount(name)
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit((mounted / f"f{i}").read_bytes) for i in (5, 10, 15, 20)]  # not what is read ahead
        time.sleep(0.5)  # so that most of them wait already; none can have been served
        os.kill(processes(digest)[0], signal.SIGKILL)  # the supervisor; its worker may not outlive it
        for read in reads:
            with pytest.raises(OSError):
                read.result(timeout=60)
    gone(digest)
    monkeypatch.undo()
    (mounted,) = images.mount(name)
    assert (mounted / "f0").read_bytes() == want(tmp_path, 0)


def test_the_start_is_traced_pushed_and_fetched_ahead(tmp_path: Path, pushed: tuple[Images, str, str]) -> None:
    images, name, digest = pushed
    (mounted,) = images.mount(name)
    for i in (9, 4):
        (mounted / f"f{i}").read_bytes()
    images.unmount(name)
    trace = until(lambda: images.trace(digest))
    order = json.loads(trace)
    assert 3 <= len(order) <= 8
    images.store.put(f"traces/{digest}.json", trace)
    third = Images(tmp_path / "third", str(tmp_path / "store"))
    third.mount(name)
    found = status(third, digest)
    assert found["chunks"] - found["missing"] >= len(order), "fetched before anybody asked"
    assert found["size"] / 2 > found["fetched"] >= (len(order) - 1) * CHUNK, "and counted, whoever fetched it"
    for i in (9, 4):
        (mounted,) = third.mount(name)
        assert (mounted / f"f{i}").read_bytes() == want(tmp_path, i)


def test_the_first_start_tells_the_others_by_itself(tmp_path: Path, pushed: tuple[Images, str, str]) -> None:
    images, name, digest = pushed
    (mounted,) = images.mount(name)
    for i in range(FILES):
        (mounted / f"f{i}").read_bytes()
    images.unmount(name)
    trace = json.loads(until(lambda: images.trace(digest)))
    chunks = len(images.layer(digest).chunks)
    guessed = json.loads((tmp_path / "store/traces" / f"{digest}.guess").read_bytes())
    assert trace[: len(guessed)] == guessed, "what was guessed may have been read without asking"
    assert len(trace) == start_chunks(images.layer(digest)) < chunks, "a start that read it all is no start trace"
    stored = tmp_path / "store/traces" / f"{digest}.json"
    until(stored.exists)
    assert json.loads(stored.read_bytes()) == trace


def test_what_is_fetched_before_the_server_is_there_is_kept_or_fetched_again(
    tmp_path: Path, pushed: tuple[Images, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever mounts begins with the trace. A wrong chunk is left to the server; a server that dies before it has
    synced what it was given fetches it again."""
    images, name, digest = pushed
    layer = images.layer(digest) if images.get(name) else None
    assert layer
    wrong = tmp_path / "store" / chunk_key(layer.chunks[3])
    right = wrong.read_bytes()
    wrong.write_bytes(bytes(CHUNK))
    (images.folder / "layers" / f"{digest}.trace").write_text(json.dumps([0, 3, 5, -1, 10**6]))
    (images.folder / "lazy" / digest).mkdir()
    ahead = lazy.Ahead(lazy.Served(images.folder, digest, 0.0, str(tmp_path / "store")))
    for thread in ahead._threads:
        thread.join()
    assert sorted(ahead.over()) == [0, 5]
    assert Sparse(images.folder / "lazy" / digest, layer).missing == len(layer.chunks), "nothing is vouched for yet"
    wrong.write_bytes(right)
    (mounted,) = images.mount(name)
    _, worker = processes(digest)
    os.kill(worker, signal.SIGKILL)
    for i in range(FILES):
        assert (mounted / f"f{i}").read_bytes() == want(tmp_path, i)


def test_a_full_disk_costs_time_and_never_data(tmp_path: Path, pushed: tuple[Images, str, str]) -> None:
    _, name, digest = pushed
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path / "small"], check=True)
    images = Images(tmp_path / "small", str(tmp_path / "store"))
    (mounted,) = images.mount(name)
    for i in range(FILES):
        assert (mounted / f"f{i}").read_bytes() == want(tmp_path, i)
    subprocess.run(["mount", "-o", "remount,size=64m", "none", tmp_path / "small"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")  # so that they are asked for again
    for i in range(FILES):
        assert (mounted / f"f{i}").read_bytes() == want(tmp_path, i)
    assert os.strerror(errno.ENOSPC) in str(status(images, digest)["errors"])
    images.unmount(name)
    gone(digest)
    kept = Sparse(images.folder / "lazy" / digest, images.layer(digest))
    assert kept.missing < kept.layer.size // CHUNK // 2, "with room again, chunks are kept again"
    for index in range(len(kept.layer.chunks)):
        data = os.pread(kept.data, CHUNK, index * CHUNK)
        assert not kept.has(index) or hashlib.sha256(data).hexdigest() == kept.layer.chunks[index]


# One process


def layer_of(data: bytes) -> Layer:
    pieces = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    return Layer(len(data), tuple(hashlib.sha256(piece).hexdigest() for piece in pieces))


def test_a_chunk_is_fetched_once_however_many_want_it(tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK + 5)
    layer, asked, gate = layer_of(data), Counter[str](), threading.Event()

    def fetch(chunk: str) -> bytes:
        asked[chunk] += 1
        gate.wait(60)
        index = layer.chunks.index(chunk)
        return data[index * CHUNK : (index + 1) * CHUNK]

    loader = Loader(Sparse(tmp_path, layer), fetch, None)
    with ThreadPoolExecutor(16) as pool:
        reads = [pool.submit(loader.read, CHUNK - 10, CHUNK + 20) for _ in range(16)]
        time.sleep(0.1)
        gate.set()
        assert {read.result() for read in reads} == {data[CHUNK - 10 : 2 * CHUNK + 10]}
    assert set(asked.values()) == {1} and len(asked) == 3
    assert loader.read(3 * CHUNK, 4096) == data[3 * CHUNK :], "the last chunk is short"


def test_a_fetch_that_failed_is_tried_again_by_the_next(tmp_path: Path) -> None:
    data, fail = os.urandom(CHUNK), [True]

    def fetch(chunk: str) -> bytes:
        if fail.pop() if fail else False:
            raise ImageError("away")
        return data

    loader = Loader(Sparse(tmp_path, layer_of(data)), fetch, None)
    with pytest.raises(ImageError):
        loader.read(0, 10)
    assert loader.read(0, 10) == data[:10] and loader.errors == ["away"]


def test_bits_are_written_after_their_data_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(2 * CHUNK)
    layer, order = layer_of(data), []
    sparse = Sparse(tmp_path, layer)
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (order.append((fd, os.pread(sparse.map, 1, 0))), real(fd)))
    sparse.keep(1, data[CHUNK:])
    assert not Sparse(tmp_path, layer).has(1), "a crash now loses it, and nothing worse"
    sparse.flush()
    assert [fd for fd, _ in order] == [sparse.data, sparse.map]
    assert order[0][1] in (b"", b"\0"), "no bit vouched for data that was not yet there"
    again = Sparse(tmp_path, layer)
    assert again.has(1) and not again.has(0) and again.missing == 1


def test_what_a_failing_disk_may_have_lost_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(2 * CHUNK)
    layer, fetched = layer_of(data), Counter[str]()

    def fetch(chunk: str) -> bytes:
        fetched[chunk] += 1
        index = layer.chunks.index(chunk)
        return data[index * CHUNK : (index + 1) * CHUNK]

    loader = Loader(Sparse(tmp_path, layer), fetch, None)
    loader.read(0, 10)
    loader.sparse.flush()
    loader.read(CHUNK, 10)

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "the disk")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fdatasync", broken)
        loader.sparse.flush()
    os.pwrite(loader.sparse.data, bytes(CHUNK), CHUNK)  # what a kernel may leave of a page that it could not write
    assert loader.read(CHUNK, 10) == data[CHUNK : CHUNK + 10]
    assert [fetched[chunk] for chunk in layer.chunks] == [1, 2], "what was durable before is still believed"


def test_readers_who_go_on_are_read_ahead_and_jumps_are_not(tmp_path: Path) -> None:
    layer = Layer(64 * CHUNK, tuple(f"{i:064}" for i in range(64)))
    loader = Loader(Sparse(tmp_path, layer), lambda chunk: bytes(CHUNK), [40, 41, 999])

    def ahead() -> list[int]:
        found = []
        while not loader._wanted.empty():
            urgency, _, index = loader._wanted.get()
            found += [index] if urgency == SOON else []
        return found

    steps = []
    for index in (20, 21, 22, 23):
        loader.read(index * CHUNK, 4096)
        steps.append(ahead())
    assert steps == [[21], [22, 23], [24, 25, 26], [27, 28, 29, 30, 31]] and NEAR == 1
    assert max(loader._windows.values()) <= FAR
    loader.read(5 * CHUNK, 4096)
    assert ahead() == [6], "after a jump one"
    loader.read(40 * CHUNK, 4096)
    assert ahead() == [], "a trace knows better"
    loader.threads.add(7)
    loader.read(50 * CHUNK, 4096, 7)
    assert ahead() == [] and 50 not in loader.asked, "our own reading ahead is no reader"


def test_a_guess_is_fetched_ahead_and_the_start_recorded_all_the_same(tmp_path: Path) -> None:
    layer = Layer(64 * CHUNK, tuple(f"{i:064}" for i in range(64)))
    loader = Loader(Sparse(tmp_path, layer), lambda chunk: bytes(CHUNK), [40, 41], recording=True)
    loader.read(40 * CHUNK, 4096)
    assert not loader.started, "a mount alone, and what was expected, is no start"
    loader.read(7 * CHUNK, 4096)
    assert loader.started and list(loader.asked) == [40, 7] and loader.recording


def test_what_is_read_now_comes_before_the_trace(tmp_path: Path) -> None:
    layer, order, gate = Layer(40 * CHUNK, tuple(f"{i:064}" for i in range(40))), list[int](), threading.Event()

    def fetch(chunk: str) -> bytes:
        order.append(int(chunk))
        gate.wait(60)
        return bytes(CHUNK)

    loader = Loader(Sparse(tmp_path, layer), fetch, list(range(10, 40)))
    loader.start()
    until(lambda: len(order) == loader_threads())
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(loader.read, 0, 3 * CHUNK)
        until(lambda: 0 in order)
        gate.set()
        assert read.result() == bytes(3 * CHUNK)
    until(lambda: 39 in order)  # the trace's last; what is read ahead comes in between
    assert max(order.index(1), order.index(2)) < order.index(39)


def loader_threads() -> int:
    from dsec.images import loader

    return loader.FETCHERS
