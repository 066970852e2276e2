"""Commands, files and terminals of one sandbox: what `AsyncSandbox.commands`, `.files` and `.pty` are."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

from dsec.client import Transport, result_of
from dsec.errors import CommandFailed, DsecError, InvalidRequest, NotFound, Timeout
from dsec.twin import Text, bounded, within
from dsec.types import CommandInfo, CommandResult, EntryInfo, FilesystemEvent, PtySize, WriteInfo

if TYPE_CHECKING:
    from dsec.sandbox import AsyncSandbox

Unknown = Literal["retry", "fail", "restore_then_retry"]


def _no_bound(request_timeout: float | None) -> None:
    if request_timeout is not None:
        raise InvalidRequest("request_timeout bounds one request; how long a command may take is timeout=")


def one(name: str, value: Any, other: str, same: Any) -> Any:
    """An argument under our name or under E2B's."""
    if value is not None and same is not None:
        raise InvalidRequest(f"{name} and {other} are the same; give one")
    return value if same is None else same


def _checked(result: CommandResult, check: bool) -> CommandResult:
    if check and result.exit_code:
        raise CommandFailed(result)
    return result


class _Part:
    """Commands, files and terminals of one sandbox."""

    def __init__(self, box: AsyncSandbox) -> None:
        self._box = box

    async def _call(
        self, op: str, data: bytes = b"", request_timeout: float | None = None, **args: Any
    ) -> tuple[dict[str, Any], bytes]:
        return await within(request_timeout, op, self._box._transport.call(op, {"id": self._box.id, **args}, data))


@bounded
class AsyncCommandHandle(_Part):
    """A command in the background. It goes on when its client dies; `commands.connect(id)` gets the handle again."""

    def __init__(
        self, box: AsyncSandbox, id: int, on_stdout: Text | None = None, on_stderr: Text | None = None
    ) -> None:
        super().__init__(box)
        self.id = self.pid = id
        self._callbacks = (on_stdout, on_stderr)
        self._result: CommandResult | None = None

    @property
    def stdout(self) -> str | None:
        """What `wait` has found; None before."""
        return None if self._result is None else self._result.stdout

    @property
    def stderr(self) -> str | None:
        return None if self._result is None else self._result.stderr

    @property
    def exit_code(self) -> int | None:
        return None if self._result is None else self._result.exit_code

    async def wait(
        self, check: bool = True, on_stdout: Text | None = None, on_stderr: Text | None = None,
        request_timeout: float | None = None,
    ) -> CommandResult:  # fmt: skip
        """Its output from the beginning (to the callbacks), then how it ended."""
        _no_bound(request_timeout)
        out, err = (given or kept for given, kept in zip((on_stdout, on_stderr), self._callbacks, strict=True))
        args = {"id": self._box.id, "command": self.id}
        self._result = await _collect(self._box._transport, "commands.connect", args, out, err)
        return _checked(self._result, check)

    async def close_stdin(self) -> None:
        """The end of its standard input."""
        await self.send_stdin(b"", close=True)

    async def disconnect(self) -> None:
        """Nothing is held: a handle may be dropped at any time, and `commands.connect(pid)` gets it again."""

    async def kill(self, signal: int = 9) -> bool:
        """A signal to its process group; False when it had ended."""
        return bool((await self._call("commands.kill", command=self.id, signal=signal))[0]["killed"])

    async def send_stdin(self, data: str | bytes, close: bool = False) -> None:
        """Bytes for its standard input, which `close` then ends. Needs stdin=True when it was started."""
        raw = data.encode() if isinstance(data, str) else data
        await self._call("commands.send_stdin", raw, command=self.id, close=close)

    async def resize(self, rows: int, columns: int) -> None:
        """A terminal's new size."""
        await self._call("commands.resize", command=self.id, rows=rows, columns=columns)


@bounded
class AsyncCommands(_Part):
    """Runs commands: a string goes to the sandbox's shell, a list is an argv."""

    async def run(
        self,
        command: str | list[str],
        *,
        background: bool = False,
        env: dict[str, str] | None = None,
        envs: dict[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        on_stdout: Text | None = None,
        on_stderr: Text | None = None,
        stdin: bool | str | bytes | None = False,
        timeout: float | None = 60,
        request_timeout: float | None = None,
        check: bool = True,
        limit: int = 1 << 20,
        idempotent: bool = False,
        on_unknown: Unknown = "fail",
    ) -> Any:
        """A CommandResult, or a handle with `background`. `limit` caps each output stream (head and tail stay).

        `stdin`: text or bytes to give, or True to keep it open for the handle's send_stdin. CommandFailed on a non-zero
        exit unless check=False; Timeout when `timeout` is over, with its processes dead. With a trajectory,
        `idempotent` and `on_unknown` say what a resume may do when nobody saw this command's end. `envs` is E2B's word
        for `env`; a timeout of 0 or None is none; `request_timeout` bounds the start of a command in the background.
        """
        timeout, stdin = timeout or None, False if stdin is None else stdin
        args: dict[str, Any] = {
            "command": command,
            "env": one("env", env, "envs", envs),
            "user": user,
            "cwd": cwd,
            "timeout": timeout,
            "limit": limit,
        }
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        if background:
            started, _ = await self._call(
                "commands.start", **args, stdin=stdin is not False, request_timeout=request_timeout
            )
            handle = AsyncCommandHandle(self._box, started["command"], on_stdout, on_stderr)
            if isinstance(raw, bytes):
                await handle.send_stdin(raw, close=True)
            return handle
        _no_bound(request_timeout)
        if stdin is True:
            raise InvalidRequest("stdin=True needs background=True: who else would send it?")
        args |= {"id": self._box.id, "idempotent": idempotent, "on_unknown": on_unknown}
        if isinstance(raw, bytes):
            args["input"] = raw or ""
        return _checked(await _collect(self._box._transport, "commands.run", args, on_stdout, on_stderr), check)

    async def list(self) -> list[CommandInfo]:
        """Running commands, and finished ones whose results are still kept."""
        return [CommandInfo(**each) for each in (await self._call("commands.list"))[0]["commands"]]

    async def kill(self, pid: int, signal: int = 9) -> bool:
        """False when it had ended, or there is none of that number."""
        try:
            return await AsyncCommandHandle(self._box, pid).kill(signal)
        except NotFound:
            await self._box.get_info()  # unless it is the sandbox that is gone
            return False

    async def send_stdin(self, pid: int, data: str | bytes, close: bool = False) -> None:
        await AsyncCommandHandle(self._box, pid).send_stdin(data, close)

    async def close_stdin(self, pid: int) -> None:
        """The end of its standard input."""
        await AsyncCommandHandle(self._box, pid).close_stdin()

    async def connect(
        self, pid: int, on_stdout: Text | None = None, on_stderr: Text | None = None
    ) -> AsyncCommandHandle:
        """The handle of a command that another client, or this one before it died, started. Raises NotFound."""
        if pid not in [command.id for command in await self.list()]:
            raise NotFound(f"sandbox {self._box.id} has no command {pid}")
        return AsyncCommandHandle(self._box, pid, on_stdout, on_stderr)


@bounded
class AsyncPty(_Part):
    """Commands on a terminal."""

    async def create(
        self,
        command: str | list[str] = "exec /bin/sh -i",
        *,
        size: PtySize | None = None,
        rows: int = 24,
        columns: int = 80,
        on_data: Text | None = None,
        env: dict[str, str] | None = None,
        envs: dict[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        timeout: float | None = 60,
    ) -> AsyncCommandHandle:
        """A handle; what the terminal shows goes to on_data during `wait`, what is typed comes from send_stdin."""
        given = {"TERM": "xterm", **(one("env", env, "envs", envs) or {})}
        tty = [size.rows, size.cols] if size else [rows, columns]
        args: dict[str, Any] = {"command": command, "env": given, "user": user, "cwd": cwd, "tty": tty, "stdin": True}
        started, _ = await self._call("commands.start", **args, timeout=timeout or None)
        return AsyncCommandHandle(self._box, started["command"], on_data)

    async def connect(self, pid: int, on_data: Text | None = None) -> AsyncCommandHandle:
        """The handle again; what the terminal has shown comes once more."""
        return await self._box.commands.connect(pid, on_data)

    async def kill(self, pid: int) -> bool:
        return await self._box.commands.kill(pid)

    async def send_stdin(self, pid: int, data: str | bytes) -> None:
        await self._box.commands.send_stdin(pid, data)

    async def resize(self, pid: int, size: PtySize) -> None:
        await AsyncCommandHandle(self._box, pid).resize(size.rows, size.cols)


EVENTS: dict[str, Any] = {"c": "create", "d": "remove", "m": "rename", "w": "write", "a": "chmod"}
PIECE = 1 << 20
"""Bytes of a piece of a file that is read as a stream."""


@bounded
class AsyncFiles(_Part):
    """Files inside the sandbox, resolved there; relative paths start at root's home. What a `user` may
    not do is refused, and what they make is theirs (None: root)."""

    async def read(
        self, path: str, format: Literal["text", "bytes", "stream"] = "text", user: str | None = None
    ) -> Any:
        """The whole file; text is UTF-8 (bad bytes replaced); "stream" is an iterator over its bytes, 1 MiB at a time.
        NotFound, or InvalidRequest for what is no file."""
        if format == "stream":
            await self.get_info(path, user)  # now, not when the first piece is asked for
            return self._pieces(path, user)
        _, data = await self._call("files.read", path=path, user=user)
        return data if format == "bytes" else data.decode("utf-8", "replace")

    async def _pieces(self, path: str, user: str | None) -> AsyncIterator[bytes]:
        at = 0
        while data := (await self._call("files.read", path=path, offset=at, size=PIECE, part=True, user=user))[1]:
            yield data
            at += len(data)

    async def write(
        self, path: str, data: str | bytes | IO[Any], mode: int = 0o644, append: bool = False, user: str | None = None
    ) -> WriteInfo:
        """Replaces (or appends to) the file, and makes the folders it needs. `data` may be an open file."""
        if not isinstance(data, str | bytes | bytearray | memoryview):
            data = data.read()
        raw = data.encode() if isinstance(data, str) else bytes(data)
        await self._call("files.write", raw, path=path, mode=mode, append=append, user=user)
        return WriteInfo(path.rstrip("/").rpartition("/")[2], path)

    async def write_files(self, files: Sequence[dict[str, Any]], user: str | None = None) -> list[WriteInfo]:
        """Writes each of [{"path": ..., "data": ...}], one after the other; the first failure ends it."""
        return [await self.write(each["path"], each["data"], user=user) for each in files]

    async def list(self, path: str, depth: int | None = 1, user: str | None = None) -> list[EntryInfo]:
        """A folder's entries, sorted by name; with `depth` those of folders below as well, so many levels (None: all).
        Links are not followed."""
        if depth is not None and depth < 1:
            raise InvalidRequest(f"depth is 1 or more, not {depth!r}")
        entries = [EntryInfo(**entry) for entry in (await self._call("files.list", path=path, user=user))[0]["entries"]]
        found: list[EntryInfo] = []
        for entry in entries:
            found.append(entry)
            if entry.type == "dir" and depth != 1:
                found += await self.list(entry.path, depth and depth - 1, user)
        return found

    async def get_info(self, path: str, user: str | None = None) -> EntryInfo:
        """The entry itself; a link is not followed."""
        info, _ = await self._call("files.get_info", path=path, user=user)
        info.pop("replayed", None)
        return EntryInfo(**info)

    async def exists(self, path: str, user: str | None = None) -> bool:
        try:
            await self.get_info(path, user)
        except NotFound:
            return False
        return True

    async def remove(self, path: str, user: str | None = None) -> None:
        """A file, or a folder with all that is in it."""
        await self._call("files.remove", path=path, user=user)

    async def rename(self, old_path: str, new_path: str, user: str | None = None) -> EntryInfo:
        """The entry under its new name."""
        answer, _ = await self._call("files.rename", path=old_path, to=new_path, user=user)
        if "entry" in answer:
            return EntryInfo(**answer["entry"])
        return EntryInfo(new_path.rpartition("/")[2], new_path, "other", 0, 0, 0.0)  # a log of before says no more

    async def make_dir(self, path: str, user: str | None = None) -> bool:
        """The folder and its parents; False when it was there."""
        return bool((await self._call("files.make_dir", path=path, user=user))[0].get("made", True))

    async def watch_dir(
        self,
        path: str,
        on_event: Callable[[FilesystemEvent], Any] | None = None,
        on_exit: Callable[[Exception | None], Any] | None = None,
        *,
        user: str | None = None,
        timeout: float | None = None,
        recursive: bool = False,
    ) -> AsyncWatchHandle:
        """Follows what changes in a folder, and with `recursive` below it, until the handle's `stop`, the end of the
        folder or `timeout` seconds. `on_event` is called with each event, `on_exit` with the error that ended it, or
        None; without them ask the handle for `get_new_events`. Needs a sandbox with commands; no trajectory records it.

        Raises NotFound, or InvalidRequest for what is no folder.
        """
        args: dict[str, Any] = {"path": path, "recursive": recursive, "user": user, "timeout": timeout or None}
        started, _ = await self._call("files.watch", **args)
        return AsyncWatchHandle(self._box, started["command"], on_event, on_exit)

    async def download_url(self, path: str, expires: float | None = None) -> str:
        """A URL with which anybody reads that file (GET) while the sandbox lives, or for `expires` seconds. Remote."""
        return str((await self._call("files.url", path=path, method="GET", expires=expires))[0]["url"])

    async def upload_url(self, path: str, expires: float | None = None) -> str:
        """The same to write it: POST or PUT with the bytes as the body, or as a form's one file."""
        return str((await self._call("files.url", path=path, method="PUT", expires=expires))[0]["url"])


@bounded
class AsyncWatchHandle(_Part):
    """A folder that is watched."""

    def __init__(
        self,
        box: AsyncSandbox,
        id: int,
        on_event: Callable[[FilesystemEvent], Any] | None = None,
        on_exit: Callable[[Exception | None], Any] | None = None,
    ) -> None:
        super().__init__(box)
        self._id, self._on_event, self._on_exit = id, on_event, on_exit
        self._seen: list[FilesystemEvent] = []
        self._error: Exception | None = None
        self._stopped = False
        self._task = asyncio.ensure_future(self._follow())

    async def get_new_events(self) -> list[FilesystemEvent]:
        """Those since the last call. Raises InvalidRequest after `stop`, and the error that ended it, if one did."""
        if self._stopped:
            raise InvalidRequest("the watch was stopped")
        found, self._seen = self._seen, []
        if not found and self._error is not None:
            raise self._error
        return found

    async def stop(self) -> None:
        """Ends it; what changed before is still told to `on_event`."""
        self._stopped = True
        with contextlib.suppress(NotFound):
            await self._call("commands.kill", command=self._id)
        await self._task

    async def _follow(self) -> None:
        rest = b""
        try:
            args = {"id": self._box.id, "command": self._id}
            async for kind, data in self._box._transport.stream("commands.connect", args):
                if kind == "result":
                    result = result_of(data)
                    if result["truncated"] or result["exit_code"] == 75:
                        raise DsecError("more changed than could be told")
                elif kind == "stdout":
                    *lines, rest = (rest + data).split(b"\0")
                    for line in lines:
                        await self._tell(line.decode("utf-8", "replace"))
        except DsecError as error:
            if not self._stopped and not isinstance(error, Timeout):  # its own time was over: that is no error
                self._error = error
        if self._on_exit is not None:
            await _maybe(self._on_exit(self._error))

    async def _tell(self, line: str) -> None:
        event = FilesystemEvent(line[2:], EVENTS[line[0]])
        if self._on_event is None:
            self._seen.append(event)
        else:
            await _maybe(self._on_event(event))


async def _maybe(done: Any) -> None:
    """What a callback gave back, awaited if it wants to be."""
    if inspect.isawaitable(done):
        await done


async def _collect(
    transport: Transport, op: str, args: dict[str, Any], on_stdout: Text | None, on_stderr: Text | None
) -> CommandResult:
    """Follows a stream to its result, calling back with text as it comes."""
    callbacks = {"stdout": on_stdout, "stderr": on_stderr}
    decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in callbacks}
    async for kind, data in transport.stream(op, args):
        if kind == "result":
            return CommandResult.from_dict(result_of(data))
        callback = callbacks[kind]
        if callback is not None and (text := decoders[kind].decode(data)):
            await _maybe(callback(text))
    raise DsecError(f"{op} ended without a result")
