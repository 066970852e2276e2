"""Which share of this machine's bfloat16 matrix rate the linear layers of a full-size Flash prefill reach.

    python benchmarks/prefill_linears.py

2,048 rows through each dense matrix as `dtype="native"` stores it (FP8, activations rounded), and routed experts in FP4
(48 rows an expert, as 2,048 tokens give that choose 6 of 256, and 384). The rate is the best product that torch does in
the same process, in bfloat16 or, for processors without bfloat16 instructions, in float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import _bench as bench

DENSE = {
    "wq_a": (1024, 4096),
    "wq_b": (32768, 1024),
    "wkv": (512, 4096),
    "wo_b": (4096, 8192),
    "shared w1": (2048, 4096),
}
ROWS, EXPERTS, WIDTH, INNER = 2048, 8, 4096, 2048


def rates(spec: dict[str, Any]) -> dict[str, Any]:
    """{what: GFLOP/s}, the best of three calls (fewer where they take long) after one that warms up."""
    import torch

    from dsv4 import kernels, numerics

    def packed(shape: tuple[int, ...], form: numerics.Format) -> numerics.Packed:
        return numerics.Packed(*numerics.quantise(torch.randn(shape), form), form)

    def rate(run: Callable[[], object], flops: float) -> float:
        run()
        seconds: list[float] = []
        while len(seconds) < 3 and sum(seconds) < 5:
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return flops / min(seconds) / 1e9

    found = {}
    with torch.inference_mode():
        for out, width in ((4096, 4096), (8192, 4096), (4096, 8192)):
            x, w = torch.randn(ROWS, width).bfloat16(), torch.randn(out, width).bfloat16()
            found[f"torch {out} x {width}"] = rate(lambda x=x, w=w: x @ w.T, 2.0 * ROWS * out * width)
            x, w = x.float(), w.float()
            found[f"torch {out} x {width}, float32"] = rate(lambda x=x, w=w: x @ w.T, 2.0 * ROWS * out * width)
        for name, (out, width) in DENSE.items():
            x, weight = torch.randn(ROWS, width).bfloat16(), packed((out, width), numerics.FP8)
            found[name] = rate(lambda x=x, w=weight: kernels.linear(x, w), 2.0 * ROWS * out * width)
        w1, w3 = (packed((EXPERTS, INNER, WIDTH), numerics.FP4) for _ in range(2))
        w2 = packed((EXPERTS, WIDTH, INNER), numerics.FP4)
        for rows in (48, 384):
            x, owner = torch.randn(rows * EXPERTS, WIDTH).bfloat16(), torch.arange(rows * EXPERTS)[:, None] % EXPERTS
            ones = torch.ones(len(x), 1)
            run = lambda x=x, o=owner, g=ones: kernels.routed_experts(x, o, g, w1, w2, w3, 10.0)  # noqa: E731
            found[f"FP4 experts, {rows} rows each"] = rate(run, 6.0 * len(x) * WIDTH * INNER)
    return found


def main() -> None:
    parser = bench.arguments(__doc__)
    options = parser.parse_args()
    if options.worker:
        bench.worker(json.loads(options.worker), {"rates": rates})
        return
    before = bench.before(options.busy_ok)
    records = bench.rounds([{"kind": "machine"}, {"kind": "rates"}], options, "linears")
    around = bench.surroundings(options, before, records)
    names = [n for n in records[-1] if n.startswith(("torch ", "FP4")) or n in DENSE]
    best = max(max(bench.values(records, n)) for n in names if n.startswith("torch "))
    rows = [[n, f"{max(bench.values(records, n)):.0f}", f"{max(bench.values(records, n)) / best:.0%}"] for n in names]
    bench.report(bench.table(["2,048 rows", "GFLOP/s", "of the best product"], rows), around, records, options.json)


if __name__ == "__main__":
    main()
