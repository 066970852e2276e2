"""The Edge's operations on commands: they go on without their client, and through its trajectory if it has one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Literal

from dsec.edge.box import Box, Command
from dsec.errors import InvalidRequest, NotFound
from dsec.guest.protocol import OUTPUT_LIMIT
from dsec.network.gateway import environment
from dsec.types import CommandResult, Record

ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
Answer = dict[str, Any]
Unknown = Literal["retry", "fail", "restore_then_retry"]


class CommandOperations(ABC):
    """The op_commands_* methods of an Edge, which gives the three below."""

    @abstractmethod
    def _box(self, id: str) -> Box: ...

    @abstractmethod
    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]: ...

    @abstractmethod
    async def _logged(
        self, box: Box, kind: str, args: dict[str, Any], act: Any, idempotent: bool = False,
        on_unknown: Unknown = "fail",
    ) -> Answer:  # fmt: skip
        ...

    async def _options(self, box: Box, user: str | None, env: dict[str, str] | None, cwd: str | None) -> dict[str, Any]:
        uid, gid, home = await self._user(box, user or box.spec.user)
        env = {**ENV, "HOME": home, **environment(box.spec.network), **box.spec.env, **(env or {})}
        return {"uid": uid, "gid": gid, "cwd": cwd or home, "env": env}

    async def _user(self, box: Box, user: str) -> tuple[int, int, str]:
        """Looked up in the sandbox's own passwd file; numbers are taken as they are."""
        if user in ("root", "0"):
            return 0, 0, "/root"
        if not getattr(box.alive(), "users", True):
            raise InvalidRequest(f"no user {user!r}: an Edge that is not root maps root only")
        if user.isdecimal():
            return int(user), int(user), "/"
        with contextlib.suppress(NotFound):
            for line in (
                (await box.alive().agent.read("/etc/passwd", size=1 << 20)).decode("utf-8", "replace").splitlines()
            ):
                parts = line.split(":")
                if len(parts) >= 6 and parts[0] == user and parts[2].isdecimal() and parts[3].isdecimal():
                    return int(parts[2]), int(parts[3]), parts[5] or "/"
        raise InvalidRequest(f"no user {user!r} in the sandbox")

    async def op_commands_start(
        self, id: str, command: str | list[str], cwd: str | None = None, env: dict[str, str] | None = None,
        user: str | None = None, timeout: float | None = 60, stdin: bool = False, tty: list[int] | None = None,
        limit: int = OUTPUT_LIMIT,
    ) -> Answer:  # fmt: skip
        """Starts a command in the background; it goes on whoever leaves."""
        box = self._box(id)
        options = await self._options(box, user, env, cwd)
        size = (tty[0], tty[1]) if tty else None
        args = {"command": command, "cwd": cwd, "env": env, "user": user}

        async def act(step: int) -> Answer:
            started = box.start(command, timeout, 0, stdin=stdin, tty=size, limit=limit, **options)
            return {"command": started.id}

        return await self._logged(box, "commands.start", args, act)

    async def _result(
        self, running: asyncio.Future[Command] | None, /, id: str, command: str | list[str], cwd: str | None = None,
        env: dict[str, str] | None = None, user: str | None = None, timeout: float | None = 60,
        limit: int = OUTPUT_LIMIT, idempotent: bool = False, on_unknown: Unknown = "fail",
        input: bytes | str | None = None,
    ) -> Answer:  # fmt: skip
        """A command from start to end: its result, which is durable if it has a trajectory. ``running`` is set when it
        has started, which it does not if it is replayed."""
        box = self._box(id)
        given = base64.b64decode(input) if isinstance(input, str) else input
        commands: list[Command] = []

        async def act(step: int) -> Answer:
            options = await self._options(box, user, env, cwd)
            started = box.start(command, timeout, step, limit=limit, stdin=given is not None, **options)
            if given is not None:
                self._task(_feed(started, given)).add_done_callback(lambda done: done.cancelled() or done.exception())
            commands.append(started)
            if running is not None:
                running.set_result(started)
            return (await asyncio.shield(started.result)).as_dict()

        args = {"command": command, "cwd": cwd, "env": env, "user": user, "input": given}
        result = await self._logged(box, "commands.run", args, act, idempotent, on_unknown)
        if box.trajectory is not None and commands and commands[0].id in box.commands:
            box.forget(commands[0])  # the log has it
        return result

    async def _run(self, **args: Any) -> AsyncIterator[tuple[str, bytes]]:
        """The same as events, output as it comes."""
        running: asyncio.Future[Command] = asyncio.get_running_loop().create_future()
        work = self._task(self._result(running, **args))  # goes on without us
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([work, running], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            async for event in running.result().events():
                yield event
        result = await asyncio.shield(work)
        if result.get("replayed"):
            for name in ("stdout", "stderr"):
                if result[name]:
                    yield name, result[name].encode()
        yield "result", json.dumps(result).encode()

    async def _follow(self, command: Command) -> AsyncIterator[tuple[str, bytes]]:
        async for event in command.events():
            yield event
        yield "result", json.dumps((await asyncio.shield(command.result)).as_dict()).encode()

    async def op_commands_run(self, **args: Any) -> Record:
        """Without streaming: the result alone."""
        return CommandResult(**await self._result(None, **args))

    async def op_commands_list(self, id: str) -> Answer:
        return {"commands": [command.as_dict() for command in self._box(id).commands.values()]}

    async def op_commands_kill(self, id: str, command: int, signal: int = signal.SIGKILL) -> Answer:
        found = self._box(id).command(command)
        if found.result.done() or found.process is None:
            return {"killed": False}
        found.process.signal(signal)
        return {"killed": True}

    async def op_commands_send_stdin(self, id: str, command: int, close: bool = False, data: bytes = b"") -> None:
        process = self._box(id).command(command).process
        assert process is not None
        await process.feed(data)
        if close:
            process.close_stdin()

    async def op_commands_resize(self, id: str, command: int, rows: int, columns: int) -> None:
        process = self._box(id).command(command).process
        assert process is not None
        process.resize(rows, columns)


async def _feed(command: Command, data: bytes) -> None:
    """Its whole standard input, as fast as it reads."""
    assert command.process is not None
    await command.process.feed(data)
    command.process.close_stdin()
