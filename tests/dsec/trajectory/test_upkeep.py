"""The log within its bounds by itself: what goes, what never does, and an Edge that does it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from test_retention import SPEC, STEPS, fill, opened, play

from dsec.edge.edge import Edge
from dsec.errors import InvalidRequest
from dsec.trajectory import TrajectoryLog, upkeep
from dsec.trajectory.log import names
from dsec.trajectory.segment import segments
from dsec.trajectory.show import verify
from dsec.trajectory.upkeep import Bounds, closed, size, tend
from tests.dsec.conftest import soon


def left(log: TrajectoryLog) -> list[str]:
    return sorted({name for name, _ in names(log)})


def test_the_bound_takes_the_longest_untouched_and_no_more_than_it_must(tmp_path: Path) -> None:
    fill(tmp_path, 6)

    async def body(log: TrajectoryLog) -> None:
        every = await closed(log)
        assert [each.name for each in every] == [f"t{n}" for n in range(6)]
        assert all(each.bytes > 70_000 for each in every), "their outputs count"
        bound = (size(tmp_path) - every[0].bytes - 1) / (1 << 20)  # one is not quite enough
        deleted, freed = await tend(log, Bounds(mib=bound), rest=-1)
        assert deleted == ["t0", "t1"] and left(log) == ["t2", "t3", "t4", "t5"] and freed.segments
        assert (await tend(log, Bounds(mib=1000.0), rest=-1))[0] == [], "there is room"
        assert (await tend(log, Bounds(mib=0.001)))[0] == [], "a trainer may be away for an hour"
        assert await play(log, "t2") == STEPS

    opened(tmp_path, body)
    assert not verify(tmp_path)[1]


def test_age_alone(tmp_path: Path) -> None:
    fill(tmp_path, 3)

    async def body(log: TrajectoryLog) -> None:
        assert (await tend(log, Bounds(keep=100.0)))[0] == [] and len(left(log)) == 3
        assert (await tend(log, Bounds()))[0] == []
        time.sleep(0.01)
        assert (await tend(log, Bounds(keep=0.001)))[0] == ["t0", "t1", "t2"] and left(log) == []

    opened(tmp_path, body)


def test_what_is_open_or_of_another_edge_is_left_alone(tmp_path: Path) -> None:
    """Neither the tail that is being written nor the lease of another Edge on the same folder."""
    fill(tmp_path, 3)

    async def body(log: TrajectoryLog) -> None:
        mine = await log.open("t0", SPEC)
        mine.attach("alive")
        other = TrajectoryLog(tmp_path, shard="other")
        theirs = await other.open("t1", SPEC)
        theirs.attach("alive")
        log.index.catch_up(log.writer.durable)
        assert [each.name for each in await closed(log)] == ["t2"]
        tail = segments(log.writer.folder)[-1]
        deleted, _ = await tend(log, Bounds(keep=1e-9, mib=1e-9), rest=-1)
        assert deleted == ["t2"] and tail.exists()
        await mine.begin("run", {"command": "t0 0"})
        await theirs.begin("run", {"command": "t1 0"})  # nobody has taken its lease
        other.close()

    opened(tmp_path, body)


def test_one_that_is_opened_while_others_go_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 3)
    real = upkeep.delete

    async def body(log: TrajectoryLog) -> None:
        async def first_opened(log: TrajectoryLog, name: str) -> list[str]:
            if name == "t1":
                (await log.open("t1", SPEC)).attach("alive")
            return await real(log, name)

        monkeypatch.setattr(upkeep, "delete", first_opened)
        assert (await tend(log, Bounds(keep=1e-9)))[0] == ["t0", "t2"] and left(log) == ["t1"]

    opened(tmp_path, body)


def test_an_edge_does_it_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "log", 3)
    monkeypatch.setenv("DSEC_LOG_EVERY", "0.05")
    monkeypatch.setenv("DSEC_LOG_KEEP", "0.001")

    async def body() -> None:
        edge = Edge(tmp_path, "h")
        (tmp_path / "snapshots").mkdir()
        (tmp_path / "snapshots" / "auto-0123456789abcdef-00000000").mkdir()
        await edge.start()
        # trajectories go, and the files that were kept for nobody
        await soon(lambda: edge.log and not left(edge.log) and not list((tmp_path / "snapshots").iterdir()))
        assert len(segments(edge.log.writer.folder)) <= 2
        await edge.stop()

    asyncio.run(body())


@pytest.mark.parametrize("name", ["EVERY", "KEEP", "MIB"])
def test_bounds_are_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Bounds.from_environment() == Bounds(3600.0, 0.0, 0.0)
    for text in ("often", "-1", "nan"):
        monkeypatch.setenv(f"DSEC_LOG_{name}", text)
        with pytest.raises(InvalidRequest, match=f"DSEC_LOG_{name} is a number"):
            Bounds.from_environment()
