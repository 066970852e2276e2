"""A real API server over HTTP in front of two real Edges (function and, where it works, container sandboxes)."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from dsec.api.app import make_app
from dsec.api.ports import Ports
from dsec.api.service import Service, new_key
from dsec.cluster.leases import Terms
from dsec.cluster.node import Door, Node
from dsec.cluster.store import Budget, Edge, Project, Store, open_store
from dsec.edge.edge import Edge as HostEdge
from tests.dsec.conftest import PATIENCE, reachable

TERMS = Terms(renew=0.2, fence=60.0, lost=70.0, ttl=80.0)  # a busy machine may stand still for seconds


@dataclass
class Cluster:
    """A running server, its store, and keys of two projects."""

    url: str
    store: Store
    service: Service
    nodes: list[Node]
    loop: asyncio.AbstractEventLoop
    red: str
    blue: str
    admin: str

    def client(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-api-key": key}, timeout=60)

    def run(self, work: object) -> object:
        """A coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("api")
    reachable(folder)
    store = open_store(f"sqlite:{folder}/cluster.db")
    for name, limit in (("red", 6), ("blue", 1000)):
        store.put_project(Project(name, max_live=limit))
    service, loop = Service(store, "secret", wait=20, terms=TERMS), asyncio.new_event_loop()
    nodes: list[Node] = []

    async def serve() -> None:
        doors = []
        for name in ("one", "two"):
            home = folder / name
            home.mkdir(mode=0o711)
            edge = HostEdge(home, name)
            await edge.start()
            place = Edge(name, address=f"unix:{home}/edge.sock", capacity=Budget(20, 64_000, 0, 4000))
            node = Node(edge, store, place, TERMS)
            door = Door(node, home / "edge.sock", "secret")
            doors.append(asyncio.create_task(door.run()))
            await node.start()
            nodes.append(node)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        await server.serve()
        for node in nodes:
            await node.stop(destroy=True)
        for task in doors:
            task.cancel()

    ports = Ports(service)
    config = uvicorn.Config(make_app(service, ports), port=0, log_level="warning", http="h11")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not (server.started and service.control.edges and len(service.control.placement) == 2):
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    keys = [new_key(store, "red"), new_key(store, "blue"), new_key(store, "red", admin=True)]
    yield Cluster(f"http://127.0.0.1:{port}", store, service, nodes, loop, *keys)
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the server does not end"
    store.close()
    shutil.rmtree(folder, ignore_errors=True)
