"""Where one decoded token of a full-size Flash layer spends its time: every C++ call with its bytes and its share of
the bandwidth, and what lies between the calls (Python, torch, and the watching itself).

    python benchmarks/flash_steps.py --context 4096 --json runs/flash_steps.json

Layers and weights are those of `flash_layer.py`. The bandwidth is measured in the same run: copying, and reading alone.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import _bench as bench
from flash_layer import LAYERS, SIDES, Clock, Ours, write


def _bytes(bits: int, elements: int) -> float:
    return elements * (bits if bits > 4 else 4.25) / 8  # FP4 with its scales


def _number(address: int, kind: Any) -> int:
    return int(ctypes.cast(address, ctypes.POINTER(kind))[0])


def _linear(plain: int, v: list[int]) -> tuple[str, float]:
    _, out, width, groups = v[-4:]
    return f"{groups * out:,} x {width:,}", _bytes(v[1], groups * out * width)


def _experts(plain: int, v: list[int]) -> tuple[str, float]:
    _, choices, _, dim, inner = v[6:11]
    return f"{choices} of 3 x {inner:,} x {dim:,}", _bytes(v[1], 3 * choices * dim * inner)


def _rounded(plain: int, v: list[int]) -> tuple[str, float]:
    _, out, width = v[5:8]
    return f"{out:,} x {width:,}", _bytes(v[1], out * width)


def _mixture(plain: int, v: list[int]) -> tuple[str, float]:
    _, choices, _, dim, inner, shared = v[7:13]
    size = _bytes(v[1], 3 * choices * dim * inner) + _bytes(8, 3 * dim * shared)
    return f"{choices} of 3 x {inner:,} x {dim:,}, and the shared one", size


def _project(plain: int, v: list[int]) -> tuple[str, float]:
    width, channels = v[7:9]
    return f"2 x {width:,} x {channels:,}", _bytes(plain, 2 * width * channels)


def _choose(plain: int, v: list[int]) -> tuple[str, float]:
    entries, dim, k = v[9], v[12], v[13]
    return f"{k} of {entries:,}", _bytes(plain, entries * dim)


def _attend(plain: int, v: list[int]) -> tuple[str, float]:
    rows = _number(v[3], ctypes.c_int32) - _number(v[2], ctypes.c_int32)
    if v[4]:
        rows += _number(v[6], ctypes.c_int32) if v[6] else _number(v[8], ctypes.c_int64) - _number(v[7], ctypes.c_int64)
    return f"{rows} rows", _bytes(plain, rows * v[14])


def _enter(plain: int, v: list[int]) -> tuple[str, float]:
    return "", 4.0 * 24 * 4 * v[12]


SIZES: dict[str, Callable[[int, list[int]], tuple[str, float]]] = {
    "linear": _linear, "rounded": _rounded, "experts": _experts, "mixture": _mixture, "project": _project,
    "choose": _choose, "attend": _attend, "enter": _enter,
}  # fmt: skip
"""From a function's first word, the bits of its rows and its arguments: what it works on and its bytes."""


class Watched:
    """A compiled library, with the seconds of every call in ``seen``; ``plain``: bits of an element of its rows."""

    def __init__(self, library: Any, plain: int, seen: list[tuple[str, float, float]]) -> None:
        self.library, self.plain, self.seen = library, plain, seen

    def __getattr__(self, name: str) -> Callable[..., None]:
        function, sizes = getattr(self.library, name), SIZES.get(name.split("_")[0], lambda *_: ("", 0.0))

        def run(*arguments: Any) -> None:
            started = time.perf_counter()
            function(*arguments)
            seconds = time.perf_counter() - started
            shape, size = sizes(self.plain, [getattr(a, "value", a) or 0 for a in arguments])
            self.seen.append((f"{name} {shape}".strip(), size, seconds))

        self.__dict__[name] = run
        return run


def steps(spec: dict[str, Any]) -> dict[str, Any]:
    """{layer: {"ms": unwatched, "watched ms": watched, "calls": [[what, bytes, ms]]}}, medians per token."""
    import torch

    from dsv4.kernels.cpu import library

    side = Ours(Path(spec["folder"]), SIDES[spec["side"]])
    ids = torch.randint(1000, (1, 256 + spec["decode"]), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[str, float, float]] = []
    types = {None: 32, torch.float32: 32, torch.bfloat16: 16}
    watched, found = {dtype: Watched(library.library(dtype), bits, seen) for dtype, bits in types.items()}, {}
    with torch.inference_mode():
        clocks = [Clock(layer) for layer in side.layers]
        side.feed(ids[:, :256])
        side.pretend(spec["context"])

        def decode() -> list[float]:
            for clock in clocks:
                clock.seconds.clear()
            for token in ids[:, 256:].split(1, 1):
                side.feed(token)
            return [1000 * statistics.median(clock.seconds) for clock in clocks]

        plain = decode()
        library.library = lambda dtype=None: watched[dtype]  # type: ignore[assignment]
        marks: list[int] = []
        for layer in side.layers:
            layer.register_forward_pre_hook(lambda *_: marks.append(len(seen)))
        observed = decode()
    marks.append(len(seen))
    for i, name in enumerate(LAYERS):
        calls: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for start, end in list(pairwise(marks))[i :: len(LAYERS)]:
            mine: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
            for call, size, seconds in seen[start:end]:
                mine[call][0] += size
                mine[call][1] += 1000 * seconds
            for call, (size, ms) in mine.items():
                calls[call].append((size, ms))
        middle = [
            [call, *(statistics.median(column) for column in zip(*times))]
            for call, times in calls.items()
            if len(times) > spec["decode"] / 2
        ]
        found[name] = {"ms": plain[i], "watched ms": observed[i], "calls": middle}
    return found


def reading(spec: dict[str, Any]) -> dict[str, Any]:
    """GB/s of reading alone: the sum of 1 GiB of float32."""
    import torch

    x, best = torch.ones(1 << 28), 1e9
    for _ in range(6):
        started = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - started)
    return {"read_gb_s": x.nbytes / best / 1e9}


def table(record: dict[str, Any], name: str, side: str, bandwidth: float) -> str:
    layer, rows = record[name], []
    for call, size, ms in sorted(layer["calls"], key=lambda c: -c[2]):
        share = f"{size / ms / 1e6 / bandwidth:.0%}" if size else ""
        rows.append([call, f"{size / 1e6:.2f}" if size else "", f"{ms:.3f}", share])
    inside, size = sum(ms for _, _, ms in layer["calls"]), sum(size for _, size, _ in layer["calls"])
    rows.append(["between the calls", "", f"{layer['watched ms'] - inside:.3f}", ""])
    share = f"{size / layer['ms'] / 1e6 / bandwidth:.0%}"
    rows.append(["**together, unwatched**", f"{size / 1e6:.1f}", f"{layer['ms']:.2f}", share])
    return f"{side}, {name}\n\n" + bench.table(["call", "MB", "ms", "of the bandwidth"], rows)


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--sides", nargs="+", default=["ours, native"], choices=["ours", "ours, native"])
    parser.add_argument("--folder", type=Path, help="as in flash_layer.py")
    options = parser.parse_args()
    if options.worker:
        bench.worker(json.loads(options.worker), {"write": write, "steps": steps, "reading": reading})
        return
    before = bench.before(options.busy_ok)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "release" / "config.json").exists():
            spec = {"kind": "write", "folder": str(folder), "experts": options.experts, "threads": options.threads}
            bench.measure(spec)
        shape = {"folder": str(folder), "context": options.context, "decode": options.decode}
        cases = [{"kind": "machine"}, {"kind": "reading"}]
        cases += [{"kind": "steps", "side": side, **shape} for side in options.sides]
        records = bench.rounds(cases, options, "steps")
    around = bench.surroundings(options, before, records)
    bandwidth = max(bench.values(records, "copy_gb_s") + bench.values(records, "read_gb_s"))
    found = [r for r in records if r["kind"] == "steps"]
    text = "\n".join(table(r, name, r["side"], bandwidth) for r in found for name in LAYERS)
    bench.report(f"Bandwidth: {bandwidth:.1f} GB/s.\n\n{text}", around, records, options.json)


if __name__ == "__main__":
    main()
