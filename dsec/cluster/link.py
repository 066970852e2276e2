"""A server's connection to an Edge: the Edge's own messages (`dsec.edge.server`) over a unix socket or TCP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from dsec.edge.server import beside, message, receive
from dsec.errors import DsecError, from_wire

Item = tuple[dict[str, Any], bytes]
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Unreachable(DsecError):
    """The Edge did not answer. What was asked may have been done."""

    status = 503


class Link:
    """Many calls at once on one connection, which is made on demand and again after a failure."""

    def __init__(self, address: str, token: str = "", connect_timeout: float = 5.0) -> None:
        """``address``: unix:PATH or tcp:HOST:PORT; ``token``: the cluster's secret, for TCP."""
        self.address, self._token, self._timeout = address, token, connect_timeout
        self._lock = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._queues: dict[int, asyncio.Queue[Item | None]] = {}
        self._number = 0

    async def _connected(self) -> asyncio.StreamWriter:
        if self._writer is not None and not self._writer.is_closing():
            return self._writer
        async with self._lock:
            if self._writer is not None and not self._writer.is_closing():
                return self._writer
            reader, writer = await self._dial()
            self._writer = writer
            self._reading = asyncio.create_task(self._read(reader, writer))
            return writer

    async def _dial(self) -> Ends:
        """A new connection, with the cluster's secret said. Raises Unreachable."""
        kind, _, where = self.address.partition(":")
        try:
            async with asyncio.timeout(self._timeout):
                if kind == "unix":
                    return await asyncio.open_unix_connection(where, limit=1 << 20)
                host, _, port = where.rpartition(":")
                reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
                writer.write(message({"auth": self._token}))
                return reader, writer
        except (OSError, TimeoutError) as error:
            raise Unreachable(f"no Edge answers at {self.address}: {error}") from error

    async def tunnel(self, id: str, port: int) -> Ends:
        """A connection of its own that ends at a port inside a sandbox: bytes both ways, at the reader's pace. Raises
        what the Edge raises (Forbidden, InvalidRequest when nobody listens), or Unreachable."""
        reader, writer = await self._dial()
        try:
            writer.write(message({"id": 1, "op": "tunnel", "args": {"id": id, "port": port}}))
            async with asyncio.timeout(self._timeout):
                self._open(await receive(reader))
        except BaseException as error:
            writer.close()
            if isinstance(error, OSError | EOFError | TimeoutError) and not isinstance(error, DsecError):
                raise Unreachable(f"the Edge at {self.address} opened no port") from error
            raise
        return reader, writer

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head, data = await receive(reader)
                if queue := self._queues.get(head["id"]):
                    queue.put_nowait((head, data))
        except (asyncio.IncompleteReadError, OSError, DsecError):
            pass  # the Edge went away; everybody who waits is told
        finally:
            writer.close()
            self._writer = None
            for queue in self._queues.values():
                queue.put_nowait(None)

    @contextlib.asynccontextmanager
    async def _ask(
        self, op: str, args: dict[str, Any], data: bytes, stream: bool
    ) -> AsyncIterator[asyncio.Queue[Item | None]]:
        writer = await self._connected()
        self._number += 1
        number, queue = self._number, asyncio.Queue[Item | None]()
        self._queues[number] = queue
        over = False
        try:
            writer.write(message({"id": number, "op": op, "args": args, "stream": stream}, data))
            await writer.drain()
            yield queue
            over = True
        except ConnectionError as error:
            raise Unreachable(f"the Edge at {self.address} went away") from error
        finally:
            del self._queues[number]
            if not over and not writer.is_closing():
                writer.write(message({"id": number, "cancel": True}))

    async def call(
        self, op: str, args: dict[str, Any], data: bytes = b"", timeout: float | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Raises the DsecError that the Edge raised, or Unreachable (also when ``timeout`` seconds have passed)."""
        async with self._ask(op, args, data, False) as queue:
            try:
                head, data = self._open(await asyncio.wait_for(queue.get(), timeout))
            except TimeoutError:
                raise Unreachable(f"the Edge at {self.address} did not answer {op} within {timeout} s") from None
            return head["result"], data

    async def stream(self, op: str, args: dict[str, Any]) -> AsyncIterator[tuple[str, bytes]]:
        async with self._ask(op, *beside(args), True) as queue:
            while True:
                head, data = self._open(await queue.get())
                yield head["event"], data
                if head["event"] == "result":
                    return

    def _open(self, item: Item | None) -> Item:
        if item is None:
            raise Unreachable(f"the Edge at {self.address} went away")
        if "error" in item[0]:
            raise from_wire(item[0]["error"])
        return item

    async def close(self) -> None:
        if self._reading:
            self._reading.cancel()
        if self._writer:
            self._writer.close()


def encode(head: dict[str, Any], data: bytes = b"") -> bytes:
    """One message as bytes, for bodies of HTTP."""
    return message(head, data)


def decode(body: bytes) -> Item:
    """The inverse of `encode`. Raises ValueError."""
    if len(body) < 8:
        raise ValueError("a message has at least 8 bytes")
    size, more = int.from_bytes(body[:4], "little"), int.from_bytes(body[4:8], "little")
    if len(body) != 8 + size + more:
        raise ValueError(f"{len(body)} bytes are no message of 8 + {size} + {more}")
    return json.loads(body[8 : 8 + size]), body[8 + size :]
