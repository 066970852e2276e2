"""The MXFP4 expert MLP at full Flash size against kt-kernel's, on the same weights: 1 row and 256 rows.

    python benchmarks/kt_experts.py --kt path/to/site-packages --json runs/kt_experts.json

kt-kernel is not a dependency: install it beside the project (`pip install --no-deps kt-kernel gguf` into a scratch
environment) and name that environment's site-packages. Both sides read the routed experts of one synthetic official
layer and must first agree (kt-kernel does not round its inputs to E4M3, ours does, as the release: some percent).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench as bench

LAYER, CHOICES, LIMIT = 4, 6, 10.0


def write(spec: dict[str, Any]) -> dict[str, Any]:
    from dsv4.checkpoint.synthetic import synthesise

    synthesise("flash", [LAYER], Path(spec["folder"]) / "release", experts=spec["experts"])
    return {}


def routed(rows: int, experts: int) -> tuple[Any, Any, Any]:
    """Hidden vectors bf16 [rows, 4096], experts int64 [rows, 6], weights float32 [rows, 6]; always the same."""
    import torch

    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4096, generator=generator).bfloat16()
    chosen = torch.rand(rows, experts, generator=generator).argsort(1)[:, :CHOICES].contiguous()
    return x, chosen, torch.rand(rows, CHOICES, generator=generator)


def ours(spec: dict[str, Any]) -> Callable[..., Any]:
    import dsv4
    from dsv4.kernels import routed_experts

    e = dsv4.load(Path(spec["folder"]) / "release", dtype="native").layers[0].ffn.experts
    return lambda x, chosen, weights: routed_experts(x, chosen, weights, e.w1, e.w2, e.w3, LIMIT)


def theirs(spec: dict[str, Any]) -> Callable[..., Any]:
    sys.path.append(spec["kt"])
    import torch
    from kt_kernel import KTMoEWrapper

    plain = torch.empty  # it asks for pinned memory, which needs a GPU
    torch.empty = lambda *a, pin_memory=False, **k: plain(*a, **k)
    experts, folder = spec["experts"], Path(spec["folder"]) / "release"
    wrapper = KTMoEWrapper(
        layer_idx=0, num_experts=experts, num_experts_per_tok=CHOICES, hidden_size=4096, moe_intermediate_size=2048,
        gpu_experts_mask=torch.zeros(experts, dtype=torch.bool), cpuinfer_threads=spec["threads"], threadpool_count=1,
        weight_path=str(folder), chunked_prefill_size=1024, method="MXFP4", swiglu_limit=LIMIT,
    )  # fmt: skip
    wrapper.load_weights(torch.arange(experts))

    def run(x: Any, chosen: Any, weights: Any) -> Any:
        out, rows = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        task = wrapper.moe.forward_task(
            rows.data_ptr(), CHOICES, chosen.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), False
        )
        wrapper.cpu_infer.submit(task)
        wrapper.cpu_infer.sync()
        return out

    return run


SIDES = {"ours": ours, "kt-kernel": theirs}


def agree(spec: dict[str, Any]) -> dict[str, Any]:
    """Relative error of the two results, root mean square."""
    import torch

    with torch.inference_mode():
        inputs = routed(16, spec["experts"])
        a, b = (SIDES[side](spec)(*inputs).float() for side in SIDES)
    return {"error": float((a - b).norm() / b.norm())}


def speed(spec: dict[str, Any]) -> dict[str, Any]:
    """Median milliseconds."""
    import torch

    with torch.inference_mode():
        run = SIDES[spec["side"]](spec)
        record = {}
        for rows in spec["rows"]:
            seconds = []
            for _ in range(3 + max(5, 40 // rows)):
                inputs = routed(rows, spec["experts"])
                started = time.perf_counter()
                run(*inputs)
                seconds.append(time.perf_counter() - started)
            record[f"{rows} ms"] = 1000 * statistics.median(seconds[3:])
    return record


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--kt", help="site-packages with kt_kernel")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="keep the weights here, or use those that are there")
    options = parser.parse_args()
    if options.worker:
        bench.worker(json.loads(options.worker), {"write": write, "agree": agree, "speed": speed})
        return
    if not options.kt or not (Path(options.kt) / "kt_kernel").is_dir():
        parser.error(f"--kt: no kt-kernel in {options.kt or 'no folder'}: install it there first (--help says how)")
    before = bench.before(options.busy_ok)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        shape = {
            "folder": str(folder),
            "experts": options.experts,
            "kt": options.kt,
            "rows": options.rows,
            "threads": options.threads,
        }
        if not (folder / "release" / "config.json").exists():
            bench.measure({"kind": "write", **shape})
        error = bench.measure({"kind": "agree", **shape})["error"]
        if error > 0.05:
            sys.exit(f"the two sides disagree by {error:.1%}, there is nothing to compare")
        cases: list[dict[str, Any]] = [{"kind": "machine"}]
        cases += [{"kind": "speed", "side": side, **shape} for side in SIDES]
        records = bench.rounds(cases, options, "experts")
    around = bench.surroundings(options, before, records) | {"error": error}
    rows = []
    for count in options.rows:
        times = {side: bench.middle(records, f"{count} ms", side=side) for side in SIDES}
        touched = min(count * CHOICES, options.experts) * 3 * 4096 * 2048
        rate = count * CHOICES * 6 * 4096 * 2048 / times["ours"] / 1e6
        moved = f"{touched * 17 / 32 / times['ours'] / 1e6:.1f} GB/s, {rate:.0f} GFLOP/s"
        rows.append(
            [str(count), *(f"{t:.1f}" for t in times.values()), f"**{times['kt-kernel'] / times['ours']:.2f}**", moved]
        )
    text = f"Relative difference of the results {error:.1e}; {options.experts} experts, {CHOICES} a row.\n\n"
    text += bench.table(["rows", "ours, ms", "kt-kernel, ms", "ratio", "ours reaches (all rows' experts once)"], rows)
    bench.report(text, around, records, options.json)


if __name__ == "__main__":
    main()
