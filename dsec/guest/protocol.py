"""The host's end of the agent's wire: one byte stream, many commands at once, nothing from the guest believed.

A frame is u32 length of the rest (little-endian, 5 .. 1 MiB), u8 kind, u32 id, payload. `fields` are a flat list of
key NUL value NUL, so that neither side needs a parser that could be fooled. Host to guest:

    X exec: arg* or shell or watch=1 (2: folders below too; watch.h), env*, cwd, uid, gid, step, limit, stdin=1,
      tty=rows cols    x the first part of a long X    B send again what is kept of id
    I stdin    C close stdin    K kill id and all it started
    S signal (u8; id 0: every process)    R resize (u16 rows, u16 columns)
    Z forget id    P ping    Q journal
    r read: path offset size    w write: u16 length, (path mode append make), bytes    l list: path    s stat: path
    d delete: path    m rename: path to    k make folder: path (each of the six also: uid gid, whose permissions count)
    N T t e c a: streams of bytes (streams.py)

Guest to host: H hello (version), O stdout, E stderr, i (u32: bytes of stdin read), D done (code signal seconds out err:
bytes dropped), F refused (errno, text), p pong, J journal (records that begin with id), A answer of a file operation,
o t e c a: streams.

The agent keeps the exit and the capped output of every command until Z, so a host process that died and came back
asks Q, then B for what it wants. The newest connection wins; an older one is closed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dsec.errors import DsecError, InvalidRequest, NotFound, SandboxFailed, Timeout
from dsec.guest.streams import KINDS, Streams
from dsec.types import EntryInfo

VERSION, OLDEST = 3, 2
"""Of the wire, and what this host still speaks, because containers outlive their Edge; of snapshots of machines, which
hold agents too, only this very version is taken. An agent of version 2 knows neither users of file operations nor
commands longer than a frame."""
MAX_EXEC = 4 << 20
"""Bytes of a command and its environment."""
Owner = tuple[int, int]
"""uid and gid of whom a file operation is for."""
MAX_FRAME = 1 << 20
CHUNK = 512 * 1024
"""Bytes a read or write moves per frame."""
WINDOW, PIECE = 1 << 18, 1 << 16
"""Bytes of a command's standard input that may be under way, and those of one frame."""
OUTPUT_LIMIT = 1 << 20
"""Default cap of each output stream, half of it head and half tail."""
MAGIC = b"\x93dsec\x1fopen\xe7\x0a\x5b\xc2\x80\0"
"""Opens a session on a serial line, where nothing else tells one connection from the next; the agent echoes it."""
_HEAD = struct.Struct("<IBI")

Output = Callable[[bytes, bytes], None]
"""Called with b"O" or b"E" and the bytes."""


def frame(kind: bytes, id: int, payload: bytes = b"") -> bytes:
    """The bytes of one frame."""
    assert len(payload) + 5 <= MAX_FRAME, f"{len(payload)} bytes do not fit a frame"
    return _HEAD.pack(len(payload) + 5, kind[0], id) + payload


def fields(pairs: Iterable[tuple[str, object]]) -> bytes:
    """Key NUL value NUL ...; a NUL inside a value cannot be expressed and is refused."""
    out = []
    for key, value in pairs:
        data = value if isinstance(value, bytes) else os.fsencode(str(value))
        if b"\0" in data:
            raise InvalidRequest(f"{key} must not contain a NUL byte: {data[:80]!r}")
        out += [key.encode(), b"\0", data, b"\0"]
    return b"".join(out)


def parse(payload: bytes) -> list[tuple[str, str]]:
    """The inverse of `fields`; raises SandboxFailed when the guest sent something else."""
    parts = payload.split(b"\0")
    if parts.pop() or len(parts) % 2:
        raise SandboxFailed(f"the agent sent malformed fields: {payload[:80]!r}")
    text = [os.fsdecode(part) for part in parts]
    return list(zip(text[::2], text[1::2], strict=True))


def _number(values: dict[str, str], key: str) -> float:
    try:
        number = float(values[key])
    except (KeyError, ValueError):
        raise SandboxFailed(f"the agent sent no number as {key}: {values!r:.200}") from None
    if not -(2**63) <= number < 2**63:
        raise SandboxFailed(f"the agent sent {key}={number}")
    return number


class Frames:
    """Cuts a byte stream into (kind, id, payload); a length out of range raises SandboxFailed."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, int, bytes]]:
        buffer, found, at = self._buffer, [], 0
        buffer += data
        while len(buffer) - at >= 9:
            length, kind, id = _HEAD.unpack_from(buffer, at)
            if not 5 <= length <= MAX_FRAME:
                raise SandboxFailed(f"a frame of {length} bytes (5 to {MAX_FRAME} allowed)")
            if len(buffer) - at < 4 + length:
                break
            found.append((bytes((kind,)), id, bytes(buffer[at + 9 : at + 4 + length])))
            at += 4 + length
        del buffer[:at]
        return found


@dataclass(frozen=True)
class Exit:
    """How a command ended. `code` is 128 + signal when a signal ended it; dropped counts bytes past the cap."""

    code: int
    seconds: float
    dropped_out: int = 0
    dropped_err: int = 0


@dataclass(frozen=True)
class Entry:
    """One line of the agent's exit journal."""

    id: int
    step: int
    pid: int
    exit: Exit | None
    """None while it runs."""


class Process:
    """A command in a sandbox: its output goes to `on_output`, `done` ends with its Exit or an error."""

    def __init__(self, agent: Agent, id: int, limit: int, on_output: Output) -> None:
        self.id = id
        self.done: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting
        self._agent, self._on_output = agent, on_output
        self._room = {b"O": limit + 64, b"E": limit + 64}
        self._under_way = 0
        self._taken = asyncio.Event()
        self.done.add_done_callback(lambda done: self._taken.set())

    def send(self, data: bytes) -> None:
        """Bytes for its standard input."""
        for at in range(0, len(data), CHUNK):
            self._agent.send(b"I", self.id, data[at : at + CHUNK])

    async def feed(self, data: bytes) -> None:
        """The same for any amount: never more than WINDOW that the command has not read. Returns when all is sent, or
        the command has ended; raises SandboxFailed when the connection has."""
        view = memoryview(data)
        while view and not self.done.done():
            if self._under_way >= WINDOW:
                self._taken.clear()
                await self._taken.wait()
                continue
            piece, view = view[:PIECE], view[PIECE:]
            self._under_way += len(piece)
            self._agent.send(b"I", self.id, bytes(piece))

    def _took(self, payload: bytes) -> None:
        if len(payload) != 4:
            raise SandboxFailed(f"an acknowledgement of {len(payload)} bytes")
        self._under_way = max(0, self._under_way - int.from_bytes(payload, "little"))
        self._taken.set()

    def close_stdin(self) -> None:
        self._agent.send(b"C", self.id)

    def signal(self, number: int) -> None:
        """To the command's whole process group."""
        self._agent.send(b"S", self.id, bytes((number,)))

    def kill(self) -> None:
        """SIGKILL to all that it started, also what left its process group or session; other commands go on."""
        self._agent.send(b"K", self.id)

    def resize(self, rows: int, columns: int) -> None:
        self._agent.send(b"R", self.id, struct.pack("<HH", rows, columns))

    def forget(self) -> None:
        """Lets the agent drop what it keeps of a finished command."""
        self._agent.send(b"Z", self.id)

    def _output(self, kind: bytes, data: bytes) -> None:
        self._room[kind] -= len(data)
        if self._room[kind] < 0:
            raise SandboxFailed("the agent sent more output than its cap")
        self._on_output(kind, data)


class Agent(asyncio.Protocol):
    """The agent at the other end of a stream. `failed` ends, with the reason, when the connection does."""

    def __init__(self, serial: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self._hunt = bytearray() if serial else None
        self.failed: asyncio.Future[str] = loop.create_future()
        self.hello: asyncio.Future[int] = loop.create_future()
        self._frames = Frames()
        self._processes: dict[int, Process] = {}
        self._answers: dict[int, asyncio.Future[tuple[bytes, bytes]]] = {}
        self._next = 0
        self.streams = Streams(self)
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, path: Path | str, timeout: float = 10.0, serial: bool = False) -> Agent:
        """Connects to the unix socket; frames may be sent before the guest has woken up. Raises SandboxFailed.

        `serial`: a machine's port is behind the socket, so what an earlier connection left on the line is skipped.
        """
        try:
            async with asyncio.timeout(timeout):
                _, agent = await asyncio.get_running_loop().create_unix_connection(lambda: cls(serial), str(path))
        except (OSError, TimeoutError) as error:
            raise SandboxFailed(f"cannot reach the agent at {path}: {error!r}") from None
        return agent

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by descent
        if self._hunt is not None:
            self._transport.write(MAGIC)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection to the agent ended{f': {error}' if error else ''}")

    def data_received(self, data: bytes) -> None:
        if self._hunt is not None:
            self._hunt += data
            _, magic, data = bytes(self._hunt).rpartition(MAGIC)
            if not magic:
                del self._hunt[: -len(MAGIC)]
                return
            self._hunt = None
        try:
            for kind, id, payload in self._frames.feed(data):
                self._take(kind, id, payload)
        except DsecError as error:
            self._fail(error.message)

    def _take(self, kind: bytes, id: int, payload: bytes) -> None:
        if kind in (b"O", b"E") and id in self._processes:
            self._processes[id]._output(kind, payload)
        elif kind == b"i":
            if id in self._processes:
                self._processes[id]._took(payload)
        elif kind == b"D" and id in self._processes:
            result = _exit(dict(parse(payload)))
            done = self._processes.pop(id).done
            if not done.done():
                done.set_result(result)
        elif kind == b"F" and id in self._processes:
            refusal = _refused(payload)
            done = self._processes.pop(id).done
            if not done.done():
                done.set_exception(refusal)
        elif kind in (b"A", b"F", b"J", b"p") and id in self._answers:
            answer = self._answers.pop(id)
            if not answer.done():
                answer.set_result((kind, payload))
        elif kind in KINDS:
            self.streams.take(kind, id, payload)
        elif kind == b"H" and not self.hello.done():
            version = int(_number(dict(parse(payload)), "version"))
            if not OLDEST <= version <= VERSION:
                raise SandboxFailed(f"the agent speaks version {version}, the host {OLDEST} to {VERSION}")
            self.hello.set_result(version)
        else:
            raise SandboxFailed(f"an unexpected frame: kind {kind!r}, id {id}")

    def _fail(self, reason: str) -> None:
        if not self.failed.done():
            self.failed.set_result(reason)
        self._writable.set()
        for process in self._processes.values():
            if not process.done.done():
                process.done.set_exception(SandboxFailed(reason))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(SandboxFailed(reason))
        if not self.hello.done():
            self.hello.cancel()
        self._processes.clear()
        self._answers.clear()
        self.streams.over()
        if self._transport is not None:
            self._transport.abort()

    # what callers use

    def close(self) -> None:
        """Drops the connection; commands in the sandbox go on."""
        self._fail("closed by the host")

    def send(self, kind: bytes, id: int, payload: bytes = b"") -> None:
        if self.failed.done() or self._transport is None:
            raise SandboxFailed(self.failed.result() if self.failed.done() else "not connected")
        self._transport.write(frame(kind, id, payload))

    async def drained(self) -> None:
        """Waits until the guest has taken enough of what was sent that more may follow."""
        await self._writable.wait()

    def exec(
        self,
        command: str | list[str],
        on_output: Output,
        *,
        cwd: str = "",
        env: dict[str, str] | None = None,
        uid: int = 0,
        gid: int = 0,
        tty: tuple[int, int] | None = None,
        stdin: bool = False,
        step: int = 0,
        limit: int = OUTPUT_LIMIT,
        watch: int = 0,
    ) -> Process:
        """Starts a command: a list is an argv, a string goes to the sandbox's shell. `limit` caps each stream's bytes.
        `watch`: no command (an empty list), but what changes in cwd (2: and below it), as watch.h tells it.

        Returns at once; a command that cannot start ends `done` with an error.
        """
        given = [("shell", command)] if isinstance(command, str) else [("arg", arg) for arg in command]
        given += [("env", f"{key}={value}") for key, value in (env or {}).items()]
        given += [("cwd", cwd)] if cwd else []
        given += [("watch", str(watch))] if watch else []
        given += [("tty", f"{tty[0]} {tty[1]}")] if tty else []
        numbers = [("uid", uid), ("gid", gid), ("stdin", int(stdin)), ("step", step), ("limit", limit)]
        payload = fields([*given, *numbers])
        if len(payload) > MAX_EXEC:
            raise InvalidRequest(f"command and environment are {len(payload)} bytes, at most {MAX_EXEC} fit")
        if len(payload) > MAX_FRAME - 5:
            self._young("commands of more than 1 MiB")
        process = self._watch(self.new_id(), limit, on_output)
        try:
            *first, last = range(0, len(payload), MAX_FRAME - 5)
            for at in first:
                self.send(b"x", process.id, payload[at : at + MAX_FRAME - 5])
            self.send(b"X", process.id, payload[last:])
        except SandboxFailed:
            del self._processes[process.id]
            raise
        return process

    def attach(self, id: int, on_output: Output, limit: int = OUTPUT_LIMIT) -> Process:
        """The command `id` of an earlier connection: its kept output again from the start, then what follows."""
        process = self._watch(id, limit, on_output)
        self.send(b"B", id)
        return process

    async def journal(self) -> list[Entry]:
        """Every command the agent has not been told to forget; also moves this connection's ids past theirs."""
        payload = await self.ask(b"Q", b"")
        records: list[dict[str, str]] = []
        for key, value in parse(payload):
            if key == "id":
                records.append({})
            if not records:
                raise SandboxFailed("the agent's journal does not begin with an id")
            records[-1][key] = value
        entries = []
        for record in records:
            id, step, pid = (int(_number(record, key)) for key in ("id", "step", "pid"))
            entries.append(Entry(id, step, pid, _exit(record) if "code" in record else None))
        self._next = max([self._next, *(entry.id for entry in entries)])
        return entries

    async def ping(self, timeout: float = 5.0) -> None:
        """Raises Timeout when the agent does not answer."""
        try:
            async with asyncio.timeout(timeout):
                await self.ask(b"P", b"")
        except TimeoutError:
            raise Timeout(f"the agent did not answer within {timeout} s") from None

    def signal_all(self, number: int) -> None:
        """A signal to every process of the sandbox except the agent."""
        self.send(b"S", 0, bytes((number,)))

    def _young(self, what: str) -> None:
        """Raises InvalidRequest if the agent is older than `what`."""
        if self.hello.done() and not self.hello.cancelled() and self.hello.result() < 3:
            raise InvalidRequest(f"this sandbox's agent is too old for {what}")

    def _path(self, path: str, owner: Owner | None, **more: object) -> bytes:
        """The fields of a file operation."""
        given: list[tuple[str, object]] = [("path", path), *more.items()]
        if owner not in (None, (0, 0)):
            assert owner is not None
            self._young("files of other users")
            given += [("uid", owner[0]), ("gid", owner[1])]
        return fields(given)

    async def read(
        self, path: str, offset: int = 0, size: int = 1 << 28, part: bool = False, owner: Owner | None = None
    ) -> bytes:
        """A regular file's bytes; one longer than `size` raises InvalidRequest, unless a `part` will do."""
        parts: list[bytes] = []
        got = 0
        while True:
            want = min(CHUNK, size + 1 - got)
            piece = await self.ask(b"r", self._path(path, owner, offset=offset + got, size=want))
            if len(piece) > want:
                raise SandboxFailed("the agent sent more than it was asked for")
            parts.append(piece)
            got += len(piece)
            if got > size and part:
                return b"".join(parts)[:size]
            if got > size:
                raise InvalidRequest(f"{path} is longer than {size} bytes; read it in parts")
            if len(piece) < want:
                return b"".join(parts)

    async def write(
        self, path: str, data: bytes, mode: int = 0o644, append: bool = False, make: bool = True,
        owner: Owner | None = None,
    ) -> None:  # fmt: skip
        """Writes a file, making missing folders (`make`); `mode` is for a new file."""
        for at in range(0, max(len(data), 1), CHUNK):
            more = append or at > 0
            header = self._path(path, owner, mode=mode, append=int(more), make=int(make))
            await self.ask(b"w", struct.pack("<H", len(header)) + header + data[at : at + CHUNK])

    async def list(self, path: str, owner: Owner | None = None) -> list[EntryInfo]:
        """A folder's entries, sorted by name."""
        payload = await self.ask(b"l", self._path(path, owner))
        base = path.rstrip("/")
        return sorted((_entry(f"{base}/{name}", value) for name, value in parse(payload)), key=lambda e: e.name)

    async def stat(self, path: str, owner: Owner | None = None) -> EntryInfo:
        """The entry itself (a link is not followed)."""
        ((_, value),) = parse(await self.ask(b"s", self._path(path, owner)))[:1] or [("", "")]
        return _entry(path, value)

    async def remove(self, path: str, owner: Owner | None = None) -> None:
        """A file, or a folder with all that is in it."""
        await self.ask(b"d", self._path(path, owner))

    async def rename(self, path: str, to: str, owner: Owner | None = None) -> None:
        await self.ask(b"m", self._path(path, owner, to=to))

    async def make_dir(self, path: str, owner: Owner | None = None) -> None:
        """The folder and its parents; one that exists is fine."""
        await self.ask(b"k", self._path(path, owner))

    def new_id(self) -> int:
        """A number that nothing else of this connection has."""
        self._next += 1
        return self._next

    def _watch(self, id: int, limit: int, on_output: Output) -> Process:
        process = self._processes[id] = Process(self, id, limit, on_output)
        return process

    async def ask(self, kind: bytes, payload: bytes, id: int = 0) -> bytes:
        """Sends a frame and waits for its answer; raises what the guest refused it with."""
        id = id or self.new_id()
        self.send(kind, id, payload)
        answer = self._answers[id] = asyncio.get_running_loop().create_future()
        await self.drained()
        got, data = await answer
        if got == b"F":
            raise _refused(data)
        return data


def _exit(values: dict[str, str]) -> Exit:
    code, signal = int(_number(values, "code")), int(_number(values, "signal"))
    out, err = int(_number(values, "out")), int(_number(values, "err"))
    return Exit(128 + signal if signal else code, _number(values, "seconds"), out, err)


def _refused(payload: bytes) -> DsecError:
    values = dict(parse(payload))
    number = int(_number(values, "errno"))
    text = f"{values.get('text', '')}: {os.strerror(number)}"
    if number in (errno.ENOENT, errno.ESRCH):
        return NotFound(text, errno=number)
    return InvalidRequest(text, errno=number)


_TYPES = {0o040000: "dir", 0o100000: "file", 0o120000: "link"}


def _entry(path: str, value: str) -> EntryInfo:
    parts = value.split(" ")
    try:
        mode, size, uid, gid = (int(part) for part in parts[:4])
        mtime = float(parts[4])
    except (ValueError, IndexError):
        raise SandboxFailed(f"the agent described {path!r:.100} as {value!r:.100}") from None
    kind = _TYPES.get(mode & 0o170000, "other")
    return EntryInfo(path.rstrip("/").rpartition("/")[2] or "/", path, kind, size, mode & 0o7777, mtime, uid, gid)  # type: ignore[arg-type]
