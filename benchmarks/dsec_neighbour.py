"""What a sandbox loses to neighbours that take all they can: milliseconds of a small command, alone and beside them.

    python benchmarks/dsec_neighbour.py --rounds 100

Each figure is `/bin/true` and some arithmetic in one container of one core, beside as many containers of one core as
the machine has cores: with eight loops in each, with files that are written and deleted, or with memory that is taken
until something is killed, over and over. Alone and beside are measured in turns. No bar is set for this: what a
neighbour gets is its share, not the empty machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

from _dsec import an_edge

from dsec.edge.edge import Edge
from dsec.types import Spec

HOGS = {
    "processor": "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
    "files": "while :; do head -c 8000000 /dev/zero > /tmp/x; rm /tmp/x; done",
    "memory": "while :; do x=$(head -c 300000000 /dev/zero | tr '\\0' x) 2>/dev/null; done",
}
COMMANDS = {
    "/bin/true": ["/bin/true"],
    "a loop of arithmetic": ["/bin/sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"],
}


@contextlib.asynccontextmanager
async def beside(edge: Edge, command: str) -> AsyncIterator[None]:
    """As many containers as there are cores, each of one core, that run the command until it is over."""
    ids = []
    for _ in range(os.cpu_count() or 1):
        spec: dict[str, Any] = {"cpu": 1, "memory": 128, "disk": 64, "timeout": 600}
        info, _ = await edge.call("create", {"spec": spec})
        ids.append(info["id"])
        edge.boxes[info["id"]].start(["/bin/sh", "-c", command], None, 0)
    await asyncio.sleep(0.5)
    try:
        yield
    finally:
        for id in ids:
            await edge.call("kill", {"id": id})


async def sample(edge: Edge, id: str, command: list[str], rounds: int) -> list[float]:
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        async for _kind, _data in edge.stream("commands.run", {"id": id, "command": command}):
            pass
        took.append((time.perf_counter() - start) * 1000)
    return took


def line(name: str, values: list[float]) -> str:
    ordered = sorted(values)
    return f"{name:34} p50 {statistics.median(values):8.2f}   p95 {ordered[int(len(ordered) * 0.95)]:8.2f} ms"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="commands of each kind, in each of two turns")
    options = parser.parse_args()
    async with an_edge() as edge:
        print(f"limits by {edge.substrate('container').capabilities.limits}")
        info, _ = await edge.call("create", {"spec": Spec(cpu=1, timeout=600).as_dict()})
        id = info["id"]
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(2):
            for label, command in COMMANDS.items():
                found.setdefault((label, "alone"), []).extend(await sample(edge, id, command, options.rounds))
            for hog, script in HOGS.items():
                async with beside(edge, script):
                    for label, command in COMMANDS.items():
                        took = await sample(edge, id, command, options.rounds)
                        found.setdefault((label, f"beside {hog} hogs"), []).extend(took)
        for label in COMMANDS:
            print(label)
            for (mine, where), values in found.items():
                if mine == label:
                    print("  " + line(where, values))


if __name__ == "__main__":
    asyncio.run(main())
