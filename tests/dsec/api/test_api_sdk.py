"""The SDK against the API server: the same program as on one host, and what only a cluster can get wrong."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from conftest import Cluster

from dsec.api.client import RemoteTransport
from dsec.cluster.link import Unreachable, decode, encode
from dsec.errors import DsecError, Forbidden, InvalidRequest, NotFound, QuotaExceeded, SandboxFailed, StateLost
from dsec.sandbox import AsyncSandbox
from dsec.types import SandboxQuery
from tests.dsec.conftest import soon

SPEC: dict[str, Any] = {"substrate": "container", "timeout": 120, "memory": 128, "pids": 32}


def play(cluster: Cluster, work: Callable[[RemoteTransport], Awaitable[None]], key: str = "") -> None:
    async def run() -> None:
        transport = RemoteTransport(cluster.url, key or cluster.blue)
        try:
            await work(transport)
        finally:
            for each in (await transport.call("list", {}))[0]["sandboxes"] if not key else ():
                await transport.call("kill", {"id": each["id"]})
            await transport.close()

    asyncio.run(run())


def test_the_sdk_works_the_same_over_http(cluster: Cluster) -> None:
    async def work(transport: RemoteTransport) -> None:
        box = await AsyncSandbox.create(**SPEC, metadata={"a": "b"}, transport=transport)
        pieces: list[str] = []
        result = await box.commands.run("echo one; sleep 0.2; echo two", on_stdout=pieces.append)
        assert result.stdout == "one\ntwo\n" == "".join(pieces) and len(pieces) >= 2
        await box.files.write("/tmp/f", "text")
        assert await box.files.read("/tmp/f") == "text"
        again = await AsyncSandbox.connect(box.id, transport=transport)
        assert (await again.commands.run("cat /tmp/f")).stdout == "text"
        given = b"x" * (20 << 20)  # more than a JSON head may hold
        assert int((await again.commands.run("wc -c", stdin=given)).stdout) == len(given)
        assert await box.kill() and not await box.is_running()

    play(cluster, work)


def test_urls_that_need_no_key(cluster: Cluster) -> None:
    async def work(transport: RemoteTransport) -> None:
        box = await AsyncSandbox.create(**SPEC, transport=transport)
        put, get = await box.files.upload_url("/tmp/f g"), await box.files.download_url("/tmp/f g", expires=60)
        async with httpx.AsyncClient() as client:
            assert (await client.put(put, content=b"bytes")).json() == {"path": "/tmp/f g", "size": 5}
            assert (await client.get(get)).content == b"bytes"
            assert (await client.post(put, files={"file": ("n", b"form")})).status_code == 200
            assert (await client.get(get)).content == b"form"
            assert (await client.post(put, files=[("a", b"1"), ("b", b"2")])).status_code == 400
            wrong = [put, get.replace("%2Ff", "%2Fg"), get.replace("until=", "until=9"), get[:-1], get + "0"]
            wrong.append(get.replace(box.id, "0" * 32))
            old = await box.files.download_url("/tmp/f g", expires=0.01)
            await soon(lambda: time.time() > int(old.partition("until=")[2].partition("&")[0]))
            for url in [*wrong, old]:
                assert (await client.get(url)).status_code == 403, url
            assert (await client.put(get, content=b"x")).status_code == 403, "to read is not to write"
            with pytest.raises(InvalidRequest, match="expires is a number of seconds"):
                await box.files.download_url("/f", expires=-1)
            await box.kill()
            assert (await client.get(get)).status_code == 404

    play(cluster, work)


def test_pages_and_snapshots(cluster: Cluster) -> None:
    async def work(transport: RemoteTransport) -> None:
        spec = {"substrate": "function", "metadata": {"of": "pages"}, "transport": transport}
        made = [await AsyncSandbox.create(**spec) for _ in range(3)]
        pages = await AsyncSandbox.list(SandboxQuery(metadata={"of": "pages"}), limit=2, transport=transport)
        seen = [each.id for each in await pages.next_items() + await pages.next_items()]
        assert seen == [box.id for box in made] and not pages.has_next
        box = await AsyncSandbox.create(**SPEC, transport=transport)
        taken = await box.create_snapshot()
        assert taken in await AsyncSandbox.list_snapshots(transport=transport)
        other = RemoteTransport(cluster.url, cluster.red)
        assert taken not in await AsyncSandbox.list_snapshots(transport=other)
        assert await AsyncSandbox.delete_snapshot(taken.snapshot_id, transport=other) is False
        assert await AsyncSandbox.delete_snapshot(taken.snapshot_id, transport=transport) is True
        assert taken not in await AsyncSandbox.list_snapshots(transport=transport)
        await other.close()

    play(cluster, work)


def test_errors_are_the_same_classes(cluster: Cluster) -> None:
    async def work(transport: RemoteTransport) -> None:
        with pytest.raises(NotFound):
            await transport.call("info", {"id": "x"})
        with pytest.raises(NotFound):
            async for _ in transport.stream("commands.run", {"id": "x", "command": "id"}):
                pass

    play(cluster, work)

    async def forbidden(transport: RemoteTransport) -> None:
        with pytest.raises(Forbidden):
            await transport.call("list", {})

    play(cluster, forbidden, key="wrong")

    async def quota(transport: RemoteTransport) -> None:
        made = [(await transport.call("create", {"spec": SPEC}))[0]["id"] for _ in range(6)]
        with pytest.raises(QuotaExceeded):
            await transport.call("create", {"spec": SPEC})
        for id in made:
            await transport.call("kill", {"id": id})

    play(cluster, quota, key=cluster.red)


def test_no_server_is_said() -> None:
    async def run() -> None:
        transport = RemoteTransport("http://127.0.0.1:9", "k")
        with pytest.raises(Unreachable):
            await transport.call("list", {})
        with pytest.raises(Unreachable):
            async for _ in transport.stream("commands.run", {}):
                pass

    asyncio.run(run())
    with pytest.raises(ValueError, match="DSEC_URL"):
        RemoteTransport()


def test_a_trajectory_belongs_to_its_project_and_fast_forwards(cluster: Cluster) -> None:
    """Two projects use one name; neither sees the other's log. The same program, issued again, replays."""
    spec = SPEC | {"trajectory": "run/1"}

    async def program(transport: RemoteTransport) -> tuple[str, bool]:
        answer, _ = await transport.call("create", {"spec": spec})
        assert answer["trajectory"] == "run/1"
        command = "echo x >> /tmp/n; wc -l < /tmp/n"
        result, _ = await transport.call("commands.run", {"id": answer["id"], "command": command})
        return result["stdout"].strip(), result["replayed"]

    async def work(transport: RemoteTransport) -> None:
        assert await program(transport) == ("1", False)
        assert await program(transport) == ("1", True)

    async def other(transport: RemoteTransport) -> None:
        assert await program(transport) == ("1", False)
        for each in (await transport.call("list", {}))[0]["sandboxes"]:
            await transport.call("kill", {"id": each["id"]})

    play(cluster, work)
    play(cluster, other, key=cluster.red)


def test_a_trajectory_whose_host_is_away_is_not_begun_anew(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPEC | {"trajectory": "run/2"}

    async def work(transport: RemoteTransport) -> None:
        answer, _ = await transport.call("create", {"spec": spec})
        await transport.call("kill", {"id": answer["id"]})
        here = dict(cluster.service.control.edges)
        monkeypatch.setattr(cluster.service.control, "refresh", lambda: None)
        monkeypatch.setattr(cluster.service.control, "edges", {k: v for k, v in here.items() if k != answer["host"]})
        with pytest.raises(StateLost, match="away"):
            await transport.call("create", {"spec": spec})
        monkeypatch.undo()

    play(cluster, work)


def test_an_edge_that_lost_its_lease_answers_nothing_and_comes_back(cluster: Cluster) -> None:
    async def work(transport: RemoteTransport) -> None:
        answer, _ = await transport.call("create", {"spec": SPEC})
        node = next(node for node in cluster.nodes if node.place.id == answer["host"])
        cluster.store.fence(node.place.id, node.member.lease.epoch, _seq(cluster, node.place.id), 1.0)
        for _ in range(1000):
            try:
                await transport.call("commands.run", {"id": answer["id"], "command": "true"})
            except DsecError as error:
                assert isinstance(error, SandboxFailed | NotFound) or type(error).__name__ == "Fenced", error
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("it answers on")
        await soon(lambda: node.place.id in {e.id for e in cluster.store.edges() if e.up} and not node.member.running)
        assert not [box for box in node.edge.boxes.values() if box.state == "running"]
        row = cluster.store.get("blue", answer["id"])
        assert row and row.state == "lost"

    def _seq(cluster: Cluster, name: str) -> int:
        return next(edge.seq for edge in cluster.store.edges() if edge.id == name)

    play(cluster, work)


def test_a_client_that_leaves_a_create_leaves_no_sandbox(cluster: Cluster) -> None:
    async def work(transport: RemoteTransport) -> None:
        with pytest.raises(DsecError):
            await transport.call("create", {"spec": SPEC | {"image": "no-such-image"}})
        assert (await transport.call("list", {}))[0]["sandboxes"] == []
        with cluster.client(cluster.blue) as blue:
            assert blue.post("/v1/sandboxes", params={"wait": 0}, json=SPEC).status_code == 503
        await soon(lambda: not cluster.store.sandboxes("blue"))

    play(cluster, work)


@pytest.mark.parametrize("body", [b"", b"\0" * 7, b"\1\0\0\0\0\0\0\0", encode({"a": 1}, b"xy")[:-1], b"\xff" * 30])
def test_a_message_is_whole_or_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        decode(body)
    assert decode(encode({"a": 1}, b"xy")) == ({"a": 1}, b"xy")


def test_output_in_pieces_of_any_size(cluster: Cluster) -> None:
    async def work(transport: RemoteTransport) -> None:
        answer, _ = await transport.call("create", {"spec": SPEC})
        command = "head -c 300000 /dev/zero | tr '\\0' a"
        got = [item async for item in transport.stream("commands.run", {"id": answer["id"], "command": command})]
        assert b"".join(data for kind, data in got if kind == "stdout") == b"a" * 300_000 and got[-1][0] == "result"

    play(cluster, work)


def test_a_link_needs_the_clusters_secret_on_tcp(cluster: Cluster) -> None:
    from dsec.cluster.link import Link
    from dsec.cluster.node import Door

    node = cluster.nodes[0]
    door = Door(node, node.edge.home / "x.sock", "secret")
    port = cluster.run(door.listen("127.0.0.1", 0))

    async def ask(token: str) -> dict[str, Any]:
        link = Link(f"tcp:127.0.0.1:{port}", token)
        try:
            return (await link.call("status", {}, timeout=60))[0]
        finally:
            await link.close()

    assert asyncio.run(ask("secret"))["pid"] == os.getpid()
    for wrong in ("", "secre", "secret2"):
        with pytest.raises(Unreachable):
            asyncio.run(ask(wrong))
    with pytest.raises(ValueError, match="DSEC_TOKEN"):
        cluster.run(Door(node, node.edge.home / "y.sock", "").listen("127.0.0.1", 0))
