"""Which frames belong to which branch: an SQLite file beside the segments, made from them and thrown away at will.

One index per Edge covers its own shard and those of the Edges it takes over from. `catch_up` scans only what was added
since the last call, so each byte of log is read once for it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from dsec.trajectory.segment import Frame, LogFull, Place, limits, scan, segments, unpack

TABLES = """
create table if not exists segment (shard text, name text, end integer, primary key (shard, name)) without rowid;
create table if not exists frame (stream integer, shard text, name text, offset integer, length integer,
    epoch integer, mark integer, primary key (stream, shard, name, offset)) without rowid;
create index if not exists of_segment on frame (shard, name);
"""


class Index:
    """Frames by stream, over all shards in `shards`. `own` is the shard of this process, or None for a reader."""

    def __init__(self, shards: Path, own: str | None, file: Path | str = ":memory:") -> None:
        self.shards, self.own = shards, own
        self._since: dict[str, str] = {}
        try:
            self.database = _open(file)
        except sqlite3.OperationalError as problem:
            raise LogFull(f"the index of the log could not be opened: {problem}") from problem
        except sqlite3.DatabaseError:  # damaged: it says nothing that the segments do not say
            for part in Path(file).parent.glob(f"{Path(file).name}*"):
                part.unlink()
            self.database = _open(file)
        for folder in self._folders():  # the newest segments may have been cut since: look at them again
            for path in segments(folder)[-1:]:
                self._forget(folder.name, path.name)

    def close(self) -> None:
        self.database.close()

    def catch_up(self, durable: Place | None = None) -> dict[str, list[str | int]]:
        """Takes in what was added; returns {shard: [segment, end]} for the shards of others.

        `durable` is how far this process's own log may be read: (path, end, 0). Frames of others are synced before they
        are believed, because what this process acknowledges on their strength must stay.
        """
        seen: dict[str, list[str | int]] = {}
        known = {(shard, name): end for shard, name, end in self.database.execute("select * from segment")}
        for folder in self._folders():
            for name in {name for shard, name in known if shard == folder.name and not (folder / name).exists()}:
                self._forget(folder.name, name)  # compacted
            for path, limit in limits(folder, self._since.get(folder.name, "")).items():
                if folder.name == self.own:
                    if durable and str(path) == durable.path:
                        limit = durable.offset
                    elif limit is None:  # being opened this moment
                        continue
                elif limit is None and self.own is not None:
                    _sync(path)
                end = known.get((folder.name, path.name), 0)
                if limit is not None and end > limit:  # it ended in a group that was never acknowledged
                    self._forget(folder.name, path.name)
                    end = 0
                if end != limit:
                    end = self._take(folder.name, path, limit, end)
                if folder.name != self.own:
                    seen[folder.name] = [path.name, end]
                self._since[folder.name] = path.name  # those before it will not change any more
        return seen

    def frames(self, stream: int) -> list[tuple[str, Place, int, int]]:
        """(shard, place, epoch, mark) of every frame of a branch, in the order of each shard."""
        rows = self.database.execute(
            "select shard, name, offset, length, epoch, mark from frame where stream = ? order by shard, name, offset",
            (_signed(stream),),
        )
        return [
            (shard, Place(f"{self.shards}/{shard}/{name}", offset, length), epoch, mark)
            for shard, name, offset, length, epoch, mark in rows
        ]

    def newest(self, stream: int) -> int:
        """The highest epoch that any frame of a branch has, deleted ones included; 0 if there is none."""
        (found,) = self.database.execute("select max(epoch) from frame where stream = ?", (_signed(stream),)).fetchone()
        return found or 0

    def within(self, shard: str, name: str) -> list[tuple[int, int]]:
        """(branch, bytes) of all that have frames in a segment."""
        rows = self.database.execute(
            "select stream, sum(length) from frame where shard = ? and name = ? group by stream", (shard, name)
        )
        return [(stream & 0xFFFF_FFFF_FFFF_FFFF, length) for stream, length in rows]

    def shards_of(self, stream: int) -> set[str]:
        return {
            name
            for (name,) in self.database.execute(
                "select distinct shard from frame where stream = ?", (_signed(stream),)
            )
        }

    def streams(self) -> list[int]:
        rows = self.database.execute("select distinct stream from frame")
        return [stream & 0xFFFF_FFFF_FFFF_FFFF for (stream,) in rows]

    def _folders(self) -> list[Path]:
        return sorted(folder for folder in self.shards.iterdir() if folder.is_dir())

    def _take(self, shard: str, path: Path, limit: int | None, start: int) -> int:
        found = scan(path, limit, start)
        rows = [
            (_signed(frame.stream), shard, path.name, frame.offset, frame.end - frame.offset, frame.epoch, frame.mark)
            for outer in found.frames
            if outer.stream
            for frame in unfold(outer)
        ]
        try:
            with self.database:
                self.database.execute("begin")
                self.database.executemany("insert or replace into frame values (?, ?, ?, ?, ?, ?, ?)", rows)
                self.database.execute("insert or replace into segment values (?, ?, ?)", (shard, path.name, found.end))
        except sqlite3.OperationalError as problem:
            raise LogFull(f"the index of the log could not be written: {problem}") from problem
        return found.end

    def _forget(self, shard: str, name: str) -> None:
        self.database.execute("delete from frame where shard = ? and name = ?", (shard, name))
        self.database.execute("delete from segment where shard = ? and name = ?", (shard, name))


MOVED = 10  # its position in log.KINDS


def unfold(frame: Frame) -> Iterator[Frame]:
    """A frame, and for a MOVED the frames inside it, at their own places in the file."""
    yield frame
    if frame.mark & 15 == MOVED:
        offset, start = 0, frame.end - len(frame.payload)
        while offset < len(frame.payload):
            inner = unpack(frame.payload, offset, start)
            yield inner
            offset = inner.end - start


def _open(file: Path | str) -> sqlite3.Connection:
    """One process uses it (locking_mode), so it also works where SQLite's shared memory does not (NFS)."""
    database = sqlite3.connect(file, isolation_level=None)
    pragmas = "pragma locking_mode=exclusive; pragma journal_mode=wal; pragma synchronous=normal;"
    database.executescript(pragmas + TABLES)
    return database


def _signed(stream: int) -> int:
    return stream - (1 << 64) if stream >> 63 else stream


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
