"""How many syncs a command costs, counted: two on its way, whatever a disk takes for each."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from dsec.edge.edge import Edge
from dsec.trajectory import Live, TrajectoryLog
from dsec.types import Spec

SPEC = Spec(memory=64)


async def commands(log: TrajectoryLog, name: str, count: int) -> None:
    t = await log.open(name, SPEC)
    for number in range(count):
        ticket = await t.begin("run", {"command": f"{name} {number}"})
        assert isinstance(ticket, Live)
        await t.end(ticket, {"stdout": "x" * 3000, "exit_code": 0})


def test_a_command_waits_for_two_syncs(tmp_path: Path) -> None:
    syncs: list[int] = []

    async def body() -> None:
        log = TrajectoryLog(tmp_path, sync=lambda fd: (syncs.append(fd), os.fdatasync(fd))[1])
        await commands(log, "first", 1)  # makes the segment
        del syncs[:]
        await commands(log, "t", 20)
        log.close()

    asyncio.run(body())
    assert len(syncs) == 1 + 2 * 20, "one for OPEN, then BEGIN and END of each"


def test_commands_of_many_trajectories_share_their_syncs(tmp_path: Path) -> None:
    async def body() -> int:
        log = TrajectoryLog(tmp_path)
        await asyncio.gather(*(commands(log, f"t{number}", 5) for number in range(64)))
        log.close()
        return log.writer.groups

    groups, records = asyncio.run(body()), 64 * (1 + 2 * 5)
    assert groups * 4 < records, f"{groups} syncs for {records} records"


def test_nothing_else_of_the_edge_syncs_while_a_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole Edge process, file and database syncs included: two for a call with a trajectory, none without."""
    syncs: list[str] = []

    async def body() -> list[int]:
        edge = Edge(tmp_path)
        await edge.start()
        ids = [
            (await edge.op_create({"substrate": "function", "trajectory": name})).id  # type: ignore[arg-type]
            for name in ("t", None)
        ]
        for name in ("fsync", "fdatasync"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda fd, real=real, name=name: (syncs.append(name), real(fd))[1])
        edge.log.writer.sync = os.fdatasync
        found = []
        for id in ids:
            await edge.op_call(id, "def main(): return 1", [], {})
            before = _written()
            del syncs[:]
            for _ in range(10):
                await edge.op_call(id, "def main(): return 1", [], {})
            found += [len(syncs), _written() - before]
        await edge.stop(destroy=True)
        return found

    def _written() -> int:
        """Files under the Edge's home that changed: what SQLite syncs in C is seen by its file."""
        return sum(path.stat().st_mtime_ns for path in tmp_path.rglob("*.index*"))

    logged, index, plain, _ = asyncio.run(body())
    assert (logged, plain) == (20, 0)
    assert index == 0, "the index is not written on a command's way"
