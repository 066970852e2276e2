"""Ports of sandboxes for clients that reach only the API server: client -> this -> Edge -> agent -> port inside.

    http://SERVER:N/LABEL/path     http://LABEL.DOMAIN/path with `dsec serve --domain`     CONNECT LABEL:PORT (any TCP)

LABEL is PORT-ID-TOKEN, as get_host returns it, or PORT-ID with the project's key as X-API-Key. The token is the
sandbox's, good as long as it lives; which ports are open is for its policy (allow_in) to say, and its Edge asks it.
One request a connection: its head is read and changed, all that follows is carried as bytes both ways, so bodies stream
and WebSockets work. A listener of its own, because pages from a sandbox must not share an origin with the fleet page.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
from dataclasses import dataclass

from dsec.api.service import Service
from dsec.cluster.link import Ends
from dsec.errors import Capacity, DsecError, Forbidden, InvalidRequest, to_wire

HEAD, SECONDS, PIECE = 1 << 16, 10.0, 1 << 16
"""Bytes of a request's head; seconds for it; bytes carried at once."""
MOST = 2000
"""Connections of one server; a sandbox takes 128 (dsec/guest/streams.py)."""
LABEL = re.compile(r"(\d{1,5})-([0-9a-z]+)(?:-([a-z2-7]{24}))?")
KEYS = ("x-api-key", "e2b-traffic-access-token")
"""Where a request whose label has no token says who asks; none of them reaches the sandbox."""
HOP = ("connection", "keep-alive", "proxy-connection", "proxy-authorization", "host", "x-forwarded-host")


@dataclass
class Request:
    """The head of one: what it asks for, and with what right."""

    port: int
    id: str
    token: str
    headers: dict[str, str]
    first: bytes
    """What is sent on in its place; b"" for CONNECT."""


class Ports:
    """Serves them for one API server; `dsec.api.app` starts and closes it."""

    def __init__(
        self, service: Service, host: str = "127.0.0.1", port: int = 0, domain: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        """``domain``: NAME[:PORT] below which every name leads here (a wildcard in DNS); ``tls``: speak it, and no
        other."""
        self._tls = tls
        self._service, self._where, self.domain = service, (host, port), domain.lower()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._client, *self._where, limit=HEAD, ssl=self._tls)

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def address(self, id: str, port: int) -> str:
        """What get_host returns; without a domain it begins with ":", and the server's own name belongs before it."""
        label = f"{port}-{id}-{self._service.ticket(id)}"
        return f"{label}.{self.domain}" if self.domain else f":{self.port}/{label}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if len(self._open) <= 2 * MOST:  # beyond that nobody is even heard
                await self._serve(reader, writer)
        except (OSError, EOFError, asyncio.LimitOverrunError, TimeoutError):
            pass  # it went away, or said nothing that is a head in time
        except asyncio.CancelledError:  # the server closes; nobody awaits this task but `close`
            pass
        finally:
            self._open.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
            if len(self._open) > MOST:
                raise Capacity(f"{MOST} connections are open", retry=1.0)
            asked = parse(head.decode("latin-1"), self.domain)
            inside = await self._tunnel(asked)
        except DsecError as error:
            writer.write(refusal(error))
            await writer.drain()
            return
        if link := writer.get_extra_info("socket"):  # a client that vanished is noticed in the end
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if asked.first:
            inside[1].write(asked.first)
        else:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await splice((reader, writer), inside, not asked.first)

    async def _tunnel(self, asked: Request) -> Ends:
        """A connection to that port inside, for whoever may have it."""
        if asked.token:
            project = None if self._service.is_ticket(asked.id, asked.token) else ""
        else:
            given = [asked.headers[name] for name in KEYS if name in asked.headers]
            if given and self._service.is_ticket(asked.id, given[0]):
                project = None
            else:
                project = (await self._service.who(given[0])).project if given else ""
        if project == "":
            raise Forbidden("that needs the token of get_host, or the project's key as X-API-Key")
        return await self._service.tunnel(await self._service.row(project, asked.id), asked.port)


def parse(head: str, domain: str) -> Request:
    """A request's head. Raises InvalidRequest."""
    lines = head[:-4].split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1.") or any("\n" in line or "\r" in line for line in lines):
        raise InvalidRequest("this is no HTTP/1 request")
    method, path, version = parts
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    host, prefix = headers.get("host", "").lower(), ""
    if method == "CONNECT":
        label = path.rpartition(":")[0].lower().removesuffix("." + domain.partition(":")[0])
    elif domain and host.partition(":")[0].endswith("." + domain.partition(":")[0]):
        label = host.partition(".")[0]
    else:
        label, slash, rest = path.removeprefix("/").partition("/")
        label, mark, query = label.partition("?")
        prefix, path = "/" + label, "/" + rest if slash else f"/{mark}{query}"
    found = LABEL.fullmatch(label)
    if found is None or not 0 < int(found[1]) < 65536:
        raise InvalidRequest(f"{label!r:.100} is not PORT-ID-TOKEN, as get_host returns it")
    upgrade = "upgrade" in headers.get("connection", "").lower() and "upgrade" in headers
    dropped = HOP if found[3] else HOP + KEYS
    kept = [line for line in lines[1:] if line.partition(":")[0].strip().lower() not in dropped]
    kept += [f"X-Forwarded-Host: {host}", *([f"X-Forwarded-Prefix: {prefix}"] if prefix else [])]
    kept += [f"Connection: {'Upgrade' if upgrade else 'close'}", "", ""]
    first = "\r\n".join([f"{method} {path} {version}", f"Host: localhost:{found[1]}", *kept]).encode("latin-1")
    return Request(int(found[1]), found[2], found[3] or "", headers, b"" if method == "CONNECT" else first)


def refusal(error: DsecError) -> bytes:
    """An error as an answer. One of ours is told from one of the sandbox's by its type."""
    body = json.dumps(to_wire(error)).encode()
    status = max(400, error.status)
    return (
        f"HTTP/1.1 {status} {type(error).__name__}\r\nContent-Type: application/vnd.dsec.error+json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body


async def splice(client: Ends, inside: Ends, connect: bool) -> None:
    """Carries bytes both ways. With CONNECT, or once the answer has changed the protocol, until both directions have
    ended; else until the answer has, whose head says that the connection ends with it."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(PIECE):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    there = asyncio.ensure_future(carry(client[0], inside[1]))
    back: asyncio.Future[None] | None = None
    try:
        head, changed = (b"", True) if connect else await answer_head(inside[0])
        client[1].write(head)
        back = asyncio.ensure_future(carry(inside[0], client[1]))
        await (asyncio.gather(there, back) if changed else back)
    finally:
        for task in (there, back):
            if task is not None:
                task.cancel()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await task
        inside[1].close()


async def answer_head(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """The head of an answer, with 1xx ones before it, and whether it changes the protocol."""
    said = b""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (EOFError, asyncio.LimitOverrunError):
            return refusal(DsecError("the sandbox's port does not answer in HTTP")), False
        first, *lines = head[:-4].split(b"\r\n")
        status = first.split(b" ", 2)[1:2]
        if not first.startswith(b"HTTP/1.") or status == [b"101"]:
            return said + head, status == [b"101"]
        if status and status[0].startswith(b"1"):
            said += head
            continue
        kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in (b"connection", b"keep-alive")]
        return said + b"\r\n".join([first, *kept, b"Connection: close", b"", b""]), False
