"""The log of one Edge: many trajectories interleaved in one append-only file, so that they share each fsync.

    folder/secret               what digests of secret values are keyed with
    folder/blobs/aa/<sha256>    long outputs
    folder/epochs/<stream>/<n>  who may write a branch: the highest number
    folder/shards/<edge>/*.seg  one append-only log per Edge; every Edge that sees the folder reads them all

Epochs fence. Opening a branch takes the next epoch by creating its file (exclusively: one of two contenders wins), then
reads the log. A writer looks for a newer epoch *after* each fsync and before it acknowledges: either its record was on
disk before the newcomer read (who then sees it), or it sees the newcomer (and raises Fenced). Readers ignore what an
older epoch wrote after that point. This is exact on one machine and on file systems that keep directories coherent;
across others, the cluster's database hands out the epochs (`open(epoch=...)`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsec.errors import Fenced, NotFound
from dsec.trajectory import key as keys
from dsec.trajectory.blobs import Blobs
from dsec.trajectory.failpoint import crash
from dsec.trajectory.index import Index
from dsec.trajectory.segment import SIZE, LogFailed, Place, SegmentWriter, corrupt, unpack

if TYPE_CHECKING:
    from dsec.trajectory.replay import Trajectory

Durability = Literal["begin+end", "end", "async"]
INLINE = 64 << 10  # bytes of output kept in the record itself; longer ones become blobs
KINDS = ("OPEN", "BEGIN", "END", "ABORT", "SNAP", "FORK", "CUT", "NOTE", "CLOSE", "DELETE", "MOVED")
"""A record's position here is the low four bits of its frame's mark. DELETE: what older epochs wrote is no more. MOVED
holds all earlier frames of its branch (dsec/trajectory/retention.py)."""
decode = json.JSONDecoder().decode
PLAIN = 1 << 10  # characters of text kept in the record's JSON


@dataclass(slots=True)
class Entry:
    """One step of a branch: what was asked, and where its end lies if it has one."""

    key: str
    kind: str
    owner: str  # the branch it was recorded in
    idempotent: bool
    begun: Place | None = None
    ended: Place | None = None
    attempt: int = 1
    aborted: bool = False  # it is known not to have happened
    running: asyncio.Future[Any] | None = None  # set while this process runs it


@dataclass(frozen=True)
class Snapshot:
    """A state of the sandbox's files in which exactly the first `step` steps have happened."""

    step: int
    marker: Any


@dataclass(eq=False)
class Branch:
    """What is known of one branch; shared by all handles on it in this process."""

    trajectory: str
    name: str
    identity: dict[str, Any] = field(default_factory=dict)
    image: str = ""
    seeds: Any = None
    parent: tuple[str, int] | None = None
    """(branch, step): the steps before it are the parent's."""
    entries: list[Entry] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    children: list[tuple[str, int]] = field(default_factory=list)
    stream: int = 0
    epoch: int = 0
    seen: dict[str, Any] = field(default_factory=dict)
    """How far the shards of others had been read when this branch was loaded."""
    closed: bool = False
    ignored: int = 0
    """Records of fenced writers."""
    running: int = 0
    """Steps that this process runs now."""
    broken: BaseException | None = None
    """Why memory and disk may disagree; the next open reads the disk."""

    def __post_init__(self) -> None:
        self.stream = keys.stream_of(self.trajectory, self.name)


class Records:
    """Reads records from their places."""

    blobs: Blobs
    index: Index

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def read(self, place: Place) -> tuple[dict[str, Any], bytes]:
        """The record at `place`: (header, payload); LogCorrupt if it cannot be read."""
        fd = self._files.get(place.path)
        if fd is None:
            if len(self._files) >= 64:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                fd = self._files[place.path] = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise NotFound(f"{place.path} has been compacted meanwhile: read again") from None
        data = os.pread(fd, place.length, place.offset)
        try:
            frame = unpack(data)
        except ValueError as problem:
            raise corrupt(Path(place.path), place.offset, str(problem)) from None
        return decode(frame.header.decode()), frame.payload

    def decode_result(self, header: Mapping[str, Any], payload: bytes) -> dict[str, Any]:
        result, offset = dict(header["result"]), 0
        for name, length, text, blob in header["parts"]:
            if blob is None:
                data = payload[offset : offset + length]
                offset += length
            else:
                data = self.blobs.get(blob)
            result[name] = data.decode("utf-8", "surrogatepass") if text else data
        return result

    def forget(self, path: str) -> None:
        """Closes a segment that goes away."""
        if (fd := self._files.pop(path, None)) is not None:
            os.close(fd)

    def close(self) -> None:
        self.index.close()
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


class TrajectoryLog(Records):
    """Opens trajectories for one Edge. All methods belong to one event loop; the disk has a thread of its own.

    `shard` names this Edge's own file; Fenced if another process holds it. `redact` is applied to arguments and results
    (dicts) before they are written: what it takes out is not there at replay either. `normalise` is applied to two
    results of the same step before they are compared (clocks, process ids).
    """

    def __init__(
        self,
        folder: Path,
        shard: str = "local",
        *,
        segment_size: int = SIZE,
        durability: Durability = "begin+end",
        redact: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        normalise: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        sync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        super().__init__()
        self.folder, self.shard, self.durability, self.redact = folder, shard, durability, redact
        self.normalise = normalise or dict
        own = folder / "shards" / shard
        own.mkdir(parents=True, exist_ok=True)
        self._lock = open(own / "lock", "w")  # noqa: SIM115 - held as long as the log
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise Fenced(f"another process writes the log in {own}") from None
        self.branches: dict[int, Branch] = {}
        self.written: set[int] | None = None
        """While a compaction runs: branches that have had a record since it began to look (retention.py)."""
        self.tending = asyncio.Lock()
        """Held by whoever reads the whole log or drops segments of it."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.close)
            self.secret = _secret(folder)
            self.blobs = Blobs(folder / "blobs")
            self.writer = SegmentWriter(own, segment_size, sync, self._refused)
            undo.callback(self.writer.close)
            self.index = Index(folder / "shards", shard, folder / "shards" / f"{shard}.index")
            undo.pop_all()

    async def open(
        self,
        trajectory: str,
        spec: Any,
        branch: str = "main",
        epoch: int | None = None,
        *,
        image_digest: str = "",
        seeds: Any = None,
        on_divergence: Literal["raise", "branch", "truncate"] = "raise",
    ) -> Trajectory:
        """A handle at step 0 of a branch, new or resumed; every earlier handle on it is fenced from now on.

        `spec` is a Spec or its dict. `epoch` comes from a lease; None takes the next one. Fenced if a newer one is out.
        """
        identity = keys.identity(spec if isinstance(spec, Mapping) else spec.stated(), self.secret)
        return await self.resume(Branch(trajectory, branch, identity, image_digest, seeds), epoch, on_divergence)

    async def resume(self, wanted: Branch, epoch: int | None, on_divergence: str) -> Trajectory:
        """Takes over the branch that the log has under `wanted`'s name, or starts `wanted`."""
        found = self._live(wanted.stream)
        taken = self.take_epoch(wanted.stream, epoch, found.epoch if found else 0)
        crash("log.epoch")
        if found is None:  # what an older writer acknowledged must be seen: read after taking the epoch
            found = self._load(wanted.trajectory, wanted.name)
            if (recorded := self.index.newest(wanted.stream)) >= taken:  # the folder of epochs was lost, the log not
                taken = self.take_epoch(wanted.stream, epoch, recorded)
            if found is None and taken > 1 and (quarantine := self.folder / "quarantine").exists():
                raise corrupt(quarantine, 0, f"the records of {wanted.trajectory!r}@{wanted.name} may be in it")
        image = wanted.image if found is None or found.image else ""  # recorded without one: nothing to compare with
        return await self.adopt(found or wanted, taken, wanted.identity, image, on_divergence)

    async def adopt(self, branch: Branch, epoch: int, identity: Any, image: str, on_divergence: str) -> Trajectory:
        """Makes this process the writer of `branch` under `epoch` (which it has taken) and says so in the log."""
        from dsec.trajectory.replay import Trajectory

        self.branches[branch.stream] = branch
        branch.epoch = epoch
        handle = Trajectory(self, branch, epoch, identity, image, on_divergence)
        fields = {"spec": identity, "image": image, "seeds": branch.seeds, "parent": branch.parent, "seen": branch.seen}
        await self.append(branch, "OPEN", time=time.time(), **fields)
        return handle

    def append(
        self,
        branch: Branch,
        type: str,
        payload: bytes = b"",
        then: Callable[[Place | Exception], None] | None = None,
        **fields: Any,
    ) -> asyncio.Future[Place]:
        """Queues a record; the future gives its place once it is durable, or LogFull, LogFailed, Fenced. `then` hears
        the same before, even if the future is cancelled."""
        record = {"type": type, "trajectory": branch.trajectory, "branch": branch.name, "epoch": branch.epoch, **fields}
        header = keys.encode(record).encode("utf-8", "surrogatepass")
        mark = KINDS.index(type) | fields.get("step", 0) << 4
        if self.written is not None:
            self.written.add(branch.stream)
        return self.writer.append(branch.stream, branch.epoch, mark, header, payload, then)

    # Results: JSON values in the header, bytes and long text as parts behind it or as blobs

    async def encode_result(self, result: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """(fields, payload) of an END; blobs are durable when this returns."""
        plain, parts, payload = {}, [], []
        for name, value in (self.redact(dict(result)) if self.redact else result).items():
            text = isinstance(value, str) and len(value) > PLAIN
            if not text and not isinstance(value, bytes | bytearray | memoryview):
                plain[name] = value
                continue
            data = value.encode("utf-8", "surrogatepass") if text else bytes(value)
            blob = await asyncio.to_thread(self.blobs.put, data) if len(data) > INLINE else None
            parts.append([name, len(data), text, blob])
            if blob is None:
                payload.append(data)
        return {"result": plain, "parts": parts}, b"".join(payload)

    # Loading

    def _live(self, stream: int) -> Branch | None:
        branch = self.branches.get(stream)
        return None if branch is None or branch.broken else branch

    def _load(self, trajectory: str, branch: str) -> Branch | None:
        ends = self.index.catch_up(self.writer.durable)
        found = load(self, trajectory, branch)
        if found:
            shards = self.index.shards_of(found.stream)
            found.seen = {shard: end for shard, end in ends.items() if shard in shards}
        return found

    def find(self, trajectory: str, branch: str = "main") -> Branch | None:
        """What the log knows of a branch, or None."""
        return self._live(keys.stream_of(trajectory, branch)) or self._load(trajectory, branch)

    # Epochs

    def _epochs(self, stream: int) -> Path:
        return self.folder / "epochs" / f"{stream:016x}"

    def newest_epoch(self, stream: int) -> int:
        try:
            return max((int(name) for name in os.listdir(self._epochs(stream))), default=0)
        except FileNotFoundError:
            return 0

    def take_epoch(self, stream: int, wanted: int | None, recorded: int) -> int:
        folder = self._epochs(stream)
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            newest = max(self.newest_epoch(stream), recorded)
            epoch = newest + 1 if wanted is None else wanted
            if epoch <= newest:
                raise Fenced(f"epoch {epoch} is over, {newest} has been given out", epoch=epoch, newest=newest)
            try:
                os.close(os.open(folder / str(epoch), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                continue
            for name in os.listdir(folder):
                if int(name) < epoch:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(folder / name)
            return epoch

    def _refused(self, streams: set[int]) -> dict[int, Exception]:
        """Called by the writer between fsync and acknowledgement: the branches that another Edge has taken over."""
        # A newcomer makes its shard before it takes an epoch. Most file systems count a folder's folders (and two).
        shards = f"{self.folder}/shards"
        if os.stat(shards).st_nlink == 3 or sum(entry.is_dir() for entry in os.scandir(shards)) == 1:
            return {}
        refused: dict[int, Exception] = {}
        for stream in streams - {0}:
            branch = self.branches.get(stream)
            if branch and (newest := self.newest_epoch(stream)) > branch.epoch:
                refused[stream] = Fenced(
                    f"{branch.trajectory}/{branch.name}: epoch {newest} has taken over from {branch.epoch}",
                    epoch=branch.epoch,
                    newest=newest,
                )
        return refused

    def close(self) -> None:
        """Makes everything queued durable and lets another process have the shard."""
        self.writer.close()
        super().close()
        self._lock.close()


def quarantine(folder: Path, shard: str) -> Path:
    """Puts a damaged shard aside, whole, so that its Edge can start again; returns where it went.

    Branches that were ever opened here and are now unknown stay closed (LogCorrupt): to start them anew would run their
    commands a second time. Fenced while a process writes the shard.
    """
    source = folder / "shards" / shard
    if not source.is_dir():
        raise NotFound(f"{folder} has no shard {shard!r}")
    with open(source / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Fenced(f"a process writes the log in {source}") from None
        target = folder / "quarantine" / f"{shard}.{int(time.time())}"
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        for index in (folder / "shards").glob(f"{shard}.index*"):
            index.unlink()
    return target


class LogReader(Records):
    """Reads a log that another process may be writing, for `dsec log`; changes nothing."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "shards").is_dir():
            raise NotFound(f"{folder} holds no trajectory log")
        super().__init__()
        self.folder = folder
        self.blobs = Blobs(folder / "blobs")
        self.index = Index(folder / "shards", None)
        self.index.catch_up()

    def branch(self, trajectory: str, branch: str = "main") -> Branch:
        """What the log knows of a branch; NotFound if nothing."""
        found = load(self, trajectory, branch)
        if found is None:
            raise NotFound(f"the log has no trajectory {trajectory!r} with a branch {branch!r}")
        return found

    def names(self) -> list[tuple[str, str]]:
        """(trajectory, branch) of everything in the log."""
        return sorted(names(self))


def names(log: Records) -> Iterator[tuple[str, str]]:
    """(trajectory, branch) of everything in a log that has not been deleted."""
    for stream in log.index.streams():
        if rows := undeleted(log.index.frames(stream)):
            first = log.read(rows[0][1])[0]
            yield first["trajectory"], first["branch"]


def undeleted(rows: list[Row]) -> list[Row]:
    """Without what was deleted, and without frames of which a later MOVED has a copy."""
    gone = max((epoch for _, _, epoch, mark in rows if KINDS[mark & 15] == "DELETE"), default=0)
    moved = {shard: place for shard, place, _, mark in rows if KINDS[mark & 15] == "MOVED"}  # the last one of each

    def copied(shard: str, place: Place) -> bool:
        at = moved.get(shard)
        return at is not None and (Path(place.path).name, place.offset) <= (Path(at.path).name, at.offset)

    return [row for row in rows if row[2] > gone and not copied(row[0], row[1])]


Row = tuple[str, Place, int, int]  # shard, place, epoch, mark
Record = tuple[str, int, int, Place]  # kind, step, epoch, place


def records(log: Records, trajectory: str, branch: str) -> tuple[list[Record], int]:
    """The records of a branch in order, and how many of fenced writers were left out.

    A record counts unless a newer epoch was opened before it: in the same shard, by position; in another shard, by what
    the newer OPEN says it had seen of this one.
    """
    found = undeleted(log.index.frames(keys.stream_of(trajectory, branch)))
    opens = [(shard, place, epoch) for shard, place, epoch, mark in found if KINDS[mark & 15] == "OPEN"]
    if len(opens) == 1:
        return [(KINDS[mark & 15], mark >> 4, epoch, place) for _, place, epoch, mark in found], 0
    seen = {place: log.read(place)[0]["seen"] for _, place, _ in opens}
    kept: list[Record] = []
    for shard, place, epoch, mark in found:
        position = (Path(place.path).name, place.offset)
        for other_shard, other, newer in opens:
            end = (Path(other.path).name, other.offset)
            if other_shard != shard and newer > epoch:
                end = tuple(seen[other].get(shard, ("", 0)))
            if newer > epoch and position >= end:
                break
        else:
            kept.append((KINDS[mark & 15], mark >> 4, epoch, place))
    kept.sort(key=lambda record: record[2])  # stable: within an epoch, the order of its shard
    return kept, len(found) - len(kept)


def load(log: Records, trajectory: str, name: str) -> Branch | None:
    """Folds the records of a branch (and of the parents it was forked from) into what is known of it."""
    kept, ignored = records(log, trajectory, name)
    if not kept:
        return None
    branch = Branch(trajectory, name, ignored=ignored)
    for kind, step, epoch, place in kept:
        branch.epoch = max(branch.epoch, epoch)
        if kind == "END":  # read when it is replayed
            branch.entries[step].ended = place
            continue
        record, _ = log.read(place)
        if kind == "OPEN" and not branch.identity:
            branch.identity, branch.image, branch.seeds = record["spec"], record["image"], record["seeds"]
            if record["parent"]:
                _inherit(log, branch, record["parent"], place)
        elif kind == "BEGIN":
            if step > len(branch.entries):
                raise corrupt(Path(place.path), place.offset, f"step {step} follows {len(branch.entries) - 1}")
            entry = Entry(record["key"], record["kind"], name, record["idempotent"], place, attempt=record["attempt"])
            branch.entries[step : step + 1] = [entry]
        elif kind == "ABORT":
            branch.entries[step].aborted = True
        elif kind == "SNAP":
            branch.snapshots.append(Snapshot(step, record["marker"]))
        elif kind == "FORK":
            branch.children.append((record["child"], step))
        elif kind == "CUT":
            del branch.entries[step:]
            branch.snapshots = [snapshot for snapshot in branch.snapshots if snapshot.step <= step]
        elif kind == "CLOSE":
            branch.closed = True
    return branch


def _inherit(log: Records, branch: Branch, parent: list[Any], place: Place) -> None:
    name, at = parent
    older = load(log, branch.trajectory, name)
    if older is None or len(older.entries) < at:
        raise corrupt(Path(place.path), place.offset, f"forked from {name!r} at step {at}, which is not there")
    branch.parent = (name, at)
    branch.entries = older.entries[:at]
    branch.snapshots = [snapshot for snapshot in older.snapshots if snapshot.step <= at]


def _secret(folder: Path) -> bytes:
    """32 random bytes of this log's own, made once; the file is complete before it has its name."""
    path = folder / "secret"
    with contextlib.suppress(FileExistsError):
        if not path.exists():
            new = folder / f"secret.{os.getpid()}"
            with open(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(new, path)
            finally:
                os.unlink(new)
    data = path.read_bytes()
    if len(data) != 32:
        raise LogFailed(f"{path} holds {len(data)} bytes instead of 32")
    return data
