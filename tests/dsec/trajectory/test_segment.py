"""Segments: torn tails at every byte, damage in the middle, failing and full disks, what a power cut may leave."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsec.trajectory import failpoint
from dsec.trajectory.segment import HEAD, LogCorrupt, LogFailed, LogFull, Place, SegmentWriter, limits, scan, segments

MEMORY = Path("/dev/shm")


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(body())  # type: ignore[arg-type]


def bodies(folder: Path) -> list[bytes]:
    """What a reader finds, in order."""
    return [f.header for path, limit in limits(folder).items() for f in scan(path, limit).frames if f.stream]


async def put(writer: SegmentWriter, *texts: bytes) -> list[Place]:
    """Appends in one group when nothing is being written."""
    return list(await asyncio.gather(*(writer.append(1, 1, 0, text) for text in texts)))


def fill(folder: Path, groups: list[list[bytes]], **options: Any) -> None:
    async def body() -> None:
        writer = SegmentWriter(folder, **options)
        for group in groups:
            await put(writer, *group)
        writer.close()

    run(body)


def test_frames_come_back_and_a_group_shares_one_sync(tmp_path: Path) -> None:
    syncs = []
    texts = [b"%d" % i for i in range(200)]

    async def body() -> int:
        writer = SegmentWriter(tmp_path, sync=lambda fd: syncs.append(fd))
        await put(writer, b"first")
        before = len(syncs)
        await put(writer, *texts)
        writer.close()
        return before

    before = run(body)
    assert bodies(tmp_path) == [b"first", *texts]
    assert len(syncs) - before <= 2  # the first of them may have gone alone


def test_crc_is_castagnoli() -> None:
    from google_crc32c import value

    assert value(b"123456789") == 0xE3069283  # the check value of CRC-32C (RFC 3720 appendix B.4 lists the polynomial)


def test_a_frame_torn_at_every_byte_is_cut_and_the_rest_stays(tmp_path: Path) -> None:
    fill(tmp_path, [[b"one"], [b"two" * 20], [b"three" * 9]])
    path = segments(tmp_path)[0]
    whole = path.read_bytes()
    ends = [f.end for f in scan(path).frames]
    for length, reserved in product(range(len(whole) + 1), (0, 500)):
        path.write_bytes(whole[:length] + bytes(reserved))
        for restart in range(2):  # recovery itself is repeatable
            fill(tmp_path, [])
            kept = sum(end <= length for end in ends)
            expected = [b"one", b"two" * 20, b"three" * 9][: max(kept - 1, 0)]
            assert bodies(tmp_path) == expected, (length, reserved, restart)
            assert [p.stat().st_size for p in segments(tmp_path)] == ([ends[kept - 1]] if kept else [])
    fill(tmp_path, [[b"again"]])
    assert bodies(tmp_path) == [b"one", b"two" * 20, b"three" * 9, b"again"]


def test_a_flipped_byte_anywhere_is_never_read_as_data(tmp_path: Path) -> None:
    fill(tmp_path, [[b"one"], [b"two" * 5], [b"three" * 5]])
    path = segments(tmp_path)[0]
    whole, last = path.read_bytes(), scan(path).frames[-1].offset
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        if place >= last:  # cannot be told from a torn tail
            assert bodies(tmp_path) == [b"one", b"two" * 5]
        else:
            with pytest.raises(LogCorrupt) as caught:
                SegmentWriter(tmp_path)
            assert path.read_bytes()[place] == whole[place] ^ 0x40, "damage is left for the operator to see"
            assert caught.value.offset <= place


def test_damage_in_a_sealed_segment_is_an_error_even_at_its_end(tmp_path: Path) -> None:
    fill(tmp_path, [[b"x" * 50]] * 8, size=300)
    first = segments(tmp_path)[0]
    with open(first, "r+b") as file:
        file.truncate(first.stat().st_size - 1)
    with pytest.raises(LogCorrupt):
        bodies(tmp_path)


def test_a_missing_segment_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, [[b"x" * 50]] * 8, size=200)
    assert len(segments(tmp_path)) >= 3
    segments(tmp_path)[1].unlink()
    with pytest.raises(LogCorrupt):
        bodies(tmp_path)


@given(st.integers(0, 2**32))
def test_every_state_a_power_cut_may_leave(seed: int) -> None:
    """Any sectors of the unsynced group may have reached the disk; what was acknowledged stays, in order."""

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        folder = Path(name)
        groups = [[rng.randbytes(rng.choice((3, 90, 700))) for _ in range(rng.randint(1, 4))] for _ in range(4)]
        fill(folder, groups[:-1])
        path = segments(folder)[0]
        synced = path.stat().st_size
        fill(folder, groups[-1:])
        whole = bytearray(path.read_bytes())
        for sector in range(synced // 64, len(whole) // 64 + 1):  # small sectors: more ways to lose
            if rng.random() < 0.5:
                start, end = max(sector * 64, synced), min(sector * 64 + 64, len(whole))
                whole[start:end] = bytes(end - start)
        path.write_bytes(whole[: rng.randint(synced, len(whole))] + bytes(rng.choice((0, 10, 3000))))  # reserved room
        fill(folder, [[b"later"]])
        acknowledged = [text for group in groups[:-1] for text in group]
        found = bodies(folder)
        assert found[: len(acknowledged)] == acknowledged
        rest = found[len(acknowledged) : -1]
        assert found[-1] == b"later" and rest == groups[-1][: len(rest)]


class Disk:
    """fdatasync that fails when told to."""

    def __init__(self) -> None:
        self.failures = 0

    def __call__(self, fd: int) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        os.fdatasync(fd)


def test_a_failed_fsync_moves_the_group_to_a_new_segment(tmp_path: Path) -> None:
    disk = Disk()

    async def body() -> None:
        writer = SegmentWriter(tmp_path, sync=disk)
        await put(writer, b"one")
        disk.failures = 1
        places = await put(writer, b"two")
        assert places[0].path == str(segments(tmp_path)[1])
        await put(writer, b"three")
        writer.close()

    run(body)
    first = segments(tmp_path)[0]
    assert [f.header for f in scan(first).frames if f.stream] == [b"one", b"two"], "its bytes are still in the old file"
    assert bodies(tmp_path) == [b"one", b"two", b"three"], "and are read once"


def test_a_disk_that_keeps_failing_acknowledges_nothing_and_recovers(tmp_path: Path) -> None:
    disk = Disk()

    async def body() -> None:
        writer = SegmentWriter(tmp_path, sync=disk)
        await put(writer, b"one")
        disk.failures = 10**6
        for _ in range(3):
            with pytest.raises(LogFailed, match="Input/output"):
                await put(writer, b"lost")
        disk.failures = 0
        await put(writer, b"two")
        writer.close()

    run(body)
    assert bodies(tmp_path) == [b"one", b"two"]
    fill(tmp_path, [[b"three"]])
    assert bodies(tmp_path) == [b"one", b"two", b"three"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clean_error_and_the_log_goes_on(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    texts: list[bytes] = []

    async def body() -> None:
        writer = SegmentWriter(small_disk / "log", size=8 << 10)
        ballast.write_bytes(bytes(20 << 10))
        with pytest.raises(LogFull, match="No space left"):
            for i in range(100):
                text = b"%03d" % i + bytes(997)
                await put(writer, text)
                texts.append(text)
        with pytest.raises(LogFull):
            await put(writer, bytes(5000))
        ballast.unlink()
        await put(writer, b"after")
        writer.close()

    run(body)
    assert len(texts) > 20
    assert bodies(small_disk / "log") == [*texts, b"after"]


def test_nothing_of_a_group_that_found_no_room_is_ever_read(small_disk: Path) -> None:
    """Its first frames fit and are whole on the disk; a later, shorter group of the same shape must not revive them."""

    async def body() -> None:
        writer = SegmentWriter(small_disk / "log")
        await put(writer, b"one")
        with pytest.raises(LogFull):
            await put(writer, b"refused 1", b"refused 2", bytes(100 << 10))
        await put(writer, b"another 1")
        writer.close()

    run(body)
    assert bodies(small_disk / "log") == [b"one", b"another 1"]


def test_killed_while_it_opens_a_segment(tmp_path: Path) -> None:
    """In a child: SIGKILL at each point of rolling over; the parent finds what was acknowledged, and writes on."""
    for nth, point in enumerate(
        ("segment.roll", "segment.rolled", "segment.torn", "segment.written", "segment.durable")
    ):
        folder = tmp_path / point
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            failpoint.arm(f"{point}:{2 if 'roll' in point else 3}")

            async def body(folder: Path = folder, write: int = write) -> None:
                writer = SegmentWriter(folder, size=200)
                for i in range(20):
                    await put(writer, b"%02d" % i + bytes(100))
                    os.write(write, b"%02d" % i)

            run(body)
            os._exit(1)
        os.close(write)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9, point
        with open(read, "rb") as pipe:
            said = pipe.read()
        acknowledged = [said[i : i + 2] for i in range(0, len(said), 2)]
        fill(folder, [[b"on"]], size=200)
        found = [text[:2] for text in bodies(folder)]
        assert found[: len(acknowledged)] == acknowledged and found[-1] == b"on"
        assert len(found) - 1 - len(acknowledged) in (0, 1), nth


def test_the_head_is_what_the_documentation_says() -> None:
    assert HEAD.size == 40
