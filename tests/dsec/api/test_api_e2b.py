"""E2B's own Python SDK against our server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Cluster

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


def test_a_wrong_key(options: dict[str, Any]) -> None:
    with pytest.raises(e2b.AuthenticationException):
        e2b.Sandbox.create(**options | {"api_key": "wrong"})
