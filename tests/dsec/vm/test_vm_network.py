"""The network of a machine: the same proxy and forwarding, through the agent's port; still no network device."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest
from vm_bench import SPEC, Bench, shell

from dsec.errors import InvalidRequest
from dsec.network.policy import parse
from dsec.network.proxy import PORT, Proxy
from tests.dsec.conftest import soon


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the host says hello " * 50_000)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def test_10_a_policy_reaches_what_it_lists_and_a_fork_starts_with_none(bench: Bench, port: int) -> None:
    # by hand: Debian's static busybox cannot resolve names, and its wget falls over even for addresses
    ask = "GET http://127.0.0.1:%d/ HTTP/1.0\r\n\r\n"
    fetch = f"printf '{ask}' | nc -w 20 127.0.0.1 {PORT} > /tmp/got; head -n 1 /tmp/got; wc -c < /tmp/got"

    async def work() -> None:
        machine = await bench.create(SPEC.but(network=(f"127.0.0.1:{port}",)))
        assert (await shell(machine, fetch % port))[1].split()[-1] == "0", "the gate opens when the Edge says so"
        machine.agent.streams.accept = Proxy(parse((f"127.0.0.1:{port}",))).serve
        await machine.agent.streams.gate(PORT)
        assert (await shell(machine, fetch % port))[1].split()[-1] > "1000000"
        assert "403" in (await shell(machine, fetch % (port + 1)))[1]
        assert (await shell(machine, "ls /sys/class/net"))[1] == "lo\n"
        await machine.snapshot(snapshot := bench.folder() / "s")
        fork = await bench.create(SPEC, snapshot)
        _, out = await shell(fork, fetch % port)
        assert out.split()[-1] == "0", "its own Edge has not allowed it anything"
        await asyncio.gather(machine.destroy(), fork.destroy())

    bench.run(work())


def test_a_port_of_a_machine_is_reached_from_the_host(bench: Bench) -> None:
    async def work() -> None:
        machine = await bench.create()
        machine.agent.exec('while :; do echo "it is $(uname -s)" | nc -l -p 8000; done', lambda kind, data: None)

        async def said() -> bytes:
            words = b""
            with contextlib.suppress(InvalidRequest, ConnectionResetError):  # it does not listen yet, or not again
                stream = await machine.agent.streams.connect(8000)
                stream.end()
                while part := await stream.read():
                    words += part
            return words

        assert await soon(said) == b"it is Linux\n"
        with pytest.raises(InvalidRequest, match="refused"):
            await machine.agent.streams.connect(8001)
        await machine.destroy()

    bench.run(work())
