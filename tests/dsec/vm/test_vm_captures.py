"""Captures of machines on a schedule and before a preemption, through an Edge: files and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vm_bench import SPEC, Bench

from dsec.edge.edge import Edge
from dsec.errors import InvalidRequest, Preempted, StateLost

SPECS = {"microvm": SPEC.stated(), "vm": {"substrate": "vm", "memory": 512, "cpu": 1.0, "disk": 64}}


@pytest.fixture
def sandboxes(home: Path) -> Iterator[Path]:
    """The shared state folder with its template, and nothing left in it afterwards."""
    yield home
    assert not [path for path in (home / "sandboxes").iterdir() if path.is_dir()]


async def run(edge: Edge, id: str, command: str, **options: Any) -> dict[str, Any]:
    return (await edge.call("commands.run", {"id": id, "command": command, **options}))[0]


@pytest.mark.slow  # its quick sibling is test_microvm.py: every_snapshot_of_a_machine_is_one
@pytest.mark.parametrize("kind", ["microvm", "vm"])
def test_a_machine_resumes_from_its_captures(kind: str, sandboxes: Path, bench: Bench) -> None:
    spec = {**SPECS[kind], "timeout": 900}
    count = "echo x >> /root/n; wc -l < /root/n"

    async def scheduled(edge: Edge) -> None:
        asked = {"spec": {**spec, "trajectory": f"{kind}/1", "snapshot_steps": 2}}
        id = (await edge.call("create", asked))[0]["id"]
        background = "while :; do date > /dev/shm/beat; sleep 0.1; done > /dev/null 2>&1 &"
        await run(edge, id, background)
        for number in range(4):
            assert (await run(edge, id, count))["stdout"].strip() == str(number + 1)
        kept = [path.name for path in edge.snapshots.glob("auto-*")]
        assert len(kept) == 2, kept
        await edge.call("kill", {"id": id})
        again = (await edge.call("create", asked))[0]
        assert again["resumed"] == {"files": "behind", "step": 4, "steps": 5}
        id = again["id"]
        assert (await run(edge, id, background))["replayed"]
        for number in range(4):
            result = await run(edge, id, count)
            assert result["replayed"] and result["stdout"].strip() == str(number + 1)
        with pytest.raises(StateLost):
            await run(edge, id, "true")
        beat = "wc -l < /root/n; rm /dev/shm/beat; sleep 1; ls /dev/shm/beat"
        process = edge.boxes[id].start(beat, 60, 0, env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"})
        assert (await process.result).stdout.split() == ["3", "/dev/shm/beat"], "its files and its processes of step 4"
        await edge.call("kill", {"id": id})

    async def preempted(edge: Edge) -> None:
        asked = {"spec": {**spec, "trajectory": f"{kind}/2"}}
        id = (await edge.call("create", asked))[0]["id"]
        await run(edge, id, count)
        assert (await edge.call("preempt", {"id": id, "notice": 30.0}))[0]["snapshot"].startswith("auto-")
        with pytest.raises(Preempted):
            await run(edge, id, count)
        await edge.call("kill", {"id": id})
        again = (await edge.call("create", asked))[0]
        assert again["resumed"] == {"files": "alive", "step": 1, "steps": 1}
        assert (await run(edge, again["id"], count))["replayed"]
        assert (await run(edge, again["id"], count))["stdout"].strip() == "2"
        await edge.call("kill", {"id": again["id"]})

    async def body() -> None:
        edge = Edge(sandboxes, "h")
        await edge.start()
        try:
            await scheduled(edge)
            await preempted(edge)
        finally:
            await edge.stop(destroy=True)

    asyncio.run(body())


def test_what_cannot_be_captured_says_so(tmp_path: Path) -> None:
    """A function has no files: no schedule for it, and a preemption is told that nothing was kept."""

    async def body() -> None:
        edge = Edge(tmp_path, "h")
        await edge.start()
        spec = {"substrate": "function", "trajectory": "f/1"}
        with pytest.raises(InvalidRequest, match="no files to capture"):
            await edge.call("create", {"spec": {**spec, "snapshot_steps": 1}})
        info = (await edge.call("create", {"spec": spec}))[0]
        assert info["capabilities"]["snapshots"] is False
        for op in ("preempt", "log_snapshot", "snapshot", "fork"):
            with pytest.raises(InvalidRequest, match="nothing that a snapshot could hold"):
                await edge.call(op, {"id": info["id"]})
        resumed = (await edge.call("info", {"id": info["id"]}))[0]["resumed"]
        assert "nothing that a snapshot could hold" in resumed["snapshot_failed"]
        await edge.stop(destroy=True)

    asyncio.run(body())
