"""Sandboxes per second and milliseconds to the first byte of output, beside bare bubblewrap, runc and crun.

Every figure of a section comes from one run in which the rivals alternate; medians, with the load beside them.

    python benchmarks/dsec_start.py --rounds 30            # the table
    python benchmarks/dsec_start.py --live 1000            # also: that many containers at once, and MiB each

Rivals start the same shell from the same root folder with the same kinds of namespaces; ours also has its cgroups, a
capped overlay, a mapped user range, a system call filter and an agent that waits for the next command.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _dsec import an_edge

from dsec.edge.edge import Edge
from dsec.substrates.function import Functions
from dsec.types import Spec

WORDS = ["/bin/sh", "-c", "echo hello"]
BWRAP = (
    "bwrap --unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts --unshare-cgroup-try --disable-userns"
    " --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64"
    " --proc /proc --dev /dev"
).split()


def first_byte(command: list[str]) -> float:
    """Milliseconds until the program's first byte of output."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        passed = (time.perf_counter() - start) * 1000
        if not first:
            raise RuntimeError(f"{command[0]}: {process.stderr.read().decode()[:300]}")
        process.communicate()
    return passed


def bundle(folder: Path, runtime: str) -> list[str]:
    """An OCI bundle around the host's own /usr, and the command that runs it (a new name each time: `{n}`)."""
    root = folder / "rootfs"
    for name in ("usr", "proc", "dev", "tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).is_symlink() or (root / name).symlink_to(f"usr/{name}")
    subprocess.run([runtime, "spec"], cwd=folder, check=True)
    spec = json.loads((folder / "config.json").read_text())
    spec["process"].update(terminal=False, args=WORDS)
    spec["mounts"].append({"destination": "/usr", "source": "/usr", "type": "bind", "options": ["rbind", "ro"]})
    (folder / "config.json").write_text(json.dumps(spec))
    # a hybrid host has an empty v2 tree that Debian's crun refuses: it is taken away in a mount namespace of its own
    hide = "umount /sys/fs/cgroup/unified 2>/dev/null;" if Path("/sys/fs/cgroup/unified").exists() else ""
    return ["unshare", "-m", "sh", "-c", f"{hide} exec {runtime} run -b {folder} bench-{{n}}"]


async def ours(edge: Edge, **spec: Any) -> tuple[float, str]:
    """Milliseconds from the create call to the first byte of output, and the sandbox's id."""
    start = time.perf_counter()
    info, _ = await edge.call("create", {"spec": spec})
    async for _kind, _data in edge.stream("commands.run", {"id": info["id"], "command": WORDS}):
        passed = (time.perf_counter() - start) * 1000
        break
    return passed, info["id"]


def p(values: list[float], q: float) -> float:
    return sorted(values)[min(int(len(values) * q), len(values) - 1)]


def row(name: str, values: list[float], unit: str = "ms") -> None:
    print(f"  {name:34} p50 {statistics.median(values):8.2f}   p99 {p(values, 0.99):8.2f} {unit}", flush=True)


async def cold(edge: Edge, rounds: int, folder: Path) -> None:
    rivals: dict[str, Callable[[int], float]] = {"bwrap, bare": lambda n: first_byte([*BWRAP, *WORDS])}
    for runtime in ("runc", "crun"):
        if os.geteuid() == 0 and (path := shutil.which(runtime)):
            (folder / runtime).mkdir()
            command = bundle(folder / runtime, path)
            rivals[f"{runtime} run"] = lambda n, c=command: first_byte([part.format(n=n) for part in c])  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in [*rivals, "dsec, cold create -> output"]}
    for n in range(rounds + 2):
        for name, run in rivals.items():
            try:
                took = await asyncio.to_thread(run, n)
            except RuntimeError as error:
                print(f"  {name}: cannot run here: {error}")
                times.pop(name, None)
                continue
            if n >= 2 and name in times:
                times[name].append(took)
        took, id = await ours(edge)
        await edge.call("kill", {"id": id})
        if n >= 2:
            times["dsec, cold create -> output"].append(took)
    for name, values in times.items():
        row(name, values)
    mine = statistics.median(times["dsec, cold create -> output"])
    for name in times:
        if name in rivals:
            print(f"  dsec / {name}: {mine / statistics.median(times[name]):.2f}")


async def warm(edge: Edge, rounds: int) -> None:
    await edge.call("pool", {"spec": {}, "size": 8})
    times = []
    for _ in range(rounds):
        took, id = await ours(edge)
        times.append(took)
        await edge.call("kill", {"id": id})
        await asyncio.sleep(0.05)
    row("dsec, warm claim + exec", times)
    await edge.call("pool", {"spec": {}, "size": 0})


async def burst(edge: Edge, count: int, flight: int) -> None:
    gate = asyncio.Semaphore(flight)
    failed = 0

    async def one() -> None:
        nonlocal failed
        async with gate:
            try:
                _, id = await ours(edge)
                await edge.call("kill", {"id": id})
            except Exception as error:
                failed += 1
                print(f"  failed: {error}")

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    await edge.substrate("container").close()  # the teardown belongs to the figure
    rate = count / (time.perf_counter() - start)
    print(f"  {count} creates, {flight} in flight, with teardown: {rate:.0f}/s, {failed} failed")


def available() -> float:
    """MiB that the host could give out."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 1024


async def live(edge: Edge, count: int) -> None:
    before, start = available(), time.perf_counter()
    gate = asyncio.Semaphore(8)

    async def one() -> str:
        async with gate:
            return (await ours(edge, timeout=3600, memory=64, disk=16))[1]

    ids = await asyncio.gather(*(one() for _ in range(count)))
    await asyncio.sleep(2)
    seconds, each = time.perf_counter() - start - 2, (before - available()) / count
    print(f"  {count} live at once after {seconds:.1f} s, {each:.2f} MiB each (MemAvailable), agents included")
    await asyncio.gather(*(edge.call("kill", {"id": id}) for id in ids))


async def calls(seconds: float) -> None:
    for variant in ("resident", "forked", "namespaced"):
        box = Functions(variant, Spec(substrate="function", image=variant, cpu=4))
        code, done, end = "def main(x): return x", 0, time.perf_counter() + seconds
        await box.call(code, [1], {}, 30)

        async def loop(box: Functions = box, end: float = end) -> int:
            n = 0
            while time.perf_counter() < end:
                await box.call(code, [1], {}, 30)  # noqa: B023 - the same code in every loop
                n += 1
            return n

        start = time.perf_counter()
        done = sum(await asyncio.gather(*(loop() for _ in range(4))))
        print(f"  function, {variant}: {done / (time.perf_counter() - start):.0f} calls/s")
        await box.destroy()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--burst", type=int, default=100, help="creates in the burst")
    parser.add_argument("--live", type=int, default=0, help="containers at once")
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls per function variant")
    options = parser.parse_args()
    async with an_edge(max(2000, options.live + 100)) as edge:
        _, id = await ours(edge)  # compiles, tests the walls
        await edge.call("kill", {"id": id})
        await cold(edge, options.rounds, edge.home)
        await warm(edge, options.rounds)
        await burst(edge, options.burst, 8)
        if options.live:
            await live(edge, options.live)
    await calls(options.seconds)


if __name__ == "__main__":
    asyncio.run(main())
