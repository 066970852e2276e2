"""The SDK's HTTP client against servers that answer byte for byte what a test says, cut anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from dsec.api.http import BROKEN, HttpClient

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nTrailer: t\r\n\r\n"
ANNOUNCED = b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH


class Scripted:
    """Answers the nth request with answers[n]; counts connections. `piece`: bytes a write sends at once."""

    def __init__(self, *answers: bytes, piece: int = 1 << 20, closes: bool = False) -> None:
        self.answers, self.piece, self.closes = list(answers), piece, closes
        self.connections, self.open, self.most = 0, 0, 0
        self.requests: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.open += 1
                self.most = max(self.most, self.open)
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(size))
                await asyncio.sleep(0.01)
                answer = self.answers.pop(0)
                self.open -= 1
                for at in range(0, len(answer), self.piece):
                    writer.write(answer[at : at + self.piece])
                    await writer.drain()
                    if self.piece < 1 << 20:
                        await asyncio.sleep(0)
                if self.closes:
                    break
        except (asyncio.IncompleteReadError, IndexError, ConnectionError):
            pass
        writer.close()


def against(script: Scripted, work: Callable[[HttpClient], Awaitable[None]], most: int = 10) -> None:
    async def main() -> None:
        server = await asyncio.start_server(script, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = HttpClient(f"http://127.0.0.1:{port}/base", {"x-api-key": "k"}, most=most)
        async with asyncio.timeout(60):
            await work(client)
        await client.close()
        server.close()

    asyncio.run(main())


async def ask(client: HttpClient) -> bytes:
    async with client.post("/x", b"body") as answer:
        assert answer.status == 200
        return await answer.read()


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("answer", [LENGTH, CHUNKED, ANNOUNCED])
def test_an_answer_cut_anywhere_is_the_same_and_its_connection_is_used_again(answer: bytes, piece: int) -> None:
    script = Scripted(answer, answer, answer, piece=piece)

    async def work(client: HttpClient) -> None:
        assert [await ask(client) for _ in range(3)] == [b"hello"] * 3

    against(script, work)
    assert script.connections == 1
    assert script.requests[0].startswith(b"POST /base/x HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"x-api-key: k\r\n" in script.requests[0] and script.requests[0].endswith(b"\r\n\r\nbody")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        LENGTH[:-1],
        CHUNKED[:-8],
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        CHUNKED.replace(b"2\r\nhe", b"xy\r\n"),
        LENGTH.replace(b"5", b"-"),
    ],
)
def test_what_is_no_whole_answer_is_an_error_and_the_connection_is_dropped(answer: bytes) -> None:
    script = Scripted(answer, closes=True)

    async def work(client: HttpClient) -> None:
        with pytest.raises(BROKEN):
            await ask(client)
        script.answers, script.closes = [LENGTH], False
        assert await ask(client) == b"hello"

    against(script, work)
    assert script.connections == 2


def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    script = Scripted(LENGTH, LENGTH, closes=True)

    async def work(client: HttpClient) -> None:
        assert await ask(client) == b"hello"
        await asyncio.sleep(0.05)
        assert await ask(client) == b"hello"

    against(script, work)
    assert script.connections == 2


def test_an_answer_half_read_does_not_reach_the_next_request() -> None:
    script = Scripted(CHUNKED, LENGTH)

    async def work(client: HttpClient) -> None:
        async with client.post("/x", b"") as answer:
            async for piece in answer.pieces():
                assert piece == b"he"
                break
        assert await ask(client) == b"hello"

    against(script, work)
    assert script.connections == 2


def test_no_more_requests_at_once_than_allowed() -> None:
    script = Scripted(*[LENGTH] * 20)

    async def work(client: HttpClient) -> None:
        assert await asyncio.gather(*(ask(client) for _ in range(20))) == [b"hello"] * 20

    against(script, work, most=3)
    assert script.most == script.connections == 3


def test_what_is_no_server_or_no_header_is_refused() -> None:
    for url, key in (("ftp://x", "k"), ("http://", "k"), ("http://x", "k\r\nhost: y")):
        with pytest.raises(ValueError):
            HttpClient(url, {"x-api-key": key})
