"""What the speed benchmarks share: a quiet machine or no numbers, one process a measurement, the machine's limits.

A measurement runs in a process of its own, so that its peak memory is its own and nothing is warm from its rival.
Rivals alternate within a round and the order turns from round to round, so that a slow minute hits both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv4.common.console import Progress
from dsv4.common.files import atomic_write
from dsv4.config import Config

BUSY_CORES = 0.15
"""Processor time that other processes may use, in cores, before the numbers stop meaning anything."""
TOO_BUSY = 3  # exit code


def _busy_seconds() -> float | None:
    """Seconds of processor time spent by anyone since boot (None where the system does not say)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(value) for value in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # neither idle nor waiting for a disk


def others(seconds: float = 2.0) -> float:
    """Cores that other processes use right now; without /proc/stat the load average stands in."""
    before = _busy_seconds()
    time.sleep(seconds)
    after = _busy_seconds()
    return os.getloadavg()[0] if before is None or after is None else (after - before) / seconds


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options every speed benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; medians are reported")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--busy-ok", action="store_true", help="measure although other processes use the machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement to FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def require_quiet(busy_ok: bool) -> float:
    """Cores used by others; ends the process with code 3 if that is too much."""
    used = others()
    if used > BUSY_CORES and not busy_ok:
        allowed = f"{BUSY_CORES} allowed (--busy-ok measures anyway)"
        print(f"the machine is busy: other processes use {used:.2f} cores, {allowed}", file=sys.stderr)
        raise SystemExit(TOO_BUSY)
    return used


def measure(spec: dict[str, Any], env: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs this script as a worker on ``spec`` -> its record, with ``others``: the cores that others used meanwhile."""
    threads = {"OMP_NUM_THREADS": str(spec["threads"])}
    command = [sys.executable, sys.argv[0], "--worker", json.dumps(spec)]
    own, busy, started = resource.getrusage(resource.RUSAGE_CHILDREN), _busy_seconds(), time.monotonic()
    done = subprocess.run(command, env=os.environ | threads | (env or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measurement {spec} failed:\n{done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # a rival may say more
    record: dict[str, Any] = json.loads(lines[-1])
    after, wall, busy_after = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started, _busy_seconds()
    if busy is not None and busy_after is not None:
        mine = after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
        record["others"] = round(max(busy_after - busy - mine, 0) / wall, 3)
    return record


def worker(spec: dict[str, Any], kinds: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The worker's side of `measure`: prints the record of ``kinds[spec["kind"]](spec)``, with its peak memory."""
    import torch

    from dsv4.common.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(spec["threads"])
    record = {**kinds, "machine": _machine}[spec["kind"]](spec)
    print(json.dumps(record | {"peak_gib": peak_gib()}))


def peak_gib() -> float:
    """Peak resident memory of this process in GiB. (ru_maxrss would count what its parent held when it was started.)"""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _machine(spec: dict[str, Any]) -> dict[str, Any]:
    """The limits of the machine: GB/s of a stream copy, read and write counted, and GFLOP/s of a matrix product (the
    better of torch's and ours: torch's float32 product leaves half of some processors idle)."""
    import torch

    from dsv4.kernels import linear

    def best(work: Callable[[], object]) -> float:
        seconds: list[float] = []
        while len(seconds) < 12 and sum(seconds) < 5:  # some processors take 10 s for a bfloat16 product
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    source, target = torch.ones(1 << 26), torch.zeros(1 << 26)
    record = {"copy_gb_s": 2 * 4 * source.numel() / best(lambda: target.copy_(source)) / 1e9}
    for name in ("float32", "bfloat16"):
        x = torch.randn(2048, 2048).to(getattr(torch, name))
        with torch.no_grad():
            seconds = min(best(lambda x=x: x @ x), best(lambda x=x: linear(x, x)))  # type: ignore[misc]
        record[f"{name}_gflop_s"] = 2 * 2048**3 / seconds / 1e9
    return record


def rounds(cases: list[dict[str, Any]], options: argparse.Namespace, label: str) -> list[dict[str, Any]]:
    """Measures every case once a round, the order reversed every second round. A case may hold "env". Each record is
    the case and what was measured; the machine's limits are cases like any other."""
    found = []
    with Progress(options.rounds * len(cases), label, "measurements") as progress:
        for number in range(options.rounds):
            for case in cases if number % 2 == 0 else reversed(cases):
                spec = {key: value for key, value in case.items() if key != "env"} | {"threads": options.threads}
                found.append(case | {"round": number} | measure(spec, case.get("env")))
                found[-1].pop("folder", None)  # a temporary name, of no use to a reader
                progress.update(1)
    return found


def values(records: list[dict[str, Any]], field: str, **wanted: Any) -> list[float]:
    """``field`` of every record that matches ``wanted``, in order of measurement."""
    return [r[field] for r in records if field in r and all(r.get(key) == value for key, value in wanted.items())]


def middle(records: list[dict[str, Any]], field: str, **wanted: Any) -> float:
    """The median over rounds."""
    return statistics.median(values(records, field, **wanted))


def shown(records: list[dict[str, Any]], field: str, digits: int = 0, **wanted: Any) -> str:
    """``median (least to most)`` over rounds."""
    found = values(records, field, **wanted)
    return f"{statistics.median(found):,.{digits}f} ({min(found):,.{digits}f} to {max(found):,.{digits}f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def surroundings(options: argparse.Namespace, before: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What a reader must know about the run: machine, threads, load before and after, what others used meanwhile."""
    import torch

    model = Path("/proc/cpuinfo")
    names = [line for line in model.read_text().splitlines() if line.startswith("model name")] if model.exists() else []
    return {
        **before,
        "load_after": round(os.getloadavg()[0], 2),
        "others_at_most": max(values(records, "others"), default=None),
        "threads": options.threads,
        "rounds": options.rounds,
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        **{name: round(max(values(records, name)), 1) for name in LIMITS if values(records, name)},
    }


LIMITS = ("copy_gb_s", "float32_gflop_s", "bfloat16_gflop_s")


def before(busy_ok: bool) -> dict[str, Any]:
    """Refuses a busy machine; else the load before the run."""
    return {"load_before": round(os.getloadavg()[0], 2), "others_before": round(require_quiet(busy_ok), 2)}


def report(text: str, around: dict[str, Any], records: list[dict[str, Any]], file: Path | None) -> None:
    """Prints the tables below one line about the surroundings, and writes the records."""
    used = around["others_at_most"]
    disturbed = " **Disturbed: repeat it on a quiet machine.**" if used and used > BUSY_CORES else ""
    print(
        f"{around['cpu']}, {around['threads']} threads of {around['cores']} cores, torch {around['torch']}; medians of "
        f"{around['rounds']} rounds (least to most); load {around['load_before']} before and {around['load_after']} "
        f"after, others used at most {used} cores.{disturbed}\nLimits measured in the same run: copying "
        f"{around['copy_gb_s']} GB/s; matrix products float32 {around['float32_gflop_s']}, bfloat16 "
        f"{around['bfloat16_gflop_s']} GFLOP/s.\n\n{text}"
    )
    if file:
        atomic_write(file, json.dumps({"surroundings": around, "measurements": records}, indent=1) + "\n")


def flops(config: Config, tokens: int, heads: int) -> float:
    """FLOPs (2 per multiply-add) of one forward pass over the first ``tokens`` positions of a sequence, ``heads`` of
    which go through the vocabulary's matrix: active matrices, and attention over visible rows only."""
    from dsv4.model.costs import parameters

    head = config.vocab_size * config.hidden_size
    total = 2 * (parameters(config).active - head) * tokens + 2 * head * heads
    for layer in config.layers:
        rows = keys = 0
        for t in range(1, tokens + 1):
            seen = t // layer.compress_ratio if layer.compress_ratio else 0
            rows += min(t, layer.window) + (min(seen, config.index_topk) if layer.indexer else seen)
            keys += seen if layer.indexer else 0
        total += 4 * config.num_attention_heads * config.head_dim * rows
        total += 2 * config.index_n_heads * config.index_head_dim * keys
    return total


def decode_bytes(config: Config, context: int, dtype: str) -> float:
    """Bytes that decoding one token at ``context`` must read: every active matrix once, and the visible cache rows."""
    from dsv4.model.costs import groups
    from dsv4.model.dtypes import is_float32

    size, total = 4 if dtype == "float32" else 2, 0
    for tensor in groups(config):
        if tensor.multiplies and not tensor.name.startswith("mtp."):
            active = config.num_experts_per_tok if tensor.experts else 1
            total += tensor.numel * active * (4 if is_float32(tensor.name) else size)
    for layer in config.layers:
        seen = context // layer.compress_ratio if layer.compress_ratio else 0
        rows = min(context, layer.window) + (min(seen, config.index_topk) if layer.indexer else seen)
        total += size * (rows * config.head_dim + (seen * config.index_head_dim if layer.indexer else 0))
    return total
