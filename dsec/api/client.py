"""The SDK's way to an API server: the same operations as over the Edge's socket, as HTTP."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import httpx

from dsec.cluster.link import Unreachable, decode, encode
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
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers={"x-api-key": key},
            timeout=httpx.Timeout(None, connect=connect, write=60.0),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=50, keepalive_expiry=keepalive),
        )

    async def call(self, op: str, args: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Raises the DsecError that the Edge or the server raised, or Unreachable."""
        try:
            answer = await self._client.post(f"/v1/ops/{op}", content=encode(args, data))
        except httpx.TransportError as error:
            raise Unreachable(f"{self._client.base_url}: {type(error).__name__} {error}") from error
        if answer.status_code != 200:
            raise self._error(answer.status_code, answer.content)
        return decode(answer.content)

    async def stream(self, op: str, args: dict[str, Any]) -> AsyncIterator[Event]:
        try:
            async with self._client.stream("POST", f"/v1/streams/{op}", content=encode(args)) as answer:
                if answer.status_code != 200:
                    raise self._error(answer.status_code, await answer.aread())
                rest = b""
                async for piece in answer.aiter_raw():
                    rest += piece
                    while len(rest) >= 8 and len(rest) >= (end := 8 + _size(rest, 0) + _size(rest, 4)):
                        head, data = decode(rest[:end])
                        rest = rest[end:]
                        if "error" in head:
                            raise from_wire(head["error"])
                        yield head["event"], data
                        if head["event"] == "result":
                            return
        except httpx.TransportError as error:
            raise Unreachable(f"{self._client.base_url}: {type(error).__name__} {error}") from error
        raise Unreachable("the stream ended without a result")

    async def close(self) -> None:
        await self._client.aclose()

    @staticmethod
    def _error(status: int, body: bytes) -> DsecError:
        try:
            answer = httpx.Response(status, content=body).json()
        except ValueError:
            return Unreachable(f"HTTP {status}: {body[:200]!r}")
        return from_wire(answer) if "error" in answer else Unreachable(f"HTTP {status}: {answer}")


def _size(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
