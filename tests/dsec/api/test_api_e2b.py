"""E2B's own Python SDK against our server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import Cluster

from tests.dsec.conftest import soon, until

e2b = pytest.importorskip("e2b", reason="E2B's SDK is missing: pip install e2b")


@pytest.fixture
def options(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("E2B_API_URL", f"{cluster.url}/e2b")
    monkeypatch.setenv("E2B_SANDBOX_URL", f"{cluster.url}/e2b")
    return {"api_key": cluster.blue, "validate_api_key": False}


@pytest.fixture
def box(options: dict[str, Any]) -> Iterator[Any]:
    made = e2b.Sandbox.create(timeout=120, metadata={"job": "1"}, envs={"GREETING": "hello"}, **options)
    yield made
    made.kill()


def test_commands(box: Any) -> None:
    pieces: list[str] = []
    done = box.commands.run("echo $GREETING; echo oh >&2", on_stdout=pieces.append)
    assert (done.stdout, done.stderr, done.exit_code) == ("hello\n", "oh\n", 0) and "".join(pieces) == "hello\n"
    with pytest.raises(e2b.CommandExitException) as caught:
        box.commands.run("exit 7")
    assert caught.value.exit_code == 7
    assert box.commands.run("pwd; echo $X", cwd="/tmp", envs={"X": "y"}).stdout == "/tmp\ny\n"


def test_background_commands_stdin_and_kill(box: Any) -> None:
    cat = box.commands.run("cat", background=True, stdin=True)
    assert [each.pid for each in box.commands.list()] == [cat.pid]
    box.commands.send_stdin(cat.pid, "line\n")
    box.commands.close_stdin(cat.pid)
    assert cat.wait().stdout == "line\n"
    sleeper = box.commands.run("sleep 100", background=True)
    assert box.commands.kill(sleeper.pid) is True
    with pytest.raises(e2b.CommandExitException):
        sleeper.wait()
    assert box.commands.list() == [] and box.commands.kill(999999) is False


def test_a_command_past_its_time(box: Any) -> None:
    with pytest.raises(e2b.TimeoutException):
        box.commands.run("sleep 30", timeout=1)


def test_files(box: Any) -> None:
    written = box.files.write("/tmp/a/b.txt", "text")
    assert written.path == "/tmp/a/b.txt" and box.files.read("/tmp/a/b.txt") == "text"
    box.files.write("/tmp/bytes", b"\0\xff\r\n--")
    assert bytes(box.files.read("/tmp/bytes", format="bytes")) == b"\0\xff\r\n--"
    box.files.write_files([{"path": "/tmp/m/1", "data": "one"}, {"path": "/tmp/m/2", "data": "two"}])
    assert sorted(each.name for each in box.files.list("/tmp/m")) == ["1", "2"]
    assert box.files.exists("/tmp/m/1") and not box.files.exists("/tmp/m/3")
    box.files.rename("/tmp/m/1", "/tmp/m/9")
    assert box.files.read("/tmp/m/9") == "one"
    box.files.remove("/tmp/m/9")
    assert box.files.make_dir("/tmp/new") is True and box.files.get_info("/tmp/new").type == e2b.FileType.DIR
    with pytest.raises(e2b.NotFoundException):
        box.files.read("/tmp/m/9")


def test_life(box: Any, options: dict[str, Any]) -> None:
    info = box.get_info()
    assert (
        info.sandbox_id == box.sandbox_id and info.metadata == {"job": "1"} and info.state == e2b.SandboxState.RUNNING
    )
    box.set_timeout(500)
    assert (box.get_info().end_at - info.end_at).total_seconds() > 300
    again = e2b.Sandbox.connect(box.sandbox_id, **options)
    assert again.commands.run("echo same").stdout == "same\n" and again.is_running()
    assert box.kill() is True and box.kill() is False


def test_pauses_snapshots_forks_and_metrics(box: Any, options: dict[str, Any]) -> None:
    assert box.pause() is True and box.pause() is False
    assert e2b.Sandbox.connect(box.sandbox_id, **options).files.write("/tmp/kept", "x").path == "/tmp/kept"
    taken = box.create_snapshot()
    with e2b.Sandbox.create(taken.snapshot_id, **options) as other:
        assert other.files.read("/tmp/kept") == "x"
    assert e2b.Sandbox.delete_snapshot(taken.snapshot_id, **options) is True
    assert e2b.Sandbox.delete_snapshot(taken.snapshot_id, **options) is False
    (now,) = box.get_metrics()
    assert now.mem_used > 0 and now.mem_total == 1024 << 20 and now.disk_total == 512 << 20


def test_lists_with_a_query_and_pages(options: dict[str, Any]) -> None:
    made = [e2b.Sandbox.create(timeout=60, metadata={"of": "a list", "n": str(n)}, **options) for n in range(3)]
    pages = e2b.Sandbox.list(query=e2b.SandboxQuery(metadata={"of": "a list"}), limit=2, **options)
    seen = []
    while pages.has_next:
        seen.append([each.sandbox_id for each in pages.next_items()])
    assert seen == [[made[0].sandbox_id, made[1].sandbox_id], [made[2].sandbox_id]]
    for each in made:
        each.kill()


def test_files_of_a_user_and_folders_that_are_there(box: Any) -> None:
    box.commands.run("mkdir -m 777 /tmp/open")
    box.files.write("/tmp/open/f", "x", user="nobody")
    assert box.files.get_info("/tmp/open/f").owner == "65534"
    assert box.files.make_dir("/tmp/open") is False and box.files.make_dir("/tmp/open/more", user="nobody") is True
    with pytest.raises(e2b.SandboxException):
        box.files.write("/root/f", "x", user="nobody")


def test_watching_a_folder(box: Any, options: dict[str, Any]) -> None:
    async def body() -> None:
        same = await e2b.AsyncSandbox.connect(box.sandbox_id, **options)
        seen: list[Any] = []
        handle = await same.files.watch_dir("/tmp", seen.append, recursive=True)
        await same.files.write("/tmp/deep/f", "x")
        made = ("deep/f", e2b.FilesystemEventType.CREATE)
        await soon(lambda: made in [(each.name, each.type) for each in seen])
        await handle.stop()

        async def over() -> bool:  # a watch does not go on when nobody listens
            return not [each for each in await same.commands.list() if "watch" in str(each.args)]

        await soon(over)

    asyncio.run(body())


def test_watching_by_asking(box: Any) -> None:
    handle = box.files.watch_dir("/tmp", recursive=True)
    assert handle.get_new_events() == []
    box.files.write("/tmp/f", "x")
    seen: list[Any] = []
    last = ("f", e2b.FilesystemEventType.WRITE)
    until(lambda: seen.extend((each.name, each.type) for each in handle.get_new_events()) or last in seen)
    assert seen.count(("f", e2b.FilesystemEventType.CREATE)) == 1, seen
    handle.stop()
    with pytest.raises(e2b.SandboxException):
        handle.get_new_events()


def test_ports(cluster: Cluster, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """E2B's clients make the name themselves and send the token as a header."""
    monkeypatch.setattr(cluster.service.ports, "domain", "boxes.test")
    with e2b.Sandbox.create(timeout=60, **options) as box:
        box.commands.run("python3 -m http.server 8000 -d /usr/share -b 127.0.0.1", background=True)
        box.commands.run("until grep -q ':1F40 ' /proc/net/tcp; do sleep 0.02; done")
        assert box.get_host(8000) == f"8000-{box.sandbox_id}.boxes.test"
        headers = {"Host": box.get_host(8000), "e2b-traffic-access-token": box.traffic_access_token}
        where = f"http://127.0.0.1:{cluster.service.ports.port}/"
        assert httpx.get(where, headers=headers).status_code == 200
        assert httpx.get(where, headers=headers | {"e2b-traffic-access-token": "a" * 24}).status_code == 403


def test_a_wrong_key(options: dict[str, Any]) -> None:
    with pytest.raises(e2b.AuthenticationException):
        e2b.Sandbox.create(**options | {"api_key": "wrong"})
