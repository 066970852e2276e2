"""A sandbox as its Edge keeps it: what runs, its commands and their output, its deadline, its state on disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsec.errors import CommandFailed, DsecError, InvalidRequest, NotFound, SandboxFailed, Timeout, from_wire, to_wire
from dsec.guest.protocol import Exit, Process
from dsec.network.gateway import Gateway
from dsec.substrates.base import Running
from dsec.types import CommandResult, SandboxInfo, Spec

KEPT_COMMANDS = 100
"""Finished commands whose results wait for a client that may come back."""
MAX_STATE = 1 << 20
"""Bytes of lines of state after which they are written anew as one."""


class Command:
    """A command of a sandbox: it goes on without its client, and its result waits for whoever asks."""

    def __init__(self, text: str, step: int = 0) -> None:
        self.text, self.step = text, step
        self.started = time.time()
        self.output: list[tuple[bytes, bytes]] = []
        self.told, self.rest = 0, b""
        """Of a watch that is asked: how much of the output was told, and the start of a line that is not yet whole."""
        self.process: Process | None = None
        self.result: asyncio.Future[CommandResult] = asyncio.get_running_loop().create_future()
        self.result.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.late: asyncio.TimerHandle | None = None
        self.timed_out: float = 0.0
        self._changed = asyncio.Event()

    @property
    def id(self) -> int:
        assert self.process is not None
        return self.process.id

    def on_output(self, kind: bytes, data: bytes) -> None:
        self.output.append((kind, data))
        self._changed.set()

    def bind(self, process: Process, timeout: float | None) -> None:
        """Follows the process to its end, and ends it after `timeout` seconds."""
        self.process = process
        if timeout is not None:
            self.late = asyncio.get_running_loop().call_later(timeout, self._expire, timeout)
        process.done.add_done_callback(self._finish)

    def _expire(self, timeout: float) -> None:
        self.timed_out = timeout
        if self.process is not None and not self.process.done.done():
            with contextlib.suppress(SandboxFailed):
                self.process.kill()

    def _finish(self, done: asyncio.Future[Exit]) -> None:
        if self.late is not None:
            self.late.cancel()
        error = SandboxFailed("the Edge is closing") if done.cancelled() else done.exception()
        if self.timed_out and error is None:
            error = Timeout(f"the command ran past its {self.timed_out:g} s and was killed: {self.text[:200]}")
        if error is not None:
            self.result.set_exception(error)
        else:
            self.result.set_result(self.outcome(done.result()))
        self._changed.set()

    def outcome(self, exit: Exit) -> CommandResult:
        out, err = (b"".join(data for kind, data in self.output if kind == which) for which in (b"O", b"E"))
        return CommandResult(
            stdout=out.decode("utf-8", "replace"),
            stderr=err.decode("utf-8", "replace"),
            exit_code=exit.code,
            truncated=bool(exit.dropped_out or exit.dropped_err),
            duration=exit.seconds,
        )

    async def events(self) -> AsyncIterator[tuple[str, bytes]]:
        """Its output from the beginning, then as it comes; ends when the command has."""
        at = 0
        while True:
            self._changed.clear()
            for kind, data in self.output[at:]:
                yield ("stdout" if kind == b"O" else "stderr"), data
                at += 1
            if self.result.done() and at == len(self.output):
                return
            await self._changed.wait()

    def as_dict(self) -> dict[str, Any]:
        code = None
        if self.result.done():
            error = self.result.exception()
            code = self.result.result().exit_code if error is None else -1
        return {"id": self.id, "command": self.text, "started": self.started, "step": self.step, "exit_code": code}


@dataclass
class Box:
    """One sandbox. `running` is None while it is being made, after its end, and when only its results are left."""

    id: str
    spec: Spec
    folder: Path
    host: str
    isolation: int
    capabilities: dict[str, Any]
    created: float = field(default_factory=time.time)
    deadline: float = 0.0
    state: str = "creating"
    reason: str = ""
    left: float = 0.0
    """Seconds to live that a pause has stopped."""
    running: Running | None = None
    commands: dict[int, Command] = field(default_factory=dict)
    trajectory: Any = None
    timer: asyncio.TimerHandle | None = None
    watcher: asyncio.Task[None] | None = None
    gateway: Gateway | None = None
    source: str = ""
    """The snapshot it was made from."""
    image_digest: str = ""
    """What its image contained, as its trajectory has recorded it."""
    resumed: dict[str, Any] | None = None
    saver: asyncio.Task[None] | None = None
    preempted: bool = False

    def info(self) -> SandboxInfo:
        return SandboxInfo(
            self.id, self.spec.substrate, self.spec.image, self.state, self.isolation, self.capabilities, self.created,  # type: ignore[arg-type]
            self.deadline, self.host, self.spec.metadata, self.spec.trajectory, self.reason, self.resumed,
        )  # fmt: skip

    def save(self) -> None:
        """Writes what a later Edge needs in order to adopt it: one more line, of which the last whole one counts. (To
        make and rename a file takes half a claim's millisecond; a process killed in a write leaves part of a line.)"""
        state = {
            "spec": self.spec.as_dict(), "created": self.created, "deadline": self.deadline, "state": self.state,
            "left": self.left, "source": self.source, "running": self.running.state() if self.running else None,
            "isolation": self.isolation, "capabilities": self.capabilities, "image_digest": self.image_digest,
        }  # fmt: skip
        path, line = self.folder / "state.jsonl", b"\n" + json.dumps(state).encode() + b"\n"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < MAX_STATE:
                os.write(fd, line)
                return
        finally:
            os.close(fd)
        scratch = path.with_suffix(".part")
        scratch.write_bytes(line)
        os.replace(scratch, path)

    @staticmethod
    def saved(folder: Path) -> dict[str, Any]:
        """What `save` wrote last. Raises OSError or ValueError when it never did."""
        for line in reversed((folder / "state.jsonl").read_bytes().split(b"\n")):
            with contextlib.suppress(ValueError):
                if isinstance(state := json.loads(line), dict):
                    return state
        raise ValueError(f"{folder} holds no state")

    def alive(self) -> Running:
        """The running sandbox; raises NotFound or InvalidRequest when there is none to work with."""
        if self.running is None or self.state in ("failed", "dead"):
            raise NotFound(f"sandbox {self.id} is {self.state}{': ' + self.reason if self.reason else ''}")
        if self.state == "paused":
            raise InvalidRequest(f"sandbox {self.id} is paused; connect or resume it first", paused=True)
        return self.running

    def keep(self, command: Command) -> None:
        """Remembers a command, and forgets the oldest finished ones when there are too many."""
        self.commands[command.id] = command
        finished = [each for each in self.commands.values() if each.result.done()]
        for old in finished[: max(len(finished) - KEPT_COMMANDS, 0)]:
            self.forget(old)

    def forget(self, command: Command) -> None:
        del self.commands[command.id]
        if command.process is not None and self.running is not None and not self.running.agent.failed.done():
            command.process.forget()

    def command(self, id: int) -> Command:
        if id not in self.commands:
            raise NotFound(f"sandbox {self.id} has no command {id}")
        return self.commands[id]

    def start(self, text: str | list[str], timeout: float | None, step: int, **options: Any) -> Command:
        """Starts a command in it."""
        command = Command(text if isinstance(text, str) else " ".join(text), step)
        command.bind(self.alive().agent.exec(text, command.on_output, step=step, **options), timeout)
        self.keep(command)
        return command

    async def recover(self) -> None:
        """After adoption: takes up every command the agent still knows, with its output from the beginning."""
        assert self.running is not None
        for entry in await self.running.agent.journal():
            command = Command("(from before the Edge started)", entry.step)
            command.bind(self.running.agent.attach(entry.id, command.on_output, limit=1 << 30), None)
            self.keep(command)


def recorded(error: DsecError) -> dict[str, Any]:
    """An error as a result that a trajectory can hold."""
    return {"error": to_wire(error)}


def unrecorded(result: dict[str, Any]) -> dict[str, Any]:
    """The inverse: raises the error that the result holds."""
    if "error" in result:
        raise from_wire(result["error"])
    return result


Action = Callable[[int], Any]
__all__ = ["Action", "Box", "Command", "CommandFailed", "recorded", "unrecorded"]
