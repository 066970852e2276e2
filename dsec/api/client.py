"""The SDK's way to an API server: the same operations as over the Edge's socket, as HTTP."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

from dsec.api.http import BROKEN, HttpClient
from dsec.cluster.link import Unreachable, decode, encode
from dsec.edge.server import beside
from dsec.errors import DsecError, from_wire

Event = tuple[str, bytes]


class RemoteTransport:
    """``url`` and ``key`` default to DSEC_URL and DSEC_API_KEY. A command may take as long as it likes; only
    connecting, sending and a create's wait have limits. Connections are kept for `keepalive` seconds."""

    def __init__(
        self, url: str = "", key: str = "", connections: int = 200, connect: float = 10.0, keepalive: float = 60.0
    ) -> None:
        url, key = url or os.environ.get("DSEC_URL", ""), key or os.environ.get("DSEC_API_KEY", "")
        if not url or not key:
            raise ValueError("a remote sandbox needs DSEC_URL and DSEC_API_KEY")
        self._client = HttpClient(url.rstrip("/"), {"x-api-key": key}, connections, connect, keepalive)

    async def call(self, op: str, args: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Raises the DsecError that the Edge or the server raised, or Unreachable."""
        try:
            async with self._client.post(f"/v1/ops/{op}", encode(args, data)) as answer:
                body = await answer.read()
        except BROKEN as error:
            raise self._lost(error) from error
        if answer.status != 200:
            raise self._error(answer.status, body)
        found, out = decode(body)
        if op == "get_host" and str(found.get("host")).startswith(":"):  # a port of the server itself
            found["host"] = self._client.host + found["host"]
        if op == "files.url":
            found["url"] = self._client.url + found["url"]
        return found, out

    async def stream(self, op: str, args: dict[str, Any]) -> AsyncIterator[Event]:
        try:
            async with self._client.post(f"/v1/streams/{op}", encode(*beside(args))) as answer:
                if answer.status != 200:
                    raise self._error(answer.status, await answer.read())
                rest, result = b"", None
                async for piece in answer.pieces():
                    rest += piece
                    while len(rest) >= 8 and len(rest) >= (end := 8 + _size(rest, 0) + _size(rest, 4)):
                        head, data = decode(rest[:end])
                        rest = rest[end:]
                        if "error" in head:
                            raise from_wire(head["error"])
                        if head["event"] == "result":
                            result = data
                        else:
                            yield head["event"], data
        except BROKEN as error:
            raise self._lost(error) from error
        if result is None:
            raise Unreachable("the stream ended without a result")
        yield "result", result  # here: the connection is free for the next call

    async def close(self) -> None:
        await self._client.close()

    def _lost(self, error: Exception) -> Unreachable:
        return Unreachable(f"{self._client.url}: {type(error).__name__} {error}")

    @staticmethod
    def _error(status: int, body: bytes) -> DsecError:
        try:
            answer = json.loads(body)
        except ValueError:
            return Unreachable(f"HTTP {status}: {body[:200]!r}")
        known = isinstance(answer, dict) and "error" in answer
        return from_wire(answer) if known else Unreachable(f"HTTP {status}: {answer}")


def _size(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
