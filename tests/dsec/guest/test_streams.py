"""The host's end of streams against a hostile guest: windows, acknowledgements, numbers, and what is never kept."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

import pytest

from dsec.errors import InvalidRequest, SandboxFailed
from dsec.guest.protocol import Agent
from dsec.guest.streams import STREAMS, WINDOW, Stream, Streams

FIRST = 1 << 31


class Sent:
    """Takes an agent's place: remembers the frames."""

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, int, bytes]] = []

    def send(self, kind: bytes, id: int, payload: bytes = b"") -> None:
        self.frames.append((kind, id, payload))


def opened(accept: Any) -> tuple[Streams, Sent]:
    sent = Sent()
    streams = Streams(cast(Agent, sent))
    streams.accept = accept
    streams.take(b"o", FIRST, b"")
    return streams, sent


async def hold(stream: Stream) -> None:
    await asyncio.sleep(600)


LIES: dict[str, list[tuple[bytes, int, bytes]]] = {
    "more than the window": [(b"t", FIRST, b"x" * (WINDOW // 2))] * 3,
    "bytes after the end": [(b"e", FIRST, b""), (b"t", FIRST, b"x")],
    "an acknowledgement of nothing": [(b"a", FIRST, struct.pack("<I", 1))],
    "a short acknowledgement": [(b"a", FIRST, b"\0")],
    "the same stream twice": [(b"o", FIRST, b"")],
    "a number of the host's": [(b"o", 7, b"")],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_the_sandbox(lie: str) -> None:
    async def work() -> None:
        streams, _ = opened(hold)
        with pytest.raises(SandboxFailed):
            for kind, id, payload in LIES[lie]:
                streams.take(kind, id, payload)

    asyncio.run(work())


def test_streams_nobody_accepts_or_too_many_are_refused() -> None:
    async def work() -> None:
        _, sent = opened(None)
        assert sent.frames == [(b"c", FIRST, b"")]
        streams, sent = opened(hold)
        for n in range(1, STREAMS + 10):
            streams.take(b"o", FIRST + n, b"")
        assert len(streams.open) == STREAMS
        assert sent.frames == [(b"c", FIRST + n, b"") for n in range(STREAMS, STREAMS + 10)]
        streams.take(b"t", FIRST + STREAMS + 1, b"x" * 100)  # of one that was refused: dropped
        assert len(streams.open) == STREAMS

    asyncio.run(work())


def test_a_writer_waits_for_the_guest() -> None:
    async def work() -> None:
        streams, sent = opened(hold)
        stream = streams.open[FIRST]
        writing = asyncio.ensure_future(stream.write(b"y" * (WINDOW + 10)))
        await asyncio.sleep(0.01)
        assert not writing.done() and sum(len(payload) for _, _, payload in sent.frames) == WINDOW
        streams.take(b"a", FIRST, struct.pack("<I", 10))
        await asyncio.wait_for(writing, 60)
        streams.take(b"c", FIRST, b"")
        with pytest.raises(ConnectionResetError):
            await stream.write(b"z")
        with pytest.raises(ConnectionResetError):
            await stream.read()

    asyncio.run(work())


def test_a_port_is_a_port() -> None:
    async def work() -> None:
        streams, _ = opened(None)
        for port in (0, -1, 65536):
            with pytest.raises(InvalidRequest):
                await streams.connect(port)

    asyncio.run(work())
