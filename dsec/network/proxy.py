"""The one way out of a sandbox: a proxy in the Edge, for HTTP (CONNECT and plain) and SOCKS5, that obeys a policy.

A sandbox has no network interface at all, so nothing has to be filtered: programs inside talk to a port on their own
loopback, the agent carries the bytes to here, and only what this file connects to is ever reached. A name is looked up
once, here, and the address that was judged is the address that is connected to. TCP only; no names are resolved inside.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from dsec.errors import DsecError, Forbidden, InvalidRequest
from dsec.guest.streams import Stream, splice
from dsec.network.policy import Policy, host_name, plain

PORT = 3128
"""Of the proxy, inside."""
HEAD, SECONDS = 16 << 10, 15.0
"""Bytes of a request's head, and seconds for it, for the lookup and for the connection."""
_URL = f"http://127.0.0.1:{PORT}"
ENV = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _URL)
ENV |= dict.fromkeys(("all_proxy", "ALL_PROXY"), f"socks5h://127.0.0.1:{PORT}")
ENV |= dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1,::1")
"""What programs inside are told."""
_HOP = ("proxy-connection", "proxy-authorization", "connection", "keep-alive", "host", "upgrade")
Resolve = Callable[[str, int], Awaitable[list[str]]]
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name, as this host sees it."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Proxy:
    """Serves the streams of one sandbox."""

    def __init__(self, policy: Policy, resolve: Resolve = resolve) -> None:
        self.policy, self._resolve = policy, resolve

    async def serve(self, stream: Stream) -> None:
        """One connection of a program inside, from its first byte to its end."""
        async with asyncio.timeout(SECONDS):
            data = await stream.read()
        if data[:1] == b"\x05":
            await self._socks(stream, data)
        elif data:
            await self._http(stream, data)

    async def addresses(self, host: str, port: int) -> list[str]:
        """Where a host may be reached, after the policy. Raises Forbidden with the reason."""
        try:
            literal = [ipaddress.ip_address(host.strip("[]").partition("%")[0])]
        except ValueError:
            name = host_name(host)
            named = self.policy.knows(name, port)
            if not named and not self.policy.internet:
                raise Forbidden(f"{name}:{port} is not in the sandbox's network policy") from None
            try:
                found = [ipaddress.ip_address(each.partition("%")[0]) for each in await self._resolve(name, port)]
            except OSError as error:
                raise DsecError(f"{name} does not resolve: {error}") from None
        else:
            found, named = literal, False
        refusals = {str(each): self.policy.refusal(each, port, named) for each in map(plain, found)}
        allowed = [address for address, refusal in refusals.items() if not refusal]
        if not allowed:
            raise Forbidden(f"{host}:{port}: {'; '.join(refusals.values()) or 'no address'}")
        return allowed

    async def connect(self, host: str, port: int) -> Ends:
        """A connection to the first allowed address that answers. Raises Forbidden, or DsecError when none does."""
        problem: Exception | None = None
        async with asyncio.timeout(SECONDS):
            for address in await self.addresses(host, port):
                try:
                    return await asyncio.open_connection(address, port)
                except OSError as error:
                    problem = error
        raise DsecError(f"{host}:{port} cannot be reached: {problem}")

    # HTTP

    async def _http(self, stream: Stream, data: bytes) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                while b"\r\n\r\n" not in data:
                    if len(data) > HEAD or not (more := await stream.read()):
                        raise InvalidRequest("this is no HTTP request")
                    data += more
            head, _, rest = data.partition(b"\r\n\r\n")
            host, port, first = _request(head.decode("latin-1"))
            ends = await self.connect(host, port)
        except (DsecError, TimeoutError) as error:
            known: dict[type[BaseException], str] = {Forbidden: "403 Forbidden", InvalidRequest: "400 Bad Request"}
            text = f"dsec: {error or 'no answer in time'}\n".encode()
            fields = f"HTTP/1.1 {known.get(type(error), '502 Bad Gateway')}\r\n"
            fields += f"Content-Type: text/plain\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n"
            await stream.write(fields.encode() + text)
            stream.end()
            return
        if first is None:
            await stream.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        ends[1].write((first or b"") + rest)
        await splice(stream, *ends)

    # SOCKS5 (RFC 1928), without authentication, CONNECT only

    async def _socks(self, stream: Stream, data: bytes) -> None:
        async def exactly(count: int) -> bytes:
            nonlocal data
            while len(data) < count:
                if not (more := await stream.read()):
                    raise ConnectionResetError("the request ended early")
                data += more
            part, data = data[:count], data[count:]
            return part

        async with asyncio.timeout(SECONDS):
            await exactly((await exactly(2))[1])
            await stream.write(b"\x05\x00")
            _, command, _, kind = await exactly(4)
            if kind == 3:
                host = (await exactly((await exactly(1))[0])).decode("latin-1")
            else:
                host = str(ipaddress.ip_address(await exactly({1: 4, 4: 16}.get(kind, 0))))
            port = int.from_bytes(await exactly(2), "big")
        code = 0 if command == 1 else 7
        ends: Ends | None = None
        if not code:
            try:
                ends = await self.connect(host, port)
            except Forbidden:
                code = 2
            except (DsecError, TimeoutError):
                code = 4
        await stream.write(bytes((5, code, 0, 1, 0, 0, 0, 0, 0, 0)))
        if ends is None:
            stream.end()
            return
        ends[1].write(data)
        await splice(stream, *ends)


def _request(head: str) -> tuple[str, int, bytes | None]:
    """Host, port, and the head to send on (None for CONNECT) of a proxy request. The Host field is the URL's: a request
    cannot be for one host and say another. Raises InvalidRequest."""
    lines = head.split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise InvalidRequest("this is a proxy; its requests are CONNECT host:port or GET http://host/")
    method, target, version = parts
    try:
        url = urlsplit(f"//{target}" if method == "CONNECT" else target)
        host, port = url.hostname, url.port
    except ValueError:
        raise InvalidRequest(f"{target!r:.100} is no address") from None
    if not host or (method == "CONNECT" and port is None) or (method != "CONNECT" and url.scheme != "http"):
        raise InvalidRequest(f"{method} {target!r:.100} is not a request to a proxy")
    if method == "CONNECT":
        assert port is not None
        return host, port, None
    kept = [line for line in lines[1:] if line.partition(":")[0].strip().lower() not in _HOP]
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    authority = url.netloc.rpartition("@")[2]
    head = "\r\n".join([f"{method} {path} {version}", f"Host: {authority}", *kept, "Connection: close", "", ""])
    return host, port or 80, head.encode("latin-1")
