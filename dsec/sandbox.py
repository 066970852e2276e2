"""The SDK. AsyncSandbox is written out; Sandbox is made from it (`_twin`), so the two cannot drift apart.

    with Sandbox.create(substrate="container", timeout=300) as box:
        print(box.commands.run("uname -a").stdout)

Names and meanings are E2B's where E2B has them. Seconds everywhere; a sandbox lives `timeout` seconds unless told
otherwise and does not depend on the process that made it (`AsyncSandbox.connect`).
"""

from __future__ import annotations

import asyncio
import atexit
import codecs
import contextlib
import inspect
import os
import queue
import textwrap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from weakref import WeakKeyDictionary

from dsec.client import EmbeddedTransport, Transport, result_of
from dsec.errors import CommandFailed, DsecError, InvalidRequest, NotFound, from_wire
from dsec.types import CommandResult, EntryInfo, SandboxInfo, Spec, Stats

Text = Callable[[str], Any]
Unknown = Literal["retry", "fail", "restore_then_retry"]
_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Transport]] = WeakKeyDictionary()


def default_transport() -> Transport:
    """The API server that DSEC_URL names (key in DSEC_API_KEY), else this host's Edge in DSEC_HOME."""
    from dsec.guest.build import home

    url = os.environ.get("DSEC_URL", "")
    where = (url, os.environ.get("DSEC_API_KEY", "")) if url else ("", str(home()))
    shared = _shared.setdefault(asyncio.get_running_loop(), {})
    if where not in shared:
        remote = import_module("dsec.api.client")  # the API server's room
        shared[where] = remote.RemoteTransport(*where) if url else EmbeddedTransport(Path(where[1]))
    return shared[where]


class _Part:
    """Commands, files and terminals of one sandbox."""

    def __init__(self, box: AsyncSandbox) -> None:
        self._box = box

    async def _call(self, op: str, data: bytes = b"", **args: Any) -> tuple[dict[str, Any], bytes]:
        return await self._box._transport.call(op, {"id": self._box.id, **args}, data)


class AsyncCommandHandle(_Part):
    """A command in the background. It goes on when its client dies; `commands.connect(id)` gets the handle again."""

    def __init__(
        self, box: AsyncSandbox, id: int, on_stdout: Text | None = None, on_stderr: Text | None = None
    ) -> None:
        super().__init__(box)
        self.id = id
        self._callbacks = (on_stdout, on_stderr)

    async def wait(
        self, check: bool = True, on_stdout: Text | None = None, on_stderr: Text | None = None
    ) -> CommandResult:
        """Its output from the beginning (to the callbacks), then how it ended."""
        out, err = (given or kept for given, kept in zip((on_stdout, on_stderr), self._callbacks, strict=True))
        args = {"id": self._box.id, "command": self.id}
        return await _collect(self._box._transport, "commands.connect", args, out, err, check)

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


class AsyncCommands(_Part):
    """Runs commands: a string goes to the sandbox's shell, a list is an argv."""

    async def run(
        self,
        command: str | list[str],
        *,
        background: bool = False,
        env: dict[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        on_stdout: Text | None = None,
        on_stderr: Text | None = None,
        stdin: bool | str | bytes = False,
        timeout: float | None = 60,
        check: bool = True,
        limit: int = 1 << 20,
        idempotent: bool = False,
        on_unknown: Unknown = "fail",
    ) -> Any:
        """A CommandResult, or a handle with `background`. `limit` caps each output stream (head and tail stay).

        `stdin`: text or bytes to give, or True to keep it open for the handle's send_stdin. CommandFailed on a non-zero
        exit unless check=False; Timeout when `timeout` is over, with its processes dead. With a trajectory,
        `idempotent` and `on_unknown` say what a resume may do when nobody saw this command's end.
        """
        args: dict[str, Any] = {
            "command": command,
            "env": env,
            "user": user,
            "cwd": cwd,
            "timeout": timeout,
            "limit": limit,
        }
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        if background:
            started, _ = await self._call("commands.start", **args, stdin=stdin is not False)
            handle = AsyncCommandHandle(self._box, started["command"], on_stdout, on_stderr)
            if isinstance(raw, bytes):
                await handle.send_stdin(raw, close=True)
            return handle
        if stdin is True:
            raise InvalidRequest("stdin=True needs background=True: who else would send it?")
        args |= {"id": self._box.id, "idempotent": idempotent, "on_unknown": on_unknown}
        if isinstance(raw, bytes):
            args["input"] = raw or ""
        return await _collect(self._box._transport, "commands.run", args, on_stdout, on_stderr, check)

    async def list(self) -> list[dict[str, Any]]:
        """Running commands and finished ones still kept, each with id, command, started, exit_code (or None)."""
        return list((await self._call("commands.list"))[0]["commands"])

    async def kill(self, id: int, signal: int = 9) -> bool:
        return await AsyncCommandHandle(self._box, id).kill(signal)

    async def send_stdin(self, id: int, data: str | bytes, close: bool = False) -> None:
        await AsyncCommandHandle(self._box, id).send_stdin(data, close)

    async def connect(
        self, id: int, on_stdout: Text | None = None, on_stderr: Text | None = None
    ) -> AsyncCommandHandle:
        """The handle of a command that another client, or this one before it died, started. Raises NotFound."""
        if id not in [command["id"] for command in await self.list()]:
            raise NotFound(f"sandbox {self._box.id} has no command {id}")
        return AsyncCommandHandle(self._box, id, on_stdout, on_stderr)


class AsyncPty(_Part):
    """Commands on a terminal."""

    async def create(
        self,
        command: str | list[str] = "exec /bin/sh -i",
        *,
        rows: int = 24,
        columns: int = 80,
        on_data: Text | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        timeout: float | None = 60,
    ) -> AsyncCommandHandle:
        """A handle; what the terminal shows goes to on_data during `wait`, what is typed comes from send_stdin."""
        args: dict[str, Any] = {"command": command, "env": {"TERM": "xterm", **(env or {})}, "user": user, "cwd": cwd}
        started, _ = await self._call("commands.start", **args, timeout=timeout, tty=[rows, columns], stdin=True)
        return AsyncCommandHandle(self._box, started["command"], on_data)


class AsyncFiles(_Part):
    """Files inside the sandbox, resolved there; relative paths start at root's home."""

    async def read(self, path: str, format: Literal["text", "bytes"] = "text") -> Any:
        """The whole file; text is UTF-8 (bad bytes replaced). NotFound, or InvalidRequest for what is no file."""
        _, data = await self._call("files.read", path=path)
        return data if format == "bytes" else data.decode("utf-8", "replace")

    async def write(self, path: str, data: str | bytes, mode: int = 0o644, append: bool = False) -> None:
        """Replaces (or appends to) the file, and makes the folders it needs."""
        raw = data.encode() if isinstance(data, str) else bytes(data)
        await self._call("files.write", raw, path=path, mode=mode, append=append)

    async def list(self, path: str) -> list[EntryInfo]:
        """A folder's entries, sorted by name."""
        return [EntryInfo(**entry) for entry in (await self._call("files.list", path=path))[0]["entries"]]

    async def get_info(self, path: str) -> EntryInfo:
        """The entry itself; a link is not followed."""
        info, _ = await self._call("files.get_info", path=path)
        info.pop("replayed", None)
        return EntryInfo(**info)

    async def exists(self, path: str) -> bool:
        try:
            await self.get_info(path)
        except NotFound:
            return False
        return True

    async def remove(self, path: str) -> None:
        """A file, or a folder with all that is in it."""
        await self._call("files.remove", path=path)

    async def rename(self, path: str, to: str) -> None:
        await self._call("files.rename", path=path, to=to)

    async def make_dir(self, path: str) -> None:
        """The folder and its parents; one that exists is fine."""
        await self._call("files.make_dir", path=path)


class AsyncSandbox:
    """One sandbox. Leaving the context manager kills it; letting go of the object does not."""

    def __init__(self, info: SandboxInfo, transport: Transport) -> None:
        self.id = info.id
        self.created_as = info
        """The sandbox as it was when this object was made; get_info() asks again."""
        self.commands, self.files, self.pty = AsyncCommands(self), AsyncFiles(self), AsyncPty(self)
        self._transport = transport

    @classmethod
    async def create(cls, *, transport: Transport | None = None, **spec: Any) -> Self:
        """A new sandbox; the keywords are Spec's fields. With `trajectory` an earlier one is resumed.

        Raises SubstrateUnavailable (with the fix), Capacity, ImageError, InvalidRequest.
        """
        transport = transport or default_transport()
        wanted = Spec.from_dict(spec).stated()
        info, _ = await transport.call("create", {"spec": wanted})
        return cls(SandboxInfo(**info), transport)

    @classmethod
    async def connect(cls, id: str, timeout: float | None = None, transport: Transport | None = None) -> Self:
        """The sandbox of that id, resumed when paused; `timeout` moves its deadline. Raises NotFound."""
        transport = transport or default_transport()
        info, _ = await transport.call("connect", {"id": id, "timeout": timeout})
        return cls(SandboxInfo(**info), transport)

    @classmethod
    async def list(
        cls, metadata: dict[str, str] | None = None, state: list[str] | None = None, transport: Transport | None = None
    ) -> list[SandboxInfo]:
        """Live sandboxes whose metadata has these entries."""
        transport = transport or default_transport()
        answer, _ = await transport.call("list", {"metadata": metadata, "state": state})
        return [SandboxInfo(**info) for info in answer["sandboxes"]]

    @classmethod
    async def pool(cls, size: int, *, transport: Transport | None = None, **spec: Any) -> int:
        """Keeps `size` sandboxes of this kind ready on the host, so that create takes a millisecond; 0 ends it."""
        transport = transport or default_transport()
        answer, _ = await transport.call("pool", {"spec": Spec.from_dict(spec).stated(), "size": size})
        return int(answer["ready"])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def get_info(self) -> SandboxInfo:
        return SandboxInfo(**await self._ask("info"))

    async def is_running(self) -> bool:
        try:
            return (await self.get_info()).state in ("running", "paused")
        except NotFound:
            return False

    async def set_timeout(self, timeout: float) -> None:
        """Seconds from now until it is destroyed."""
        await self._ask("set_timeout", timeout=timeout)

    async def pause(self) -> None:
        """Stops its processes and its clock; `connect` or `resume` lets both go on."""
        await self._ask("pause")

    async def resume(self) -> None:
        await self._ask("resume")

    async def kill(self) -> bool:
        """Ends it within a second; False when it was gone."""
        return bool((await self._ask("kill"))["killed"])

    async def get_metrics(self) -> Stats:
        return Stats(**await self._ask("metrics"))

    async def get_host(self, port: int) -> str:
        """The "host:port" where this port of the sandbox is reached, on its Edge's machine. Forbidden unless the
        network policy has it in allow_in."""
        return str((await self._ask("get_host", port=port))["host"])

    async def snapshot(self) -> str:
        """Captures its files; create(image="snapshot:" + this) starts from them."""
        return str((await self._ask("snapshot"))["snapshot"])

    async def fork(self, count: int = 1) -> Sequence[Any]:
        """`count` sandboxes that begin with this one's files; an entry is a sandbox or the error that prevented it."""
        answers = (await self._ask("fork", count=count))["forks"]
        return [
            from_wire(each["error"]) if "error" in each else type(self)(SandboxInfo(**each["info"]), self._transport)
            for each in answers
        ]

    async def log_snapshot(self) -> str:
        """Captures its files into its trajectory: a resume after its death goes on from here."""
        return str((await self._ask("log_snapshot"))["snapshot"])

    async def call(self, function: Any, *args: Any, timeout: float | None = 60, **kwargs: Any) -> Any:
        """A function sandbox's call: a registered name ("module:function"), Python code that defines main(), or a
        function, whose source is sent: it may use only what it imports itself."""
        name = function
        if not isinstance(function, str):
            name = f"{textwrap.dedent(inspect.getsource(function))}\nmain = {function.__name__}\n"
        answer = await self._ask("call", function=name, args=list(args), kwargs=kwargs, timeout=timeout)
        return answer["value"]

    async def _ask(self, op: str, **args: Any) -> dict[str, Any]:
        return (await self._transport.call(op, {"id": self.id, **args}))[0]


async def _collect(
    transport: Transport, op: str, args: dict[str, Any], on_stdout: Text | None, on_stderr: Text | None, check: bool
) -> CommandResult:
    """Follows a stream to its result, calling back with text as it comes."""
    callbacks = {"stdout": on_stdout, "stderr": on_stderr}
    decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in callbacks}
    async for kind, data in transport.stream(op, args):
        if kind == "result":
            result = CommandResult.from_dict(result_of(data))
            if check and result.exit_code:
                raise CommandFailed(result)
            return result
        callback = callbacks[kind]
        if callback is not None and (text := decoders[kind].decode(data)):
            done = callback(text)
            if inspect.isawaitable(done):
                await done
    raise DsecError(f"{op} ended without a result")


# The synchronous twin: every public coroutine of a class, run on a loop of its own thread.

_T = TypeVar("_T")
_TWINS: dict[type, type] = {}


class _Loop:
    """One event loop in a thread for all synchronous sandboxes of this process (a forked child makes its own)."""

    _lock = threading.Lock()
    _current: tuple[int, asyncio.AbstractEventLoop] | None = None

    @classmethod
    def end(cls) -> None:
        """Before the interpreter ends, so that nothing pending complains."""

        async def over() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if cls._current is not None and cls._current[0] == os.getpid():
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(over(), cls._current[1]).result(1)

    @classmethod
    def get(cls) -> asyncio.AbstractEventLoop:
        with cls._lock:
            if cls._current is None or cls._current[0] != os.getpid():
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name="dsec", daemon=True).start()
                cls._current = (os.getpid(), loop)
            return cls._current[1]


atexit.register(_Loop.end)


def _wait(work: Any, said: queue.SimpleQueue[tuple[Text, str] | None]) -> Any:
    """The coroutine's result; callbacks run here, in the caller's thread, so they may use the sandbox."""
    future: Future[Any] = asyncio.run_coroutine_threadsafe(work, _Loop.get())
    future.add_done_callback(lambda _: said.put(None))
    try:
        while (item := said.get()) is not None:
            item[0](item[1])
        return _outside(future.result())
    except BaseException:
        future.cancel()
        raise


def _outside(value: Any) -> Any:
    """What the synchronous side sees: twins instead of async objects."""
    if isinstance(value, list):
        return [_outside(each) for each in value]
    twin = _TWINS.get(type(value))
    return value if twin is None else twin._of(value)  # type: ignore[attr-defined]


def _method(function: Any, of_class: bool) -> Any:
    @wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        said: queue.SimpleQueue[tuple[Text, str] | None] = queue.SimpleQueue()
        for name, value in kwargs.items():
            if name.startswith("on_") and callable(value):
                kwargs[name] = lambda text, value=value: said.put((value, text))
        return _wait(function(self._core, *args, **kwargs), said)

    return classmethod(call) if of_class else call


def _twin(core: type[_T], name: str) -> Any:
    """The synchronous class of an asynchronous one."""
    body: dict[str, Any] = {"__doc__": core.__doc__, "_core": core, "__module__": __name__}

    def of(cls: Any, value: Any) -> Any:
        self = object.__new__(cls)
        self._core = value
        for key, part in vars(value).items():
            if not key.startswith("_"):
                setattr(self, key, _outside(part))
        return self

    body["_of"] = classmethod(of)
    body["__repr__"] = lambda self: f"{name}({self.id!r})"
    for base in reversed(core.__mro__):
        for key, value in vars(base).items():
            plain = value.__func__ if isinstance(value, classmethod) else value
            if inspect.iscoroutinefunction(plain) and not key.startswith("_"):
                body[key] = _method(plain, isinstance(value, classmethod))
    if "kill" in body and "create" in body and name == "Sandbox":
        body["__enter__"] = lambda self: self
        body["__exit__"] = lambda self, *_: (self.kill(), None)[1]
    twin = type(name, (), body)
    _TWINS[core] = twin
    return twin


CommandHandle = _twin(AsyncCommandHandle, "CommandHandle")
Commands = _twin(AsyncCommands, "Commands")
Files = _twin(AsyncFiles, "Files")
Pty = _twin(AsyncPty, "Pty")
Sandbox: Any = _twin(AsyncSandbox, "Sandbox")
