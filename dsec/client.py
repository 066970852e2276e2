"""How the SDK reaches an Edge: one call or one stream of events, over whatever lies between.

`Transport` is the whole contract. EmbeddedTransport talks to this host's Edge over its unix socket and starts the
Edge when none runs; a RemoteTransport talks HTTP to an API server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from dsec.errors import DsecError, SandboxFailed, from_wire
from dsec.guest.build import home as default_home

Event = tuple[str, bytes]
"""("stdout", bytes), ("stderr", bytes), or ("result", JSON of the answer) which is the last."""


class Transport(Protocol):
    """Operations are named as in dsec/edge/edge.py; arguments and answers are JSON, bytes travel beside them.

    Errors are raised as the DsecError the Edge raised.
    """

    async def call(self, op: str, args: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]: ...

    def stream(self, op: str, args: dict[str, Any]) -> AsyncIterator[Event]: ...

    async def close(self) -> None: ...


def start_edge(home: Path, seconds: float = 60.0) -> None:
    """Starts this host's Edge in the background unless one runs. It belongs to nobody and outlives its callers.

    Raises SandboxFailed with the Edge's last words when it does not answer within `seconds`.
    """
    log = home / "edge.log"
    with log.open("ab") as out:
        command = [sys.executable, "-m", "dsec.edge.server", str(home)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/", close_fds=True
        )
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX) as test:
        while test.connect_ex(str(home / "edge.sock")):
            if time.monotonic() > end or (process.poll() or 0) != 0:
                words = log.read_text(errors="replace").strip()[-500:]
                raise SandboxFailed(f"the Edge did not start within {seconds:g} s: {words}")
            time.sleep(0.01)


class EmbeddedTransport:
    """One connection to this host's Edge, shared by all sandboxes of an event loop. Reconnects when the Edge was
    replaced; what was in flight then raises SandboxFailed and can be asked for again (commands.connect)."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or default_home()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[tuple[dict[str, Any], bytes] | DsecError]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    async def _open(self) -> asyncio.StreamWriter:
        async with self._opening:
            if self._writer is None:
                for attempt in (0, 1, 2):
                    try:
                        reader, self._writer = await asyncio.open_unix_connection(self.home / "edge.sock")
                        break
                    except (FileNotFoundError, ConnectionRefusedError) as error:
                        if attempt == 2:
                            raise SandboxFailed(f"no Edge answers in {self.home}: {error}") from None
                        await asyncio.to_thread(start_edge, self.home)
                self._reader = asyncio.ensure_future(self._receive(reader))
            assert self._writer is not None
            return self._writer

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        from dsec.edge.server import receive

        try:
            while True:
                head, data = await receive(reader)
                queue = self._waiting.get(int(head["id"]))
                if queue is not None:
                    queue.put_nowait((head, data))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._writer = None
            for queue in self._waiting.values():
                queue.put_nowait(SandboxFailed("the Edge went away; its sandboxes and their commands go on"))

    async def _send(self, head: dict[str, Any], data: bytes = b"") -> None:
        from dsec.edge.server import message

        writer = await self._open()
        try:
            writer.write(message(head, data))
            await writer.drain()
        except ConnectionError:
            self._writer = None
            raise SandboxFailed("the Edge went away") from None

    async def call(self, op: str, args: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        id = next(self._ids)
        queue = self._waiting[id] = asyncio.Queue()
        try:
            await self._send({"id": id, "op": op, "args": args}, data)
            head, out = _answer(await queue.get())
            return head["result"], out
        finally:
            del self._waiting[id]

    async def stream(self, op: str, args: dict[str, Any]) -> AsyncIterator[Event]:
        from dsec.edge.server import beside

        id = next(self._ids)
        queue = self._waiting[id] = asyncio.Queue()
        kind = ""
        try:
            args, data = beside(args)
            await self._send({"id": id, "op": op, "args": args, "stream": True}, data)
            while kind != "result":
                head, data = _answer(await queue.get())
                kind = head["event"]
                yield kind, data
        finally:
            del self._waiting[id]
            if kind != "result" and self._writer is not None:
                with contextlib.suppress(DsecError):
                    await self._send({"id": id, "cancel": True})

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Transport]] = WeakKeyDictionary()


def default_transport() -> Transport:
    """The API server that DSEC_URL names (key in DSEC_API_KEY), else this host's Edge in DSEC_HOME."""
    url = os.environ.get("DSEC_URL", "")
    where = (url, os.environ.get("DSEC_API_KEY", "")) if url else ("", str(default_home()))
    shared = _shared.setdefault(asyncio.get_running_loop(), {})
    if where not in shared:
        remote = import_module("dsec.api.client")  # the API server's room
        shared[where] = remote.RemoteTransport(*where) if url else EmbeddedTransport(Path(where[1]))
    return shared[where]


def _answer(message: tuple[dict[str, Any], bytes] | DsecError) -> tuple[dict[str, Any], bytes]:
    if isinstance(message, DsecError):
        raise message
    if "error" in message[0]:
        raise from_wire(message[0]["error"])
    return message


def result_of(data: bytes) -> dict[str, Any]:
    """The JSON of a stream's last event."""
    value = json.loads(data)
    assert isinstance(value, dict)
    return value
