"""The trajectory log's figures: durable records/s in groups, replayed steps/s, what logging adds to a command.

    python benchmarks/dsec_log.py [--rounds 3] [--folder DIR] [--busy-ok]

Peers in the same run, on the same disk: a file with one fdatasync per record, and SQLite (WAL, synchronous=FULL) with
one transaction per record. Bars: >= 3,000 durable records/s, >= 20,000 replayed steps/s, a command's overhead at most
two group commits + 5 %. The syncs are counted. In time there are two floors, both in a file whose room is reserved, as
ours is: a bare write and fdatasync of a record, and a commit of the log alone (queue, thread, write, sync, wake-up) of
a record that is given. The share of what is not the disk depends on the disk, so all is timed once more with syncs that
take 3 ms longer. Rounds alternate; medians are printed, with the load before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dsec.trajectory import Live, Replay, TrajectoryLog

SPEC = {"substrate": "container", "image": "host"}
RESULT = {"stdout": "x" * 200, "stderr": "", "exit_code": 0, "truncated": False, "duration": 0.0123}
RECORD = bytes(500)  # about what one of our records takes


async def steps(log: TrajectoryLog, name: str, count: int) -> int:
    """Runs `count` commands that take no time; returns the records written (OPEN, and BEGIN and END of each)."""
    t = await log.open(name, SPEC)
    for i in range(count):
        ticket = await t.begin("run", {"command": f"make test-{i}", "cwd": "/work", "env": {}})
        assert isinstance(ticket, Live)
        await t.end(ticket, RESULT)
    return 1 + 2 * count


def groups(folder: Path, trajectories: int = 64, count: int = 40) -> dict[str, float]:
    """Durable records per second of many trajectories in one log."""

    async def body() -> dict[str, float]:
        log = TrajectoryLog(folder)
        started = time.perf_counter()
        written = sum(await asyncio.gather(*(steps(log, f"t{i}", count) for i in range(trajectories))))
        seconds = time.perf_counter() - started
        log.close()
        return {"log records/s": written / seconds, "records per fsync": written / log.writer.groups}

    return asyncio.run(body())


def serial(folder: Path, count: int = 200) -> dict[str, float]:
    """One trajectory alone: milliseconds that BEGIN and END add to a command, against two bare syncs of a record."""

    async def body(slow: float) -> tuple[float, float, float, float]:
        """(ms per command, syncs per command, ms per sync, ms per commit of the log); ``slow``: seconds that a sync
        takes longer."""
        took: list[float] = []

        def sync(fd: int) -> None:
            began = time.perf_counter()
            if slow:
                time.sleep(slow)
            os.fdatasync(fd)
            took.append(time.perf_counter() - began)

        log = TrajectoryLog(folder / str(slow), sync=sync)
        await steps(log, "warm", 10)
        del took[:]
        started = time.perf_counter()
        await steps(log, "t", count)
        seconds, syncs, each = time.perf_counter() - started, len(took) - 1, sum(took) / len(took)
        started = time.perf_counter()
        for _ in range(count):
            await log.writer.append(1, 1, 0, RECORD)
        commit = (time.perf_counter() - started) / count
        log.close()
        return seconds / count * 1e3, syncs / count, each * 1e3, commit * 1e3

    def bare(reserved: bool) -> float:
        with open(folder / "bare", "wb", buffering=0) as file:
            if reserved:
                os.posix_fallocate(file.fileno(), 0, 1 << 20)
                os.fsync(file.fileno())
            started = time.perf_counter()
            for _ in range(count):
                file.write(RECORD)
                os.fdatasync(file.fileno())
            return (time.perf_counter() - started) / count * 1e3

    appended, before, (ours, syncs, _, commit), after = bare(False), bare(True), asyncio.run(body(0.0)), bare(True)
    sync = (before + after) / 2
    slow, _, each, slow_commit = asyncio.run(body(0.003))
    return {
        "syncs per command, counted": syncs,
        "ms per command": ours,
        "ms per bare sync, appending": appended,
        "ms per bare sync": sync,
        "in bare syncs": ours / sync,
        "ms per commit of the log": commit,
        "in commits of the log": ours / commit,
        "in syncs, each 3 ms longer": slow / each,
        "in commits, each 3 ms longer": slow / slow_commit,
    }


def replay(folder: Path, count: int = 20_000) -> dict[str, float]:
    """Steps per second of a program that is run again, its log on the disk; with and without opening it."""

    async def body() -> dict[str, float]:
        log = TrajectoryLog(folder, durability="async")
        await steps(log, "t", count)
        log.close()
        await asyncio.sleep(0)  # what was written is heard of, and forgotten, as in a process that has died
        log = TrajectoryLog(folder)
        started = time.perf_counter()
        t = await log.open("t", SPEC)
        opened = time.perf_counter()
        for i in range(count):
            ticket = await t.begin("run", {"command": f"make test-{i}", "cwd": "/work", "env": {}})
            assert isinstance(ticket, Replay)
        ended = time.perf_counter()
        log.close()
        return {"replay steps/s": count / (ended - opened), "with opening": count / (ended - started)}

    return asyncio.run(body())


def peers(folder: Path, count: int = 300) -> dict[str, float]:
    with open(folder / "file", "wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(count):
            file.write(RECORD)
            os.fdatasync(file.fileno())
        alone = count / (time.perf_counter() - started)
    database = sqlite3.connect(folder / "peer.sqlite", isolation_level=None)
    database.executescript("pragma journal_mode=wal; pragma synchronous=full; create table record (body blob)")
    started = time.perf_counter()
    for _ in range(count):
        database.execute("insert into record values (?)", (RECORD,))
    rate = count / (time.perf_counter() - started)
    database.close()
    return {"fdatasync each records/s": alone, "SQLite records/s": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    parser.add_argument("--busy-ok", action="store_true", help="measure although the machine is busy")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5 and not options.busy_ok:
        sys.exit(f"load {load:.2f}: the machine is busy (--busy-ok measures anyway)")
    found: dict[str, list[float]] = {}
    measures: list[Callable[[Path], dict[str, float]]] = [peers, groups, serial, replay]
    for number in range(options.rounds):
        for measure in measures if number % 2 == 0 else measures[::-1]:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                for name, value in measure(Path(folder)).items():
                    found.setdefault(name, []).append(value)
    print(f"load {load:.2f} before, {os.getloadavg()[0]:.2f} after; medians of {options.rounds} (least to most)")
    for name, values in found.items():
        print(f"{name:30}{statistics.median(values):12,.2f}   ({min(values):,.2f} to {max(values):,.2f})")


if __name__ == "__main__":
    main()
