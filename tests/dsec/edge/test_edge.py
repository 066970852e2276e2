"""Deaths of clients and of the Edge, stock, limits of the host, and trajectories through the SDK."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec import AsyncSandbox
from dsec.edge.box import Box
from dsec.edge.edge import Edge
from dsec.errors import (
    Capacity,
    Diverged,
    NotFound,
    OutcomeUnknown,
    SandboxFailed,
    StateLost,
    SubstrateUnavailable,
)
from dsec.types import Spec
from tests.dsec.conftest import Host, lives, until


@pytest.fixture(params=["root", "user"])
def own(request: pytest.FixtureRequest, make_host: Callable[[str], Host]) -> Iterator[Host]:
    """A host of the test's own, since its Edge will be killed."""
    host = make_host(request.param)
    yield host
    host.stop()


CLIENT = """
import sys
from dsec import Sandbox
box = Sandbox.create(timeout=60)
print(box.id, flush=True)
box.commands.run("echo one >> counter; echo begun; sleep 0.8; echo two >> counter; echo ended; exit 7")
"""


def test_a_killed_client_loses_nothing(root_host: Host) -> None:
    environment = {**os.environ, "DSEC_HOME": str(root_host.home)}
    client = subprocess.Popen([sys.executable, "-c", CLIENT], env=environment, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    id = client.stdout.readline().strip()
    box = root_host.sync("connect", id)
    until(lambda: box.files.exists("counter"))
    client.kill()
    client.wait()
    (command,) = box.commands.list()
    result = box.commands.connect(command["id"]).wait(check=False)
    assert (result.stdout, result.exit_code) == ("begun\nended\n", 7)
    assert box.files.read("counter") == "one\ntwo\n"
    box.kill()


def test_a_killed_edge_loses_nothing(own: Host) -> None:
    box = own.create(timeout=60, metadata={"who": "me"})
    done = box.commands.run("echo finished", background=True)
    done.wait()
    handle = box.commands.run("echo one >> counter; echo begun; sleep 1; echo two >> counter; exit 5", background=True)
    until(lambda: box.files.exists("counter"))
    deadline = box.get_info().deadline
    own.kill()
    own.start()
    again = own.sync("connect", box.id)
    assert again.get_info().metadata == {"who": "me"} and again.get_info().deadline == deadline
    result = again.commands.connect(handle.id).wait(check=False)
    assert (result.stdout, result.exit_code) == ("begun\n", 5)
    assert again.commands.connect(done.id).wait().stdout == "finished\n", "also what ended before"
    assert again.files.read("counter") == "one\ntwo\n", "nothing ran twice"
    assert again.commands.run("echo new").stdout == "new\n"
    assert again.kill() and not again.is_running()


def test_a_sandbox_that_died_while_no_edge_ran_is_gone(own: Host) -> None:
    box = own.create(timeout=60)
    box.commands.run("true")
    state = Box.saved(own.home / "sandboxes" / box.id)
    own.kill()
    children = Path(f"/proc/{state['running']['pid']}/task/{state['running']['pid']}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    until(lambda: not any(lives(int(pid)) for pid in children))
    own.start()
    with pytest.raises(NotFound):
        own.sync("connect", box.id)
    assert not (own.home / "sandboxes" / box.id).exists()


def test_deadlines_hold_across_an_edge_and_a_pause_stops_them(own: Host) -> None:
    long, short, paused = (own.create(timeout=60) for _ in range(3))
    deadlines = [box.get_info().deadline for box in (long, paused)]
    paused.pause()
    stopped = time.time()
    short.set_timeout(0.5)
    own.kill()
    own.start()
    until(lambda: {info.id for info in own.sync("list")} == {long.id, paused.id})
    stood = time.time() - stopped
    woken = own.sync("connect", paused.id)
    assert long.get_info().deadline == deadlines[0]
    assert deadlines[1] + stood <= woken.get_info().deadline <= time.time() + 60, "its time stood while it was paused"
    assert woken.commands.run("echo awake").stdout == "awake\n"
    woken.set_timeout(300)
    assert woken.get_info().deadline > time.time() + 60
    for box in (long, woken):
        box.kill()


def test_only_one_edge_owns_a_folder(root_host: Host) -> None:
    second = subprocess.run([sys.executable, "-m", "dsec.edge.server", str(root_host.home)], timeout=20)
    assert second.returncode == 0
    with root_host.create() as box:
        assert box.commands.run("echo still here").stdout == "still here\n"


def test_the_sdk_starts_an_edge_on_demand_and_replaces_a_dead_one(tmp_path: Path, programs: Path) -> None:
    code = """
from dsec import Sandbox
import os, signal
box = Sandbox.create(substrate="function")
print(box.call("def main(): return 1"))
from dsec.client import default_transport
from dsec.twin import _Loop
import asyncio
async def pid(): return (await default_transport().call("status", {}))[0]["pid"]
first = asyncio.run_coroutine_threadsafe(pid(), _Loop.get()).result()
os.kill(first, signal.SIGKILL)
import time; time.sleep(0.2)
box = Sandbox.create(substrate="function")
print(box.call("def main(): return 2"))
async def over(): await default_transport().call("shutdown", {"destroy": True})
asyncio.run_coroutine_threadsafe(over(), _Loop.get()).result()
"""
    environment = {**os.environ, "DSEC_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "2"] and done.stderr == "", done


def test_a_pool_makes_creation_a_claim(root_host: Host) -> None:
    assert root_host.sync("pool", 3, memory=128, disk=32) == 3
    try:
        boxes = []
        for i in range(3):
            boxes.append(root_host.create(memory=128, disk=32, env={"N": str(i)}, metadata={"n": str(i)}))
            assert boxes[-1].commands.run("echo $N").stdout == f"{i}\n"
        assert len({box.id for box in boxes}) == 3 and {box.get_info().metadata["n"] for box in boxes} == {
            "0",
            "1",
            "2",
        }
        for box in boxes:
            box.kill()
    finally:
        assert root_host.sync("pool", 0, memory=128, disk=32) == 0


def test_stock_never_gives_less_isolation_than_asked_for(root_host: Host) -> None:
    assert root_host.sync("pool", 1, memory=128, disk=32) == 1
    try:
        with pytest.raises(SubstrateUnavailable, match="isolation level"):
            root_host.create(memory=128, disk=32, isolation_min=3)
    finally:
        root_host.sync("pool", 0, memory=128, disk=32)


def test_stock_dies_with_its_edge(make_host: Callable[[str], Host]) -> None:
    host = make_host("root")
    host.sync("pool", 2, memory=128, disk=32)
    claimed = host.create(memory=128, disk=32, timeout=60)
    host.kill()
    host.start()
    assert [info.id for info in host.sync("list")] == [claimed.id], "what nobody owns does not live on"
    assert claimed.commands.run("echo mine").stdout == "mine\n"
    # what was in stock, and what was being made, is cleared away behind the scenes
    until(lambda: [path.name for path in (host.home / "sandboxes").iterdir()] == [claimed.id])
    host.stop()


def test_the_last_whole_state_counts_and_old_ones_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsec.edge.box.MAX_STATE", 3000)
    box = Box("sb-1", Spec(), tmp_path, "here", 2, {})
    for n in range(50):
        box.deadline = float(n)
        box.save()
        assert Box.saved(tmp_path)["deadline"] == n
        data = (tmp_path / "state.jsonl").read_bytes()
        assert len(data) < 6000
        (tmp_path / "state.jsonl").write_bytes(data + data[-40 - n : -3])  # killed in the next write
        assert Box.saved(tmp_path)["deadline"] == n


def test_many_at_once(root_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSEC_HOME", str(root_host.home))

    async def main() -> None:
        async def one(i: int) -> str:
            async with await AsyncSandbox.create(timeout=60) as box:
                return str((await box.commands.run(f"echo {i}")).stdout)

        gate = asyncio.Semaphore(8)

        async def gated(i: int) -> str:
            async with gate:
                return await one(i)

        assert await asyncio.gather(*(gated(i) for i in range(40))) == [f"{i}\n" for i in range(40)]

    asyncio.run(main())


def test_the_hard_cap_is_an_error_not_a_queue(tmp_path: Path) -> None:
    async def main() -> None:
        edge = Edge(tmp_path, max_live=2)
        await edge.start()
        for _ in range(2):
            await edge.call("create", {"spec": {"substrate": "function"}})
        with pytest.raises(Capacity, match="limit is 2"):
            await edge.call("create", {"spec": {"substrate": "function"}})
        (first, _) = (await edge.call("list", {}))[0]["sandboxes"]
        await edge.call("kill", {"id": first["id"]})
        await edge.call("create", {"spec": {"substrate": "function"}})
        await edge.stop(destroy=True)

    asyncio.run(main())


def test_the_same_key_makes_one_sandbox(root_host: Host) -> None:
    ids = {root_host.create(idempotency_key="k-1", timeout=30).id for _ in range(3)}
    assert len(ids) == 1
    root_host.sync("connect", ids.pop()).kill()


def test_keys_of_sandboxes_that_are_gone_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        edge = Edge(tmp_path)
        await edge.start()

        async def make(key: str) -> str:
            return (await edge.op_create({"substrate": "function", "idempotency_key": key})).id

        first, second = await make("a"), await make("b")
        await edge.op_kill(first)
        assert await make("a") == first, "an answer that was lost is asked for again"
        monkeypatch.setattr("dsec.edge.edge.KEPT_KEYS", 0.0)
        assert await make("b") == second, "it still lives"
        await make("c")
        assert set(edge._keys) == {"b", "c"}
        assert await make("a") != first
        await edge.stop(destroy=True)

    asyncio.run(main())


# Trajectories


def program(host: Host, name: str, upto: int = 99) -> list[Any]:
    """A small task; run again it must do nothing twice."""
    box = host.create(timeout=60, trajectory=name)
    results: list[Any] = []
    for step, command in enumerate(["echo a >> n; wc -l < n", "echo b >> n; wc -l < n", "cat n; exit 3"]):
        if step >= upto:
            break
        results.append(box.commands.run(command, check=False))
    if upto > 3:
        box.files.write("out", "x")
        results.append(box.files.read("out"))
    return results


def test_a_program_run_again_is_replayed_not_repeated(own: Host) -> None:
    first = program(own, "t/1")
    assert [r.replayed for r in first[:3]] == [False] * 3
    again = program(own, "t/1")
    assert [r.replayed for r in again[:3]] == [True] * 3 and again[3] == "x"
    assert [(r.stdout, r.exit_code) for r in again[:3]] == [(r.stdout, r.exit_code) for r in first[:3]]
    own.kill()
    own.start()
    third = program(own, "t/1")
    assert [r.replayed for r in third[:3]] == [True] * 3
    (info,) = own.sync("list")
    assert own.sync("connect", info.id).commands.run("cat n").stdout == "a\nb\n", "nothing ran twice"


def test_a_resumed_program_goes_on_where_it_stopped(own: Host) -> None:
    program(own, "t/2", upto=1)
    own.kill()
    own.start()
    results = program(own, "t/2")
    assert [r.replayed for r in results[:3]] == [True, False, False] and results[1].stdout == "2\n"
    box = own.create(timeout=60, trajectory="t/2")
    with pytest.raises(Diverged):
        box.commands.run("something else")


def test_an_edge_killed_in_the_middle_of_a_command_finds_its_end(own: Host) -> None:
    box = own.create(timeout=60, trajectory="t/3")

    async def begin() -> None:
        transport = own.transport()
        stream = transport.stream("commands.run", {"id": box.id, "command": "echo x >> n; echo go; sleep 1; echo end"})
        assert (await anext(stream))[0] == "stdout"
        own.kill()
        with pytest.raises(SandboxFailed):
            await anext(stream)
        await transport.close()

    asyncio.run(begin())
    own.start()
    again = own.create(timeout=60, trajectory="t/3")
    assert again.id == box.id
    result = again.commands.run("echo x >> n; echo go; sleep 1; echo end")
    assert (result.replayed and result.stdout == "go\nend\n") or (not result.replayed and result.stdout == "go\nend\n")
    assert again.commands.run("cat n").stdout == "x\n", "it ran exactly once"


def test_lost_files_are_not_pretended(own: Host) -> None:
    program(own, "t/4", upto=2)
    (info,) = own.sync("list")
    own.sync("connect", info.id).kill()
    box = own.create(timeout=60, trajectory="t/4")
    assert box.commands.run("echo a >> n; wc -l < n").replayed
    assert box.commands.run("echo b >> n; wc -l < n").replayed
    with pytest.raises(StateLost):
        box.commands.run("cat n")


def test_a_snapshot_brings_the_files_back(own: Host) -> None:
    box = own.create(timeout=60, trajectory="t/5")
    box.commands.run("echo a >> n")
    box.log_snapshot()
    box.kill()
    again = own.create(timeout=60, trajectory="t/5")
    assert again.commands.run("echo a >> n").replayed
    assert again.commands.run("cat n").stdout == "a\n"
    again.kill()
    with pytest.raises((OutcomeUnknown, StateLost)):
        third = own.create(timeout=60, trajectory="t/5")
        third.commands.run("echo a >> n")
        third.commands.run("cat n")
        third.commands.run("echo after the snapshot nothing is recorded >> n")
