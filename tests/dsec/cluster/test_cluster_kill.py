"""kill -9 of a real API server, over and over, while clients create: one sandbox for each key, none twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dsec.api.service import new_key
from dsec.client import EmbeddedTransport
from dsec.cluster.store import Project, Store, open_store
from tests.dsec.conftest import PATIENCE, reachable, until

KEYS, KILLS = 24, 4


class Server:
    """`dsec serve` with the Edge of this host, as a process."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.key = folder, new_key(store, "p")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # an Edge that compares itself with the store every second; the servers find it there
        edge = "from dsec.cluster import node; node.LOOK = 1.0; node.main()"
        command = [sys.executable, "-c", edge, "--home", str(folder), "--store", f"sqlite:{folder}/cluster.db"]
        self.edge = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert self.edge.stdout is not None and b"address" in self.edge.stdout.readline()
        self.start()

    def start(self) -> None:
        command = "from dsec.cli import main; main()"
        serve = ["serve", "--port", str(self.port), "--home", str(self.folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, *serve], env={**os.environ, "DSEC_HOME": str(self.folder)},
            stdout=(self.folder / "serve.log").open("ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=2, verify=False).status_code < 500:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < end and self.process.poll() is None, (self.folder / "serve.log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    reachable(tmp_path)
    store = open_store(f"sqlite:{tmp_path}/cluster.db")
    store.put_project(Project("p", max_live=100))
    made = Server(tmp_path, store)
    yield made
    store.close()
    made.kill()

    async def over() -> None:  # the Edge is a process of its own
        transport = EmbeddedTransport(tmp_path)
        await transport.call("shutdown", {"destroy": True})
        await transport.close()

    asyncio.run(over())
    assert made.edge.wait() == 0


def test_a_killed_server_makes_nothing_twice(server: Server) -> None:
    """Clients repeat a create with its key until they hear of it."""
    heard: dict[str, str] = {}

    def client(number: int) -> None:
        body = {"substrate": "function", "image": "resident", "timeout": 600}
        headers = {"x-api-key": server.key, "idempotency-key": f"k{number}"}
        http = httpx.Client(headers=headers, timeout=10, verify=False)  # a new one for each try starves the server
        while f"k{number}" not in heard:
            try:
                answer = http.post(f"{server.url}/v1/sandboxes", json=body)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code == 201:
                heard[f"k{number}"] = answer.json()["id"]
            time.sleep(0.05)
        http.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(KEYS)]
    for turn in range(KILLS):
        for thread in threads[turn::KILLS]:
            thread.start()
        time.sleep(random.Random(turn).uniform(0.1, 0.4))
        server.kill()
        server.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert len(heard) == KEYS == len(set(heard.values())), "a key got no sandbox of its own"
    with httpx.Client(headers={"x-api-key": server.key}, timeout=60) as http:

        def live() -> set[str]:
            return {box["id"] for box in http.get(f"{server.url}/v1/sandboxes").json()["sandboxes"]}

        until(lambda: live() == set(heard.values()))  # the Edge clears up a row whose server died before it asked it
