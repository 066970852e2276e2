"""SWE-ReX's runtime over a DSec sandbox: shell sessions, single commands, files.

    runtime = await DsecRuntime.create(image="python")        # the keywords are `Spec`'s fields

A session is a shell that keeps its variables and folder. It has no terminal: interactive programs and `expect` are
refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
from pathlib import Path
from typing import Any, Self

from swerex.exceptions import (
    BashIncorrectSyntaxError,
    CommandTimeoutError,
    NonZeroExitCodeError,
    SessionDoesNotExistError,
    SessionExistsError,
)
from swerex.runtime.abstract import (
    AbstractRuntime,
    Action,
    BashInterruptAction,
    BashObservation,
    CloseBashSessionResponse,
    CloseResponse,
    CloseSessionRequest,
    CloseSessionResponse,
    Command,
    CommandResponse,
    CreateBashSessionResponse,
    CreateSessionRequest,
    CreateSessionResponse,
    IsAliveResponse,
    Observation,
    ReadFileRequest,
    ReadFileResponse,
    UploadRequest,
    UploadResponse,
    WriteFileRequest,
    WriteFileResponse,
)

from dsec.adapters.raw import os_errors, run
from dsec.errors import DsecError, InvalidRequest, Timeout
from dsec.sandbox import AsyncSandbox

OUTPUT = 1 << 28
"""Bytes a session may print in its life."""


class Session:
    """One bash that reads commands from its standard input. A mark of its own tells where a command's output ends."""

    def __init__(self, box: AsyncSandbox) -> None:
        self._box, self._output, self._arrived = box, bytearray(), asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self.number = self.pid = 0

    async def start(self, files: list[str], seconds: float) -> str:
        args = {"id": self._box.id, "command": ["/bin/bash", "--norc", "--noprofile"], "stdin": True, "timeout": None}
        answer, _ = await self._box._transport.call("commands.start", args | {"limit": OUTPUT})
        self.number = answer["command"]
        self._reader = asyncio.create_task(self._read())
        self.pid = int((await self.run("exec 2>&1; echo $$", 30.0))[0])
        return (await self.run("; ".join(f"source {shlex.quote(name)}" for name in files) or ":", max(30.0, seconds)))[
            0
        ]

    async def _read(self) -> None:
        try:
            stream = self._box._transport.stream("commands.connect", {"id": self._box.id, "command": self.number})
            async for kind, data in stream:
                if kind != "result":
                    self._output += data
                    self._arrived.set()
        finally:
            self.number = 0
            self._arrived.set()

    async def run(self, command: str, seconds: float | None) -> tuple[str, int]:
        """What a command printed, and its exit code. Raises CommandTimeoutError; the command then still runs."""
        mark = f"--{secrets.token_hex(12)}--"
        text = f"eval {shlex.quote(command)} </dev/null\nprintf '%s%s\\n' {mark} $?\n"
        args = {"id": self._box.id, "command": self.number}
        self._output.clear()
        await self._box._transport.call("commands.send_stdin", args, text.encode())
        try:
            async with asyncio.timeout(seconds):
                while (end := self._output.find(mark.encode())) < 0 or b"\n" not in self._output[end:]:
                    if not self.number:
                        raise SessionDoesNotExistError("the shell has ended")
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError as error:
            raise CommandTimeoutError(f"{command!r} ran past {seconds} s") from error
        code = int(self._output[end + len(mark) :].split(b"\n")[0])
        return self._output[:end].decode("utf-8", "replace"), code

    async def interrupt(self) -> None:
        """SIGINT to what the shell runs, not to the shell."""
        await run(self._box, f"pkill -INT -P {self.pid}; true", timeout=10)

    async def close(self) -> None:
        if self._reader:
            self._reader.cancel()
        if self.number:
            with contextlib.suppress(DsecError):
                await self._box._transport.call("commands.kill", {"id": self._box.id, "command": self.number})


class DsecRuntime(AbstractRuntime):
    """One sandbox; `close` ends it."""

    def __init__(self, box: AsyncSandbox) -> None:
        self.box = box
        self._sessions: dict[str, Session] = {}

    @classmethod
    async def create(cls, **spec: Any) -> Self:
        wanted: dict[str, Any] = {"substrate": "container", "timeout": 3600.0} | spec
        return cls(await AsyncSandbox.create(**wanted))

    async def is_alive(self, *, timeout: float | None = None) -> IsAliveResponse:
        alive = await self.box.is_running()
        return IsAliveResponse(is_alive=alive, message="" if alive else "the sandbox has ended")

    async def create_session(self, request: CreateSessionRequest) -> CreateSessionResponse:
        if request.session in self._sessions:
            raise SessionExistsError(f"session {request.session} exists")
        session = self._sessions[request.session] = Session(self.box)
        try:
            output = await session.start(request.startup_source, request.startup_timeout)
        except BaseException:
            del self._sessions[request.session]
            raise
        return CreateBashSessionResponse(output=output)

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            raise SessionDoesNotExistError(f"session {name!r} does not exist")
        return self._sessions[name]

    async def run_in_session(self, action: Action) -> Observation:
        session = self._session(action.session)
        if isinstance(action, BashInterruptAction):
            await session.interrupt()
            output, code = await session.run(":", max(10.0, action.timeout))
            return BashObservation(output=output, exit_code=code)
        if action.is_interactive_command or action.is_interactive_quit or action.expect:
            raise InvalidRequest("a session has no terminal: interactive commands and expect are not for it")
        wrong = await run(self.box, ["/bin/bash", "-n"], action.command.encode(), timeout=30)
        if wrong.exit_code and action.check != "ignore":
            raise BashIncorrectSyntaxError(
                wrong.stderr.decode("utf-8", "replace"),
                extra_info={"bash_stderr": wrong.stderr.decode("utf-8", "replace")},
            )
        output, code = await session.run(action.command, action.timeout)
        if action.check == "raise" and code:
            message = f"command {action.command!r} ended with {code}: {output[-2000:]}. {action.error_msg}"
            raise NonZeroExitCodeError(message)
        return BashObservation(output=output, exit_code=None if action.check == "ignore" else code)

    async def close_session(self, request: CloseSessionRequest) -> CloseSessionResponse:
        session = self._session(request.session)
        del self._sessions[request.session]
        await session.close()
        return CloseBashSessionResponse()

    async def execute(self, command: Command) -> CommandResponse:
        words = command.command
        if command.shell and not isinstance(words, str):
            words = " ".join(words)
        elif not command.shell and isinstance(words, str):
            words = [words]
        if command.merge_output_streams:
            shown = words if isinstance(words, list) else ["/bin/sh", "-c", words]
            words = ["/bin/sh", "-c", 'exec "$0" "$@" 2>&1', *shown]
        try:
            done = await run(self.box, words, cwd=command.cwd, env=command.env, timeout=command.timeout)
        except Timeout as error:
            raise CommandTimeoutError(f"{command.command!r} ran past {command.timeout} s") from error
        out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
        if command.check and done.exit_code:
            raise NonZeroExitCodeError(
                f"{command.command!r} ended with {done.exit_code}: {err or out}. {command.error_msg}"
            )
        return CommandResponse(stdout=out, stderr=err, exit_code=done.exit_code)

    async def read_file(self, request: ReadFileRequest) -> ReadFileResponse:
        with os_errors(request.path):
            data: bytes = await self.box.files.read(request.path, format="bytes")
        return ReadFileResponse(content=data.decode(request.encoding or "utf-8", request.errors or "strict"))

    async def write_file(self, request: WriteFileRequest) -> WriteFileResponse:
        with os_errors(request.path):
            await self.box.files.write(request.path, request.content)
        return WriteFileResponse()

    async def upload(self, request: UploadRequest) -> UploadResponse:
        """A file, or a folder with all that is in it."""
        source = Path(request.source_path)
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            target = f"{request.target_path}/{path.relative_to(source)}" if source.is_dir() else request.target_path
            if path.is_file():
                await self.box.files.write(target, path.read_bytes(), mode=path.stat().st_mode & 0o777)
        return UploadResponse()

    async def close(self) -> CloseResponse:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()
        await self.box.kill()
        return CloseResponse()
