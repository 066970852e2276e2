"""Segment files: frames guarded by CRC32C, written in groups, one fdatasync for all that wait.

    frame = magic u32 | header bytes u32 | payload bytes u32 | batch u32 | stream u64 | epoch u64 | mark u32 | crc u32
            | header | payload

`stream`, `epoch` and `mark` are the log's (who wrote what kind of record), so it need not parse what it only counts.
`batch` is the offset at which the frame's group began: everything before it was durable when the frame was written.
That is how a reader tells a torn tail from damage. A bad frame followed by a good one of the *same* group was never
acknowledged (a power failure may keep any pages of an unsynced group), so the file ends there. A bad frame followed by
a good frame of a *later* group had been acknowledged: `LogCorrupt`, never skipped.

The first frame of a segment (stream 0) names the segment before it and the length to which that one may be trusted, so
what a failed fsync left behind its last good group is ignored for ever.

Room is reserved ahead of what is written: an fdatasync that also has to commit a new file size takes half as much more.
Reserved bytes are zeros, which are no frame, so a reader stops there; a segment that is full or closed gives them back.

CRC32C (Castagnoli) comes from the google-crc32c wheel: zlib.crc32 is another polynomial, and a table in Python costs
50 ns a byte where the wheel uses the processor's instruction.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from google_crc32c import extend

from dsec.errors import DsecError
from dsec.trajectory.failpoint import crash, die, reached

MAGIC = 0x4C534344  # "DCSL" on disk
HEAD = struct.Struct("<IIIIQQII")
SIZE = 64 << 20  # bytes after which a new segment is opened
AHEAD = 1 << 20  # bytes reserved at a time
GROUP_RECORDS, GROUP_BYTES = 256, 8 << 20  # the most that one group takes
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


class LogFull(DsecError):
    """No room for the record: nothing was acknowledged, the log stays usable once there is room."""


class LogFailed(DsecError):
    """The record could not be made durable (fsync failed twice, or the log is closed): nothing was acknowledged."""


class LogCorrupt(DsecError):
    """An acknowledged frame is unreadable; the segment is left as it is. Fields: path, offset (bytes), why."""


def corrupt(path: Path, offset: int, why: str) -> LogCorrupt:
    text = f"{path}: bad frame at byte {offset} ({why}); see `dsec log verify`"
    return LogCorrupt(text, path=str(path), offset=offset, why=why)


class Place(NamedTuple):
    """Where a durable frame lies: segment file, byte offset, length in bytes."""

    path: str
    offset: int
    length: int


class Frame(NamedTuple):
    offset: int
    end: int
    batch: int
    stream: int
    epoch: int
    mark: int
    header: bytes
    payload: bytes


def pack(stream: int, epoch: int, mark: int, header: bytes, payload: bytes, batch: int) -> bytes:
    head = HEAD.pack(MAGIC, len(header), len(payload), batch, stream, epoch, mark, 0)[:-4]
    crc = extend(extend(extend(0, head), header), payload)
    return b"".join((head, crc.to_bytes(4, "little"), header, payload))


def unpack(data: bytes, offset: int = 0, base: int = 0) -> Frame:
    """The frame at `offset` of `data` (byte `base` of its file on); ValueError says what is wrong with it."""
    if len(data) - offset < HEAD.size:
        raise ValueError(f"{len(data) - offset} bytes are less than a frame's {HEAD.size}")
    magic, header_bytes, payload_bytes, batch, stream, epoch, mark, crc = HEAD.unpack_from(data, offset)
    if magic != MAGIC:
        raise ValueError(f"magic {magic:#010x}")
    start = offset + HEAD.size
    middle, end = start + header_bytes, start + header_bytes + payload_bytes
    if end > len(data):
        raise ValueError(f"{end - offset} bytes announced, {len(data) - offset} there")
    header, payload = data[start:middle], data[middle:end]
    if extend(extend(extend(0, data[offset : start - 4]), header), payload) != crc:
        raise ValueError("CRC32C differs")
    return Frame(base + offset, base + end, batch, stream, epoch, mark, header, payload)


class Item(NamedTuple):
    """A frame that is to be written, and who hears of it."""

    stream: int
    epoch: int
    mark: int
    header: bytes
    payload: bytes
    future: asyncio.Future[Place]
    then: Callable[[Place | Exception], None] | None


class Scan(NamedTuple):
    """What a segment holds: its good frames, the end of the last one, and the end of what is written at all: beyond
    `end`, a torn tail."""

    frames: list[Frame]
    end: int
    length: int


def scan(path: Path, limit: int | None = None, start: int = 0, stream: int | None = None) -> Scan:
    """Reads a segment from `start` up to `limit` or the last good frame; LogCorrupt if an acknowledged frame is bad.

    `limit` (the length the next segment vouches for) makes any bad frame before it corruption. With `stream`, frames of
    other streams are checked but not kept.
    """
    try:
        return _scan(path, limit, start, stream)
    except LogCorrupt:
        if limit is not None:
            raise
        return _scan(path, limit, start, stream)  # its writer may have been faster than the first look, page by page


def _scan(path: Path, limit: int | None, start: int, stream: int | None) -> Scan:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read() if limit is None else file.read(max(0, limit - start))
    frames, offset, why = [], 0, f"the file ends before byte {limit}"
    while offset < len(data):
        try:
            frame = unpack(data, offset, start)
        except ValueError as problem:
            why = str(problem)
            if _acknowledged(data, offset, start):
                raise corrupt(path, start + offset, why) from None
            break
        if stream is None or frame.stream == stream:
            frames.append(frame)
        offset = frame.end - start
    if limit is not None and start + offset < limit:
        raise corrupt(path, start + offset, why)
    return Scan(frames, start + offset, start + max(offset, len(data.rstrip(b"\0"))))


def _acknowledged(data: bytes, bad: int, start: int) -> bool:
    """True if a good frame after `bad` was written in a group that began after it."""
    magic, offset = MAGIC.to_bytes(4, "little"), bad
    while (offset := data.find(magic, offset + 1)) >= 0:
        with contextlib.suppress(ValueError):
            if unpack(data, offset).batch > bad + start:
                return True
    return False


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("????????.seg"))


def limits(folder: Path, since: str = "") -> dict[Path, int | None]:
    """Segments (from the one named `since` on) with the length to which the next vouches for each (None: the last)."""
    paths: list[Path] = [path for path in segments(folder) if path.name >= since]
    found: dict[Path, int | None] = dict.fromkeys(paths)
    for path, after in pairwise(paths):
        first = next(iter(_first(after)), None)
        if first is None:  # the crash came before the newest segment had its header: nothing was ever put in it
            assert after == paths[-1], f"{after} has no header and is not the newest"
            continue
        previous = json.loads(first.header)["previous"]
        if previous[0] != path.name:
            raise corrupt(path, 0, f"{after.name} follows {previous[0]}, which is missing")
        found[path] = previous[1]
    return found


def _first(path: Path) -> Iterator[Frame]:
    with open(path, "rb") as file, contextlib.suppress(ValueError):
        yield unpack(file.read(4096))


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SegmentWriter:
    """Appends frames to the segments of one folder; `append` returns a future that resolves when they are durable.

    One thread writes. While it waits for the disk, records gather; the next group takes them all: there is no timer.
    A failed fsync is fatal for its segment (a second fsync could report success for pages that the kernel has dropped):
    the group is written again, from memory, into a new segment, and if that fails too every waiter gets `LogFailed`.

    `guard` is called in the writer's thread after the fsync with the streams of the group; it returns those that may
    not be acknowledged any more, each with its error (fencing). `sync` exists for the tests of failing disks.
    """

    def __init__(
        self,
        folder: Path,
        size: int = SIZE,
        sync: Callable[[int], None] = os.fdatasync,
        guard: Callable[[set[int]], dict[int, Exception]] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size, self.sync, self.guard = folder, size, sync, guard
        self.groups = 0  # fsyncs so far
        self.queued = self.answered = 0  # records
        self.durable: Place | None = None  # (path, end, 0): how far the newest segment may be read
        self._queue: SimpleQueue[Item | None] = SimpleQueue()
        self._closed = False
        self._fd = -1
        self._path: Path | None = None
        self._offset = 0
        self._room = 0  # bytes of the segment that are reserved
        self._recover()
        self._thread = threading.Thread(target=self._run, name=f"log {folder.name}", daemon=True)
        self._thread.start()

    # The loop's side

    def append(
        self,
        stream: int,
        epoch: int,
        mark: int,
        header: bytes,
        payload: bytes = b"",
        then: Callable[[Place | Exception], None] | None = None,
    ) -> asyncio.Future[Place]:
        """Queues one frame; the future gives its place once it is durable, or LogFull / LogFailed.

        `then` hears the same first, in the loop, even if the future was cancelled: no `shield` is needed around it.
        """
        if self._closed:
            raise LogFailed("the log is closed")
        future = asyncio.get_running_loop().create_future()
        self.queued += 1
        self._queue.put(Item(stream, epoch, mark, header, payload, future, then))
        return future

    async def settled(self) -> None:
        """Returns when all that is queued now has its answer, on the disk or not."""
        queued = self.queued
        while self.answered < queued and not self._closed:
            await asyncio.sleep(0.001)

    def close(self) -> None:
        """Writes what waits, then stops."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # a disk that fails only now has lost nothing
                os.ftruncate(self._fd, self._offset)
            self._abandon()

    # The writer's thread

    def _run(self) -> None:
        item = self._queue.get()
        while item is not None:
            group, size = [item], len(item.header) + len(item.payload)
            while len(group) < GROUP_RECORDS and size < GROUP_BYTES:
                try:
                    item = self._queue.get_nowait()
                except Empty:
                    break
                if item is None:
                    break
                group.append(item)
                size += len(item.header) + len(item.payload)
            try:
                outcome: list[Place] | Exception = self._commit(group)
            except OSError as problem:
                kind = LogFull if problem.errno in NO_ROOM else LogFailed
                outcome = kind(f"the log in {self.folder} could not be written: {problem}")
                logger.error("%s", outcome)
            crash("segment.durable")
            refused = self.guard({entry.stream for entry in group}) if self.guard else {}
            self._answer(group, outcome, refused)
            self.answered += len(group)
            item = item and self._queue.get()

    def _commit(self, group: list[Item]) -> list[Place]:
        """Makes a group durable, in a new segment where the old one is full or has failed; OSError if it cannot."""
        if self._fd < 0 or self._offset >= self.size:
            self._roll()
        try:
            return self._write(group)
        except OSError as problem:
            if problem.errno in NO_ROOM and self._fd >= 0:
                return self._give_up_room(problem)
            logger.error("%s: fsync failed (%s); going on in a new segment", self._path, problem)
            self._abandon()
        self._roll()
        try:
            return self._write(group)
        except OSError:
            self._abandon()
            raise

    def _write(self, group: list[Item]) -> list[Place]:
        batch, places, frames = self._offset, [], []
        offset = batch
        for item in group:
            frame = pack(item.stream, item.epoch, item.mark, item.header, item.payload, batch)
            frames.append(frame)
            places.append(Place(str(self._path), offset, len(frame)))
            offset += len(frame)
        data = b"".join(frames)
        if offset > self._room:
            self._reserve(offset)
        if reached("segment.torn"):
            os.pwrite(self._fd, data[: len(data) // 2], batch)
            die()
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, memoryview(data)[done:], batch + done)
        crash("segment.written")
        try:
            self.sync(self._fd)
        except OSError as problem:  # delayed allocation may say "no room" only here: the pages are lost all the same
            raise OSError(errno.EIO, f"fsync: {problem}") from problem
        self.groups += 1
        self._offset = offset
        self.durable = Place(str(self._path), offset, 0)
        return places

    def _reserve(self, end: int) -> None:
        """Room for a group that ends at `end` and for the next ones; on a disk with less, what is there is used up."""
        room = max(end, min(self._offset + AHEAD, self.size))
        try:
            os.posix_fallocate(self._fd, self._offset, room - self._offset)
            self._room = room
        except OSError as problem:
            if problem.errno not in NO_ROOM:
                raise
            os.ftruncate(self._fd, self._offset)

    def _give_up_room(self, problem: OSError) -> list[Place]:
        """Full disk: take back what was half written, keep the segment, fail the group."""
        os.ftruncate(self._fd, self._offset)
        self._room = self._offset
        raise problem

    def _abandon(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def _answer(
        self,
        group: list[Item],
        outcome: list[Place] | Exception,
        refused: dict[int, Exception],
    ) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Item, Place | Exception]]] = {}
        for index, item in enumerate(group):
            answer = outcome if isinstance(outcome, Exception) else refused.get(item.stream, outcome[index])
            by_loop.setdefault(item.future.get_loop(), []).append((item, answer))
        for loop, answers in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to hear it
                loop.call_soon_threadsafe(_resolve, answers)

    # Files

    def _roll(self) -> None:
        """Opens the next segment, whose first frame vouches for the one before up to its last durable byte."""
        if self._fd >= 0:
            os.ftruncate(self._fd, self._offset)
            self._abandon()
        number = int(self._path.stem) + 1 if self._path else 1
        path = self.folder / f"{number:08d}.seg"
        previous = [self._path.name, self._offset] if self._path else None
        header = json.dumps({"type": "SEGMENT", "version": 1, "previous": previous}).encode()
        fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o600)
        crash("segment.roll")
        try:
            os.pwrite(fd, pack(0, 0, 0, header, b"", 0), 0)
            self.sync(fd)
            sync_folder(self.folder)
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        self._fd, self._path, self._offset = fd, path, HEAD.size + len(header)
        self._room = self._offset
        self.durable = Place(str(path), self._offset, 0)
        crash("segment.rolled")

    def _recover(self) -> None:
        """Finds the newest segment and cuts off what a crash left behind its last good frame."""
        paths = segments(self.folder)
        if paths and scan(paths[-1]).end == 0:  # the crash came while it was being opened
            paths.pop().unlink()
        if not paths:
            return
        self._path = paths[-1]
        frames, self._offset, written = scan(self._path)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        if written > self._offset:
            logger.warning("%s: cut a torn tail of %d bytes", self._path, written - self._offset)
        os.ftruncate(self._fd, self._offset)
        self._room = self._offset
        # The last group may be readable and yet not on the disk (its writer was killed before the fsync, or the fsync
        # failed and left pages that only look clean): write it again.
        group = min(frame.offset for frame in frames if frame.batch == frames[-1].batch)
        os.pwrite(self._fd, os.pread(self._fd, self._offset - group, group), group)
        os.fsync(self._fd)
        self.durable = Place(str(self._path), self._offset, 0)


def _resolve(answers: list[tuple[Item, Place | Exception]]) -> None:
    for item, answer in answers:
        if item.then:
            item.then(answer)
        if item.future.done():  # its waiter was cancelled
            continue
        if isinstance(answer, Exception):
            item.future.set_exception(answer)
            if item.then:
                item.future.exception()  # it has been heard
        else:
            item.future.set_result(answer)
