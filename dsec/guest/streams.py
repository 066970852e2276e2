"""The host's end of a sandbox's byte streams (streams.h): TCP on the sandbox's loopback, many on one agent connection.

    N port: open the port where programs inside find the proxy    T port: connect to a port inside (answered by A or F)
    o (guest) a program connected to the proxy's port             t bytes   e end of this direction   c closed
    a u32: so many bytes were passed on                           (both ways)

N and T carry the port as decimal digits and a NUL. Ids of streams the guest opens have the top bit set.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from dsec.errors import DsecError, InvalidRequest, SandboxFailed

if TYPE_CHECKING:
    from dsec.guest.protocol import Agent

KINDS = (b"o", b"t", b"e", b"c", b"a")
WINDOW = 1 << 18
"""Bytes of one stream that may be under way in one direction."""
STREAMS = 128
"""Streams a sandbox may have open towards the host."""
_PIECE = 1 << 16
_OPENED = 1 << 31


class Stream:
    """One connection. A hostile guest can end it or say nonsense in it; the host never keeps more than WINDOW of it."""

    def __init__(self, of: Streams, id: int) -> None:
        self.id, self._of = id, of
        self._in: deque[bytes] = deque()
        self._credit, self._held = WINDOW, 0
        self._ended_in = self._ended_out = False
        self.closed = False
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        """The next bytes; b"" at the end. Raises ConnectionResetError when the other side gave up."""
        while not self._in:
            if self._ended_in:
                return b""
            self._check()
            await self._change()
        data = self._in.popleft()
        self._held -= len(data)
        if not self.closed:
            self._send(b"a", struct.pack("<I", len(data)))
        return data

    async def write(self, data: bytes) -> None:
        """Returns when the guest may have all of it. Raises ConnectionResetError."""
        view = memoryview(data)
        while view:
            self._check()
            piece = view[: min(len(view), self._credit, _PIECE)]
            if piece:
                self._credit -= len(piece)
                self._send(b"t", bytes(piece))
                view = view[len(piece) :]
            else:
                await self._change()

    def end(self) -> None:
        """No more from the host; the other direction goes on."""
        if not self.closed and not self._ended_out:
            self._ended_out = True
            self._send(b"e")
            self._settle()

    def close(self) -> None:
        """Drops it."""
        if not self.closed:
            self._send(b"c")
            self._over()

    def _send(self, kind: bytes, payload: bytes = b"") -> None:
        try:
            self._of.agent.send(kind, self.id, payload)
        except SandboxFailed as error:
            self._over()
            raise ConnectionResetError(error.message) from None

    def _check(self) -> None:
        if self.closed:
            raise ConnectionResetError("the stream is closed")

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _take(self, kind: bytes, payload: bytes) -> None:
        if kind == b"t":
            self._held += len(payload)
            if self._held > WINDOW or self._ended_in:
                raise SandboxFailed("the agent sent more of a stream than it may")
            if payload:
                self._in.append(payload)
        elif kind == b"e":
            self._ended_in = True
            self._settle()
        elif kind == b"a" and len(payload) == 4:
            self._credit += struct.unpack("<I", payload)[0]
            if self._credit > WINDOW:
                raise SandboxFailed("the agent acknowledged what was never sent")
        elif kind == b"c":
            self._over()
        else:
            raise SandboxFailed(f"an unexpected frame of a stream: {kind!r}, {len(payload)} bytes")
        self._changed.set()

    def _settle(self) -> None:
        if self._ended_in and self._ended_out:
            self._over()

    def _over(self) -> None:
        self.closed = True
        self._of.open.pop(self.id, None)
        self._changed.set()


class Streams:
    """All streams of one agent. `accept` is called with each that a program inside opens; None refuses them."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.open: dict[int, Stream] = {}
        self.accept: Callable[[Stream], Awaitable[None]] | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def gate(self, port: int) -> None:
        """Opens the proxy's port inside; from then on `accept` is asked. InvalidRequest when the port is taken."""
        await self.agent.ask(b"N", f"{port}\0".encode())

    async def connect(self, port: int) -> Stream:
        """A stream to a port on the sandbox's loopback. InvalidRequest when nobody listens there."""
        if not 0 < port < 65536:
            raise InvalidRequest(f"a port is 1 to 65535, not {port!r}")
        if sum(id < _OPENED for id in self.open) >= STREAMS:
            raise InvalidRequest(f"{STREAMS} connections into the sandbox are open")
        id = self.agent.new_id()
        stream = self.open[id] = Stream(self, id)
        try:
            await self.agent.ask(b"T", f"{port}\0".encode(), id)
        except BaseException:
            with contextlib.suppress(ConnectionError):
                stream.close()
            raise
        return stream

    def take(self, kind: bytes, id: int, payload: bytes) -> None:
        """A frame from the guest; raises SandboxFailed for one that breaks the rules."""
        if kind != b"o":
            if id in self.open:  # of one that is gone: the guest wrote before it knew
                self.open[id]._take(kind, payload)
            return
        if id < _OPENED or id in self.open:
            raise SandboxFailed(f"the agent opened a stream as {id}")
        if self.accept is None or sum(id >= _OPENED for id in self.open) >= STREAMS:
            self.agent.send(b"c", id)
            return
        stream = self.open[id] = Stream(self, id)
        task = asyncio.ensure_future(self._serve(stream, self.accept))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, stream: Stream, accept: Callable[[Stream], Awaitable[None]]) -> None:
        try:
            await accept(stream)
        except (OSError, DsecError, TimeoutError):
            pass  # the sandbox sees its connection end
        finally:
            with contextlib.suppress(ConnectionError):
                stream.close()

    def over(self) -> None:
        """The agent is gone."""
        for stream in list(self.open.values()):
            stream._over()


async def splice(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carries bytes both ways until both directions have ended or one breaks."""

    async def outwards() -> None:
        while data := await stream.read():
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def inwards() -> None:
        while data := await reader.read(_PIECE):
            await stream.write(data)
        stream.end()

    both = [asyncio.ensure_future(outwards()), asyncio.ensure_future(inwards())]
    try:
        await asyncio.gather(*both)
    finally:
        for task in both:
            task.cancel()
        with contextlib.suppress(ConnectionError):
            stream.close()
        writer.close()
