"""Milliseconds of a warm claim and one command through the API server over HTTP.

Starts a server and an Edge of its own in a temporary folder, keeps a pool of ready containers, and claims, runs `true`
and kills, one at a time. Bars: p50 <= 6 ms, p99 <= 30 ms. A round trip that the server refuses by itself says how
much of it is HTTP; what the Edge needs alone is "warm claim + exec" of dsec_start.py.

    python benchmarks/dsec_api.py --rounds 200
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from dsec.api.client import RemoteTransport
from dsec.cluster.link import Link
from dsec.errors import NotFound
from dsec.types import Spec

SPEC = {"substrate": "container", "memory": 128, "pids": 32, "timeout": 300}


def shown(name: str, seconds: list[float]) -> str:
    ordered = sorted(seconds)
    cut = [1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))] for part in (0.5, 0.9, 0.99)]
    return f"{name:32} p50 {cut[0]:6.2f}  p90 {cut[1]:6.2f}  p99 {cut[2]:6.2f} ms"


async def cycle(transport: RemoteTransport, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"claim": [], "command": [], "both": []}
    for _ in range(rounds):
        spec = {"spec": Spec.from_dict(SPEC).as_dict()}
        began = time.perf_counter()
        info, _ = await transport.call("create", spec)
        claimed = time.perf_counter()
        result, _ = await transport.call("commands.run", {"id": info["id"], "command": ["true"]})
        ended = time.perf_counter()
        assert result["exit_code"] == 0
        for name, seconds in (("claim", claimed - began), ("command", ended - claimed), ("both", ended - began)):
            found[name].append(seconds)
        await transport.call("kill", {"id": info["id"]})
        await asyncio.sleep(0.05)  # the pool refills
    return found


async def refused(api: RemoteTransport, rounds: int) -> list[float]:
    """Seconds until the server says that there is no such operation, each after the same pause."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        with contextlib.suppress(NotFound):
            await api.call("nothing", {})
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(0.05)
    return seconds


async def measure(url: str, key: str, home: Path, rounds: int) -> None:
    edge, api = Link(f"unix:{home}/edge.sock"), RemoteTransport(url, key)
    print("pool:", (await edge.call("pool", {"spec": Spec.from_dict(SPEC).as_dict(), "size": 8}))[0])
    print(shown("a round trip to the server alone", await refused(api, rounds)))
    for _ in range(2):
        found = await cycle(api, rounds)
        for name in ("claim", "command", "both"):
            print(shown(f"API server, {name}", found[name]))
    await edge.close()
    await api.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    print(f"load {os.getloadavg()[0]:.2f} before")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        command = [
            sys.executable,
            "-c",
            "from dsec.api.cli import app; app()",
            "serve",
            "--home",
            folder,
            "--port",
            "8791",
        ]
        with open(f"{folder}/serve.log", "w+") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
            try:
                while True:
                    text = Path(log.name).read_text()
                    try:
                        if httpx.get("http://127.0.0.1:8791/health").status_code == 200:
                            break
                    except httpx.TransportError:
                        assert server.poll() is None, text
                    time.sleep(0.1)
                match = re.search(r"dsec_\S+", text)
                assert match, text
                asyncio.run(measure("http://127.0.0.1:8791", match[0], Path(folder), rounds))
            finally:
                server.terminate()
                server.wait(10)
                asyncio.run(end(Path(folder)))
    print(f"load {os.getloadavg()[0]:.2f} after")


async def end(home: Path) -> None:
    link = Link(f"unix:{home}/edge.sock")
    await link.call("shutdown", {"destroy": True})
    await link.close()
    await asyncio.sleep(1)


if __name__ == "__main__":
    main()
