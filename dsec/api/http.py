"""HTTP/1.1 as the SDK needs it: POST on kept connections, answers whole or in pieces. No redirects, cookies or proxies.

Its own, because the round trip is what a warm sandbox costs: a POST of 300 bytes to a bare ASGI application took httpx
1.01 ms and the same bytes on asyncio streams 0.17 ms (medians of 1,000, one loopback connection, 2 cores, 2026-11-26).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

MAX_HEAD = 1 << 16
Headers = dict[str, str]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
BROKEN = (OSError, EOFError, ValueError, asyncio.LimitOverrunError)
"""What `HttpClient` raises when a server cannot be reached, goes away, or does not speak HTTP."""


class Answer:
    """A status, and a body that is read once: `pieces` as they come, or `read`."""

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers
        self._reader = reader
        self.over = False
        """The whole body was read, so the connection may carry the next request."""

    async def pieces(self) -> AsyncIterator[bytes]:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield await self._reader.readexactly(size)
                await self._reader.readexactly(2)
            while await self._reader.readuntil(b"\r\n") != b"\r\n":
                pass
        elif "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left:
                piece = await self._reader.read(min(left, 1 << 20))
                if not piece:
                    raise EOFError(f"the answer ended {left} bytes early")
                left -= len(piece)
                yield piece
        else:
            raise ValueError("an answer of unknown length")
        self.over = True

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


class HttpClient:
    """Connections to one server: at most ``most`` at once, those in excess wait; idle ones live ``keep`` seconds."""

    def __init__(self, url: str, headers: Headers, most: int = 200, connect: float = 10.0, keep: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a server is http://HOST[:PORT] or https://..., not {url!r}")
        self.url, self._path = url, parts.path.rstrip("/")
        self._where = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        given = {"host": self.host if parts.port is None else f"{self.host}:{parts.port}", **headers}
        if any(char in name + value for name, value in given.items() for char in "\r\n\0"):
            raise ValueError("a header holds a line break")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        self._idle: list[tuple[float, Connection]] = []
        self._places = asyncio.Semaphore(most)
        self._connect, self._keep = connect, keep

    @contextlib.asynccontextmanager
    async def post(self, path: str, body: bytes, write: float = 60.0) -> AsyncIterator[Answer]:
        """The answer to a POST. Raises one of `BROKEN`, or TimeoutError (an OSError) when connecting takes longer than
        ``connect`` seconds or the server takes nothing for ``write``. An answer may take as long as it likes."""
        async with self._places:
            reader, writer = self._kept() or await self._open()
            answer: Answer | None = None
            try:
                head = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}content-length: {len(body)}\r\n\r\n".encode()
                writer.write(head + body)
                async with asyncio.timeout(write + len(body) / 1e5):
                    await writer.drain()
                answer = await _head(reader)
                yield answer
            finally:
                if answer is not None and answer.over and answer.headers.get("connection", "").lower() != "close":
                    self._idle.append((time.monotonic(), (reader, writer)))
                else:
                    writer.close()

    def _kept(self) -> Connection | None:
        """The youngest idle connection that the server has not closed."""
        while self._idle:
            since, (reader, writer) = self._idle.pop()
            if time.monotonic() - since < self._keep and not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return None

    async def _open(self) -> Connection:
        async with asyncio.timeout(self._connect):
            return await asyncio.open_connection(*self._where, ssl=self._tls, limit=1 << 20)

    async def close(self) -> None:
        for _, (_, writer) in self._idle:
            writer.close()
        self._idle.clear()


async def _head(reader: asyncio.StreamReader) -> Answer:
    while True:
        text = await reader.readuntil(b"\r\n\r\n")
        if len(text) > MAX_HEAD:
            raise ValueError(f"an answer's head of {len(text)} bytes")
        first, *lines = text[:-4].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise ValueError(f"not HTTP: {first[:80]!r}")
        if rest[0] != "1":  # 1xx only announces
            pairs = (line.partition(":") for line in lines)
            return Answer(reader, int(rest[:3]), {name.lower(): value.strip() for name, _, value in pairs})
