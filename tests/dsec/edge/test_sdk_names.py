"""What users of E2B's SDK expect of ours: the names, and what they mean."""

from __future__ import annotations

import asyncio
import inspect
import io
import re
import time
from pathlib import Path
from typing import Any

import pytest

from dsec import AsyncSandbox, PtySize, Sandbox, SandboxQuery, sandbox
from dsec.errors import InvalidRequest, NotFound, SandboxFailed, Timeout
from dsec.types import SandboxInfo, page
from tests.dsec.conftest import Host, soon, until

NAMES = {  # public names of E2B's Python SDK 2.63, by class
    "Sandbox": "files commands pty git is_running create connect fork kill set_timeout update_network get_info"
    " get_metrics pause beta_pause create_snapshot list_snapshots delete_snapshot get_mcp_token list sandbox_id"
    " connection_config traffic_access_token sandbox_domain envd_api_url envd_direct_url download_url upload_url"
    " get_host get_mcp_url",
    "Commands": "list kill send_stdin stream_input close_stdin run connect",
    "CommandHandle": "pid stdout stderr error exit_code disconnect wait kill send_stdin close_stdin",
    "Pty": "create connect kill send_stdin stream_input resize",
    "Files": "read write write_files list exists get_info remove rename make_dir watch_dir",
    "WatchHandle": "stop get_new_events",
}
WORDS = {  # and the arguments of the calls that matter most
    "Sandbox.create": "template timeout metadata envs secure allow_internet_access mcp network iam lifecycle"
    " volume_mounts logger idempotency_key request_timeout",
    "Sandbox.list": "query limit next_token request_timeout",
    "Commands.run": "cmd background envs user cwd on_stdout on_stderr stdin timeout request_timeout retain_output",
    "Files.read": "path format user request_timeout gzip stream_idle_timeout",
    "Files.write": "path data user request_timeout gzip use_octet_stream metadata",
    "Files.list": "path depth user request_timeout",
    "Files.watch_dir": "path on_event on_exit user request_timeout timeout recursive include_entry"
    " allow_network_mounts",
}
TABLE = (Path(__file__).parents[3] / "docs/dsec_e2b.md").read_text()


def has(cls: str, name: str) -> bool:
    core = getattr(sandbox, cls)._core
    made = inspect.getsource(core.__init__) + inspect.getsource(getattr(core, "_set", core.__init__))
    return hasattr(core, name) or bool(re.search(rf"self\.{name}\b", made))


@pytest.mark.parametrize("cls", NAMES)
def test_every_name_is_there_or_in_the_table_of_differences(cls: str) -> None:
    for name in NAMES[cls].split():
        assert has(cls, name) != (f"`{cls}.{name}`" in TABLE), f"{cls}.{name}"


@pytest.mark.parametrize("call", WORDS)
def test_every_argument_is_there_or_in_the_table_of_differences(call: str) -> None:
    cls, _, method = call.partition(".")
    known = set(inspect.signature(getattr(getattr(sandbox, cls)._core, method)).parameters) | {"request_timeout"}
    known |= set(SPEC) if method == "create" else set()
    for name in WORDS[call].split():
        assert (name in known) != (f"`{call}({name}=)`" in TABLE), f"{call}({name}=)"


SPEC = "timeout metadata allow_internet_access network idempotency_key".split()


def test_templates_environments_and_methods_by_id(root_host: Host) -> None:
    with root_host.create(template="base", envs={"A": "b"}, secure=True, metadata={"of": "names"}, timeout=60) as box:
        assert box.sandbox_id == box.id and box.created_as.template_id == "host"
        assert box.commands.run("echo $A$C", envs={"C": "d"}, timeout=0).stdout == "bd\n"
        where = {"transport": box._core._transport}
        assert box.pause() is True and box.pause() is False
        info = Sandbox.get_info(box.id, **where)
        assert (info.state, info.sandbox_id) == ("paused", box.id) and info.started_at < info.end_at
        assert Sandbox.connect(box.id, **where).commands.run("echo again").stdout == "again\n"
        assert box.connect(timeout=500).get_info().deadline > time.time() + 400
        Sandbox.set_timeout(box.id, 50, **where)
        assert box.get_info().deadline < time.time() + 60
        (fork,) = Sandbox.fork(box.id, timeout=30, **where)
        assert fork.get_info().deadline < time.time() + 31
        taken = box.create_snapshot()
        assert taken in root_host.sync("list_snapshots")
        with root_host.create(template=taken.snapshot_id) as other:
            assert other.get_info().image == "host"
        assert root_host.sync("delete_snapshot", taken.snapshot_id) is True
        assert root_host.sync("delete_snapshot", taken.snapshot_id) is False
        assert fork.kill() is True and Sandbox.kill(fork.id, **where) is False and Sandbox.kill("x", **where) is False
        with pytest.raises(InvalidRequest, match="env and envs are the same"):
            box.commands.run("true", env={}, envs={})
        with pytest.raises(InvalidRequest, match="key only"):
            root_host.create(secure=False)
        with pytest.raises(InvalidRequest, match="no field 'mcp'"):
            root_host.create(mcp={})


def test_request_timeouts(root_host: Host) -> None:
    with root_host.create(timeout=60) as box:
        box.files.write("f", "x", request_timeout=20)
        with pytest.raises(Timeout, match="no answer to read within"):
            box.files.read("f", request_timeout=1e-6)
        with pytest.raises(InvalidRequest, match="how long a command may take is timeout="):
            box.commands.run("true", request_timeout=5)
        assert box.commands.run("true", background=True, request_timeout=20).wait().exit_code == 0


def test_a_list_has_pages(root_host: Host) -> None:
    made = [root_host.create(timeout=60, metadata={"of": "pages"}) for _ in range(3)]
    query = SandboxQuery(metadata={"of": "pages"})
    found = root_host.sync("list", query)
    assert [each.id for each in found] == [box.id for box in made] and found.next_items() == list(found)
    assert not found.has_next
    pages = root_host.sync("list", query, limit=2)
    assert [each.id for each in pages.next_items() + pages.next_items()] == [box.id for box in made]
    assert not pages.has_next
    with pytest.raises(InvalidRequest, match="no more"):
        pages.next_items()
    for box in made:
        box.kill()
    for wrong in ({"limit": 0}, {"next_token": "x"}):
        with pytest.raises(InvalidRequest):
            root_host.sync("list", **wrong)


def test_pages_of_sandboxes_made_at_the_same_time() -> None:
    infos = [SandboxInfo(f"{n}", "container", "host", "running", 2, {}, 1.5 + n // 3, 9.0) for n in range(7)]
    seen, token = [], None
    while not seen or token:
        answer = page(infos[::-1], 2, token)
        seen, token = seen + [each["id"] for each in answer["sandboxes"]], answer["next_token"]
    assert seen == [info.id for info in infos]


def test_handles_keep_callbacks_and_results(root_host: Host) -> None:
    with root_host.create(timeout=60) as box:
        pieces: list[str] = []
        handle = box.commands.run("echo one; echo two >&2", background=True, on_stdout=pieces.append)
        assert handle.exit_code is None and handle.pid == handle.id
        handle.wait()
        assert pieces == ["one\n"] and (handle.stdout, handle.stderr, handle.exit_code) == ("one\n", "two\n", 0)
        again = box.commands.connect(handle.pid, pieces.append)
        again.wait()
        assert pieces == ["one\n", "one\n"], "a callback by place"
        cat = box.commands.run("cat", background=True, stdin=True)
        cat.send_stdin("x")
        box.commands.close_stdin(cat.pid)
        assert cat.wait().stdout == "x" and box.commands.kill(999) is False
        assert [(each.pid, each.cmd) for each in box.commands.list()][-1] == (cat.pid, "cat")
        shown: list[str] = []
        sizes = "stty size; touch first; read x; stty size"
        terminal = box.pty.create(sizes, size=PtySize(10, 40), on_data=shown.append)
        until(lambda: box.files.exists("first"))
        box.pty.resize(terminal.pid, PtySize(20, 50))
        box.pty.send_stdin(terminal.pid, "\n")
        terminal.wait()
        assert "10 40" in "".join(shown) and "20 50" in "".join(shown)


def test_files_in_their_words(root_host: Host) -> None:
    with root_host.create(timeout=60) as box:
        assert box.files.write("/tmp/a/b", io.BytesIO(b"bytes")).path == "/tmp/a/b"
        assert box.files.write("/tmp/a/c", io.StringIO("text")).name == "c"
        assert [each.name for each in box.files.write_files([{"path": "/tmp/a/d/e", "data": "1"}])] == ["e"]
        assert [each.path for each in box.files.list("/tmp/a")] == ["/tmp/a/b", "/tmp/a/c", "/tmp/a/d"]
        assert [each.path for each in box.files.list("/tmp", depth=2)][-1] == "/tmp/a/d"
        assert [each.path for each in box.files.list("/tmp", depth=None)][-1] == "/tmp/a/d/e"
        assert box.files.make_dir("/tmp/n/m") is True and box.files.make_dir("/tmp/n/m") is False
        moved = box.files.rename("/tmp/a/b", "/tmp/n/b")
        assert (moved.path, moved.size, moved.permissions) == ("/tmp/n/b", 5, "rw-r--r--")
        box.files.remove("/tmp/n")
        assert not box.files.exists("/tmp/n"), "with all that is in it"
        box.commands.run("head -c 2500000 /dev/zero > /tmp/big")
        assert [len(piece) for piece in box.files.read("/tmp/big", format="stream")] == [1 << 20, 1 << 20, 402848]
        with pytest.raises(NotFound):
            box.files.read("/tmp/none", format="stream")
        with pytest.raises(InvalidRequest, match="speaks no HTTP"):
            box.files.download_url("/tmp/big")


def test_long_commands(root_host: Host) -> None:
    with root_host.create(timeout=60) as box:
        words = [f"{n:05}" + "x" * 65_000 for n in range(20)]
        assert box.commands.run(["printf", "%s", *words], limit=4 << 20).stdout == "".join(words)
        with pytest.raises(InvalidRequest, match="at most 4194304 fit"):
            box.commands.run(["true", *words * 4])
        with pytest.raises(InvalidRequest, match="too long"):
            box.commands.run(["true", "x" * 200_000])  # the kernel's own bound on one word


def test_files_of_a_user(root_host: Host) -> None:
    with root_host.create(timeout=60) as box:
        box.files.write("/tmp/secret", "root's", mode=0o600)
        box.commands.run("mkdir -m 777 /tmp/open; mkdir -m 700 /tmp/closed")
        box.files.write("/tmp/open/f", "theirs", user="nobody")
        info = box.files.get_info("/tmp/open/f")
        assert (info.uid, info.gid) == (65534, 65534) and box.files.read("/tmp/open/f", user="1000") == "theirs"
        refused = [
            lambda: box.files.read("/tmp/secret", user="nobody"),
            lambda: box.files.write("/tmp/secret", "x", user="nobody"),
            lambda: box.files.write("/tmp/open/f", "x", user="1000"),
            lambda: box.files.write("/new", "x", user="nobody"),
            lambda: box.files.list("/tmp/closed", user="nobody"),
            lambda: box.files.remove("/tmp/secret", user="nobody"),
            lambda: box.files.rename("/tmp/secret", "/tmp/open/s", user="nobody"),
            lambda: box.files.make_dir("/new", user="nobody"),
        ]
        for act in refused:
            with pytest.raises(InvalidRequest, match="ermi"):
                act()
        assert box.files.read("/tmp/secret") == "root's", "and root is root again"
        with pytest.raises(InvalidRequest, match="no user 'who'"):
            box.files.read("/tmp/secret", user="who")


def test_watching_a_folder(box: Any) -> None:
    box.commands.run("mkdir -p /tmp/seen/deep")
    flat, deep = box.files.watch_dir("/tmp/seen"), box.files.watch_dir("/tmp/seen", recursive=True)
    box.files.write("/tmp/seen/a", "x")
    acts = "mkdir new; echo y > deep/f; sleep 0.1; echo z > new/g; chmod 600 a; mv a b; rm b"
    box.commands.run(acts, cwd="/tmp/seen")
    seen = watched(deep, ("remove", "b"))
    names = {"a", "b"}
    assert {("create", "a"), ("write", "a"), ("chmod", "a"), ("rename", "a"), ("create", "b"), ("create", "deep/f"),
            ("create", "new"), ("create", "new/g"), ("write", "new/g")} <= seen  # fmt: skip
    assert {name for _, name in watched(flat, ("remove", "b"))} == names | {"new"}
    deep.stop()
    with pytest.raises(InvalidRequest, match="was stopped"):
        deep.get_new_events()
    with pytest.raises(NotFound):
        box.files.watch_dir("/nowhere")
    with pytest.raises(InvalidRequest, match="ot a directory"):
        box.files.watch_dir("/etc/passwd")
    with pytest.raises(InvalidRequest, match="get_new_events"):
        box.files.watch_dir("/tmp/seen", on_event=print)
    box.kill()
    with pytest.raises((NotFound, SandboxFailed)):
        until(lambda: flat.get_new_events() and False)


def test_a_watch_tells_each_line_once(root_host: Host) -> None:
    """Whoever asks for events, as E2B's synchronous client does over HTTP."""

    async def body() -> None:
        box = await AsyncSandbox.create(timeout=60, transport=root_host.transport())
        ask = box._transport.call
        watch = {"id": box.id, "command": (await ask("files.watch", {"id": box.id, "path": "/tmp"}))[0]["command"]}
        seen = b""
        for name in ("a", "b"):
            await box.files.write(f"/tmp/{name}", "x")
            while f"w {name}\0".encode() not in seen:
                seen += (await ask("files.watched", watch))[1]
        assert seen.count(b"c a\0") == seen.count(b"c b\0") == 1
        await box.commands.kill(watch["command"])
        with pytest.raises(NotFound, match="the watch has ended"):
            for _ in range(1000):
                await ask("files.watched", watch)
        await box.kill()
        await box._transport.close()

    asyncio.run(body())


def watched(handle: Any, last: tuple[str, str]) -> set[tuple[str, str]]:
    """Events until one comes."""
    seen: set[tuple[str, str]] = set()
    until(lambda: seen.update((event.type, event.name) for event in handle.get_new_events()) or last in seen)
    return seen


def test_a_watch_that_calls_back(root_host: Host) -> None:
    async def body() -> None:
        box = await AsyncSandbox.create(timeout=60, transport=root_host.transport())
        seen: list[str] = []
        ends: list[Exception | None] = []
        await box.commands.run("mkdir /tmp/seen; mkdir -m 700 /tmp/closed")
        await box.files.watch_dir("/tmp/seen", lambda event: seen.append(event.name), ends.append)
        await box.files.watch_dir("/tmp", lambda event: None, ends.append, timeout=0.2)
        await box.files.write("/tmp/seen/a", "x")
        await box.files.remove("/tmp/seen")
        await soon(lambda: len(ends) == 2)
        assert "a" in seen and ends == [None, None], "the folder is gone; its time was over"
        with pytest.raises(InvalidRequest, match="ermi"):
            await box.files.watch_dir("/tmp/closed", print, user="nobody")
        await box.kill()
        await box._transport.close()

    asyncio.run(body())
