"""The agent as a plain process: commands, files, journal, hostile frames. No privileges needed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsec.errors import InvalidRequest, NotFound, SandboxFailed, SubstrateUnavailable
from dsec.guest import build
from dsec.guest.protocol import MAX_FRAME, Agent, Exit, Frames, Process, frame
from tests.dsec.conftest import soon

ENV = {"PATH": "/usr/bin:/bin"}


class Out(dict[bytes, bytes]):
    """Collects a command's output."""

    def __init__(self) -> None:
        super().__init__({b"O": b"", b"E": b""})

    def __call__(self, kind: bytes, data: bytes) -> None:
        self[kind] += data


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture
def serve(binary: Path, tmp_path: Path) -> Any:
    """serve(body): starts an agent, runs the coroutine `body(agent, reconnect)`, ends the agent."""

    def run(body: Callable[[Agent, Callable[[], Awaitable[Agent]]], Awaitable[Any]]) -> Any:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "agent.sock"))
            listener.listen()
            os.set_inheritable(listener.fileno(), True)
            fd = listener.fileno()
            process = subprocess.Popen([binary, "--listen", str(fd)], pass_fds=[fd], env={"HOME": str(tmp_path)})

        async def main() -> Any:
            async def connect() -> Agent:
                return await Agent.connect(tmp_path / "agent.sock")

            return await asyncio.wait_for(body(await connect(), connect), 60)

        try:
            return asyncio.run(main())
        finally:
            process.kill()
            process.wait()

    return run


async def sh(agent: Agent, command: str | list[str], **options: Any) -> tuple[bytes, bytes, Exit]:
    out = Out()
    done = await agent.exec(command, out, env=ENV, **options).done
    return out[b"O"], out[b"E"], done


def test_the_wall_lets_nothing_outside_its_folder_be_opened(binary: Path, tmp_path: Path) -> None:
    """Landlock, seen from a command: files, signals and abstract sockets outside; without it, the control."""
    if Path("/sys/kernel/security/lsm").exists() and "landlock" not in Path("/sys/kernel/security/lsm").read_text():
        pytest.skip("this kernel has no Landlock")
    secret = tmp_path / "secret"
    secret.write_text("outside")
    victim = subprocess.Popen(["sleep", "60"])
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0dsec-test-{os.getpid()}")
    abstract.listen()
    script = f"""
from os import kill; import socket
for name, attempt in (("read", lambda: open({str(secret)!r}).read()), ("write", lambda: open({str(secret)!r}, "a")),
    ("list", lambda: __import__("os").listdir("/etc")), ("link", lambda: open("/proc/self/root/etc/passwd")),
    ("signal", lambda: kill({victim.pid}, 0)),
    ("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0dsec-test-{os.getpid()}"))):
    try: attempt(); print(name)
    except PermissionError: pass
open("/usr/bin/env", "rb").read(1); print("inside")
"""

    def seen(*wall: str) -> list[str]:
        path = tmp_path / f"{len(wall)}.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            fd = listener.fileno()
            process = subprocess.Popen([binary, "--listen", str(fd), *wall], pass_fds=[fd], env={"HOME": "/usr"})

        async def main() -> list[str]:
            agent = await Agent.connect(path)
            command = ["/usr/bin/python3", "-I", "-S", "-c", script]
            out, err, _ = await asyncio.wait_for(sh(agent, command, stdin=True), 30)  # /dev/null is outside, too
            return (out + err).decode().split()

        try:
            return asyncio.run(main())
        finally:
            process.kill()
            process.wait()

    try:
        assert seen() == ["read", "write", "list", "link", "signal", "abstract", "inside"]
        left = seen("--wall", "/usr")
        assert set(left) - {"signal", "abstract"} == {"inside"}
        if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 12):  # signals and sockets are newer
            assert left == ["inside"]
    finally:
        victim.kill()
        victim.wait()
        abstract.close()


def test_commands(serve: Any) -> None:
    async def body(agent: Agent, _: Any) -> None:
        out, err, done = await sh(agent, "echo out; echo err >&2; exit 7")
        assert (out, err, done.code) == (b"out\n", b"err\n", 7)
        out, _, _ = await sh(agent, ["printf", "%s|", "a b", "", "é"])
        assert out == "a b||é|".encode()
        assert (await sh(agent, "kill -9 $$"))[2].code == 137
        assert (await sh(agent, "pwd", cwd="/usr"))[0] == b"/usr\n"
        assert (await sh(agent, "env"))[0].split() >= [b"PATH=/usr/bin:/bin"]
        assert (await sh(agent, "cat"))[0] == b"", "standard input is empty unless asked for"
        with pytest.raises(NotFound, match="No such file"):
            await sh(agent, ["/no/such/program"])
        with pytest.raises(InvalidRequest, match="NUL"):
            await sh(agent, ["a\0b"])

    serve(body)


def test_standard_input_signals_and_terminal(serve: Any) -> None:
    async def body(agent: Agent, _: Any) -> None:
        out = Out()
        process = agent.exec("tr a-z A-Z | md5sum", out, env=ENV, stdin=True)
        process.send(b"hello" * 400_000)
        process.close_stdin()
        assert (await process.done).code == 0
        want = subprocess.run("md5sum", input=b"HELLO" * 400_000, capture_output=True, shell=True).stdout
        assert out[b"O"] == want
        process = agent.exec("trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done", out := Out(), env=ENV)
        await soon(lambda: out[b"O"])
        process.signal(signal.SIGTERM)
        assert (await process.done).code == 5
        process = agent.exec("test -t 0 && stty size && read x && echo got $x", out := Out(), env=ENV, tty=(40, 100))
        process.send(b"yes\n")
        assert (await process.done).code == 0
        assert b"40 100" in out[b"O"] and b"got yes" in out[b"O"]

    serve(body)


def test_a_daemon_does_not_hold_its_command_and_lives_on(serve: Any) -> None:
    async def body(agent: Agent, _: Any) -> None:
        out, _, _ = await sh(agent, "mkfifo go; (read line < go; echo late; echo late > later) & echo now")
        assert out == b"now\n", "it ended although its daemon waits for what comes next"
        await sh(agent, "echo > go; while [ ! -s later ]; do sleep 0.02; done")
        assert await agent.read("later") == b"late\n"

    serve(body)


def test_output_keeps_its_head_and_its_tail(serve: Any) -> None:
    async def body(agent: Agent, _: Any) -> None:
        out, _, done = await sh(agent, "seq 1 200000", limit=1000)
        whole = b"".join(b"%d\n" % i for i in range(1, 200001))
        assert out == whole[:500] + whole[-500:]
        assert done.dropped_out == len(whole) - 1000 and done.dropped_err == 0
        out, _, done = await sh(agent, "printf 1234567890", limit=10)
        assert out == b"1234567890" and done.dropped_out == 0

    serve(body)


def test_many_at_once(serve: Any) -> None:
    async def body(agent: Agent, _: Any) -> None:
        results = await asyncio.gather(*(sh(agent, f"echo {i}; exit {i}") for i in range(40)))
        assert [(out, done.code) for out, _, done in results] == [(b"%d\n" % i, i) for i in range(40)]

    serve(body)


def test_a_new_connection_finds_what_the_old_one_left(serve: Any) -> None:
    async def body(agent: Agent, connect: Callable[[], Awaitable[Agent]]) -> None:
        first = agent.exec("echo one; echo run >> counter", Out(), env=ENV, step=3)
        await first.done
        waits = "echo two; while [ ! -e go ]; do sleep 0.02; done; echo three; echo run >> counter; exit 4"
        agent.exec(waits, Out(), env=ENV, step=4)
        await agent.ping()
        agent.close()
        later = await connect()
        entries = {entry.step: entry for entry in await later.journal()}
        assert entries[3].exit is not None and entries[3].exit.code == 0 and entries[4].exit is None
        outs = {step: Out() for step in entries}
        done: dict[int, Process] = {step: later.attach(entries[step].id, outs[step]) for step in entries}
        await later.write("go", b"")
        assert (await done[3].done).code == 0 and outs[3][b"O"] == b"one\n"
        assert (await done[4].done).code == 4 and outs[4][b"O"] == b"two\nthree\n"
        assert await later.read("counter") == b"run\nrun\n", "nothing ran twice"
        again = later.attach(entries[4].id, out := Out())
        assert (await again.done).code == 4 and out[b"O"] == b"two\nthree\n", "kept until forgotten"
        again.forget()
        with pytest.raises(NotFound):
            await later.attach(entries[4].id, Out()).done
        assert [entry.step for entry in await later.journal()] == [3]
        assert (await sh(later, "echo new"))[0] == b"new\n", "ids of the old connection are not used again"

    serve(body)


@pytest.mark.parametrize("wait", [0.0, 0.4])
def test_a_host_may_die_before_an_agent_behind_the_relay_is_up(binary: Path, tmp_path: Path, wait: float) -> None:
    """What it had asked for is done, and its successor is answered as itself: once, after its own opening."""
    relay = build.program(Path(build.__file__).with_name("relay.c"), tmp_path)
    slow = ["/bin/sh", "-c", f"sleep 0.3; exec {binary} --device -"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        fd = listener.fileno()
        process = subprocess.Popen([relay, str(fd), *slow], pass_fds=[fd], env={"HOME": str(tmp_path)})

    async def main() -> None:
        for step in (1, 2, 3, 4):
            agent = await Agent.connect(tmp_path / "agent.sock", serial=True)
            entries = await asyncio.wait_for(agent.journal(), 60) if step > 1 else []
            assert [entry.step for entry in entries] == list(range(step - 1, 0, -1))
            agent.exec("sleep 99", Out(), env=ENV, step=step)
            await asyncio.sleep(wait)
            agent.close()

    try:
        asyncio.run(main())
    finally:
        process.kill()
        process.wait()


def test_the_newest_connection_wins(serve: Any) -> None:
    async def body(agent: Agent, connect: Callable[[], Awaitable[Agent]]) -> None:
        await agent.ping()
        newer = await connect()
        await newer.ping()
        assert "ended" in await agent.failed

    serve(body)


def test_files(serve: Any) -> None:
    async def body(agent: Agent, _: Any) -> None:
        data = os.urandom(1_500_000)
        await agent.write("a/b/c.bin", data, mode=0o640)
        assert await agent.read("a/b/c.bin") == data
        assert await agent.read("a/b/c.bin", offset=1_499_990) == data[-10:]
        with pytest.raises(InvalidRequest, match="longer than"):
            await agent.read("a/b/c.bin", size=1000)
        await agent.write("a/b/c.bin", b"+", append=True)
        entry = await agent.stat("a/b/c.bin")
        assert (entry.type, entry.size, entry.mode & 0o700) == ("file", 1_500_001, 0o600)
        await agent.make_dir("a/d/e")
        assert [(e.name, e.type) for e in await agent.list("a")] == [("b", "dir"), ("d", "dir")]
        await agent.rename("a/b/c.bin", "a/d/x")
        await agent.remove("a/d")
        with pytest.raises(NotFound):
            await agent.stat("a/d")
        with pytest.raises(InvalidRequest, match="directory"):
            await agent.read("a")

    serve(body)


def test_odd_files_cannot_hang_or_mislead_it(serve: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "magic").symlink_to("/proc/self/root/etc/passwd")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "kept").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "victim")

    async def body(agent: Agent, _: Any) -> None:
        for path in ("fifo", "/dev/zero", "magic", "/proc/self/root/etc/passwd"):
            with pytest.raises(InvalidRequest):
                await agent.read(path)
        for path in ("fifo", "/dev/null"):
            with pytest.raises(InvalidRequest):
                await agent.write(path, b"x")
        await agent.remove("folder")
        assert (tmp_path / "victim" / "kept").read_text() == "kept", "links are removed, not followed"

    serve(body)


@given(st.lists(st.tuples(st.sampled_from([b"O", b"D", b"A"]), st.integers(0, 2**32 - 1), st.binary(max_size=50))))
def test_frames_survive_any_cut(frames: list[tuple[bytes, int, bytes]]) -> None:
    data = b"".join(frame(*each) for each in frames)
    cutter = Frames()
    assert [each for i in range(len(data)) for each in cutter.feed(data[i : i + 1])] == frames
    assert Frames().feed(data) == frames


@pytest.mark.parametrize("length", [0, 4, MAX_FRAME + 1, 0xFFFFFFFF])
def test_a_length_out_of_range_is_refused(length: int) -> None:
    with pytest.raises(SandboxFailed):
        Frames().feed(length.to_bytes(4, "little") + b"O\0\0\0\0")


LIES = {
    "an unknown kind": frame(b"?", 1),
    "output of no command": frame(b"O", 99, b"x"),
    "an answer nobody asked for": frame(b"A", 99, b"x"),
    "an end without a code": frame(b"D", 1, b"signal\x000\0"),
    "an end that is no fields": frame(b"D", 1, b"code"),
    "a number that is none": frame(b"D", 1, b"code\0inf\0signal\x000\0out\x000\0err\x000\0seconds\x000\0"),
    "a huge frame": (1 << 31).to_bytes(4, "little") + b"O" * 64,
    "more output than the cap": frame(b"O", 1, b"x" * 200),
    "another version": frame(b"H", 0, b"version\x0099\0"),
    "a second hello": frame(b"H", 0, b"version\x001\0") * 2,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_guest_ends_its_connection(lie: str, tmp_path: Path) -> None:
    async def main() -> None:
        async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(LIES[lie])
            await reader.read()
            writer.close()

        server = await asyncio.start_unix_server(guest, tmp_path / "s")
        agent = await Agent.connect(tmp_path / "s")
        process = agent.exec("true", Out(), limit=100)
        with pytest.raises(SandboxFailed):
            await asyncio.wait_for(process.done, 60)
        assert agent.failed.done()
        with pytest.raises(SandboxFailed):
            await agent.read("x")
        server.close()

    asyncio.run(main())


def test_hostile_host_frames_end_the_connection_only(serve: Any) -> None:
    async def body(agent: Agent, connect: Callable[[], Awaitable[Agent]]) -> None:
        for bad in (frame(b"X", 1, b"arg\0ls"), frame(b"?", 1), b"\xff" * 64, frame(b"r", 1)):
            agent = await connect()
            await agent.ping()
            assert agent._transport is not None
            agent._transport.write(bad)
            await agent.failed
        await (await connect()).ping()

    serve(body)


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SubstrateUnavailable) as caught:
        build.agent(tmp_path)
    assert "gcc" in caught.value.fix


def test_it_listens_on_vsock_for_the_host_alone(programs: Path) -> None:
    """As far as that goes on one machine: the port is taken, and a local connection gets no greeting."""
    try:
        probe = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        probe.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
    except (AttributeError, OSError) as error:
        pytest.skip(f"no vsock here: {error}")
    port = probe.getsockname()[1]
    probe.close()
    process = subprocess.Popen([build.agent(programs), "--device", f"vsock:{port}"], stderr=subprocess.PIPE)
    try:
        for _ in range(200):
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as other:
                try:
                    other.bind((socket.VMADDR_CID_ANY, port))
                except OSError as error:
                    assert error.errno == errno.EADDRINUSE
                    break
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        else:
            raise AssertionError("it never listened")
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as local:
            local.settimeout(1)
            with contextlib.suppress(OSError):  # most hosts have no way from themselves to themselves
                local.connect((1, port))
                assert local.recv(9) == b"", "a process of the guest is not the host"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
