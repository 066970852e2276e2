"""Training speed, forward and backward, against transformers training the same network, and what each part costs.

    python benchmarks/training.py --json training.json

A nano-shaped network of 15 M parameters, sequences of 512 tokens, one document each (transformers cannot keep packed
samples apart). Ours runs as the recipes train: sparse attention, the indexer's own loss and the balance loss
included; transformers leaves the indexer untrained. No optimiser step and no MTP, which transformers does not have.
Both first compute the loss of the same weights on the same tokens and must agree. The second table trains our network
with one thing changed at a time, in the last of --dtypes.

The floor: three times the FLOPs of the forward pass over the measured rate of a matrix product.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import _bench as bench

from dsv4.config import Config

LENGTH = 512
_NANO = Config.preset("nano")
CONFIG = _NANO.replace(
    num_nextn_predict_layers=0, compress_ratios=_NANO.compress_ratios[:-1],
    n_routed_experts=16, moe_intermediate_size=120,
)  # fmt: skip
# name -> what changes: fields of the config, "indexer" (see `Transformer.train_forward`), or "env" (the environment).
PARTS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "with the MTP block": {"num_nextn_predict_layers": 1, "compress_ratios": _NANO.compress_ratios},
    "indexer off: attention over every visible entry": {"indexer": "off"},
    "indexer warm-up: only the indexer learns": {"indexer": "warmup"},
    "no compressed entries: the window alone": {"compress_ratios": (0,) * CONFIG.num_hidden_layers},
    "one residual stream instead of 4": {"hc_mult": 1, "hc_sinkhorn_iters": 1},
    # As many multiplications: 2 of 16 experts and the shared one are 3 widths, one expert and the shared one are 2.
    "no routing: one expert of 1.5 the width": {
        "n_routed_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": CONFIG.moe_intermediate_size * 3 // 2,
    },
    "plain torch instead of the C++ kernels": {"env": {"DSV4_KERNELS": "reference"}},
}  # fmt: skip
TOLERANCE = 1e-3  # nats


def tokens(rows: int) -> Any:
    """Random ids int64 [rows, LENGTH], always the same ones."""
    import torch

    return torch.randint(CONFIG.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def ours(spec: dict[str, Any]) -> Callable[[], Any]:
    """One pass forward and backward -> the language loss, mean over predicted tokens in nats."""
    import torch

    from dsv4.model import Transformer
    from dsv4.training.losses import Batch, components

    part = {key: value for key, value in spec["part"].items() if key not in ("env", "indexer")}
    model = Transformer(CONFIG.replace(**part), dtype=getattr(torch, spec["dtype"])).init_weights(1)
    ids, phase = tokens(spec["rows"]), spec["part"].get("indexer", "sparse")
    batch = Batch(ids, torch.zeros_like(ids), torch.full(ids.shape, 1 / (len(ids) * (LENGTH - 1))))

    def step() -> Any:
        losses, _ = components(model, batch, phase, mtp=bool(model.mtp))
        torch.stack(list(losses.values())).sum().backward()
        model.zero_grad(set_to_none=True)
        return losses.get("lm")

    return step


def theirs(spec: dict[str, Any]) -> Callable[[], Any]:
    """The same for transformers, from the folder of `write_weights`."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = {"dtype": getattr(torch, spec["dtype"]), "experts_implementation": "grouped_mm"}
    model, ids = AutoModelForCausalLM.from_pretrained(spec["folder"], **settings).train(), tokens(spec["rows"])

    def step() -> Any:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss

    return step


ENGINES = {"ours": ours, "transformers": theirs}


def compare(spec: dict[str, Any]) -> dict[str, Any]:
    """The first loss of both, float32."""
    same = spec | {"dtype": "float32", "part": {}}
    return {name: float(engine(same)()) for name, engine in ENGINES.items()}


def speed(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of the fastest of a few steps, after one that warms up."""
    step, seconds = ENGINES[spec["engine"]](spec), []
    step()
    for _ in range(spec["steps"]):
        started, cpu = time.perf_counter(), time.process_time()
        step()
        seconds.append((time.perf_counter() - started, time.process_time() - cpu))
    wall, cpu = min(seconds)
    return {"tokens_s": spec["rows"] * LENGTH / wall, "cpu_s": cpu}


def write_weights(spec: dict[str, Any]) -> dict[str, Any]:
    """The folder that transformers loads; ours makes the same weights from the same seed."""
    import dsv4
    from dsv4.model import Transformer

    model = Transformer(CONFIG).init_weights(1)
    dsv4.save(model, spec["folder"], layout="transformers")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def tables(records: list[dict[str, Any]], options: Any) -> str:
    """Against transformers, and part by part."""
    rivals, work = [], 3 * bench.flops(CONFIG, LENGTH, LENGTH) / LENGTH / 1e9
    for dtype in options.dtypes:
        sides = [{"engine": engine, "dtype": dtype, "name": "as trained"} for engine in ENGINES]
        speeds = [bench.middle(records, "tokens_s", **side) for side in sides]
        limit = max(bench.values(records, f"{dtype}_gflop_s")) / work
        rivals.append([
            dtype, *(bench.shown(records, "tokens_s", **side) for side in sides), f"**{speeds[0] / speeds[1]:.2f}**",
            *(f"{bench.middle(records, 'peak_gib', **side):.2f}" for side in sides),
            f"{100 * speeds[0] / limit:.0f} % of {limit:,.0f}",
        ])  # fmt: skip
    parts, dtype = [], options.dtypes[-1]
    whole = 1 / bench.middle(records, "tokens_s", engine="ours", dtype=dtype, name="as trained")
    for name in PARTS:
        where = {"engine": "ours", "dtype": dtype, "name": name}
        change = 100 * (1 / bench.middle(records, "tokens_s", **where) / whole - 1)
        parts.append([name, bench.shown(records, "tokens_s", **where), f"{change:+.0f} %" if change else ""])
    head = ["dtype", "ours, tokens/s", "transformers, tokens/s", "ratio", "peak GiB, ours", "transformers"]
    return (
        bench.table([*head, "of the FLOP limit"], rivals)
        + f"\nOne thing changed at a time, {dtype}\n\n"
        + bench.table(["ours", "tokens/s", "time of a step"], parts)
    )


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps of a measurement, after one that warms up")
    options = parser.parse_args()
    if options.worker:
        bench.worker(json.loads(options.worker), {"weights": write_weights, "compare": compare, "speed": speed})
        return
    before = bench.before(options.busy_ok)
    with tempfile.TemporaryDirectory() as folder:
        made = bench.measure({"kind": "weights", "folder": folder, "threads": options.threads})
        losses = bench.measure({"kind": "compare", "folder": folder, "rows": 1, "threads": options.threads})
        if abs(losses["ours"] - losses["transformers"]) > TOLERANCE:
            sys.exit(f"the two sides disagree, there is nothing to compare: {losses}")
        cases: list[dict[str, Any]] = [{"kind": "machine"}]
        for dtype in options.dtypes:
            for engine in ENGINES:
                cases.append({"engine": engine, "dtype": dtype, "name": "as trained", "part": {}})
        for name, part in PARTS.items():
            if part:
                case = {"engine": "ours", "dtype": options.dtypes[-1], "name": name, "part": part}
                cases.append(case | {"env": part.get("env")})
        shared = {"kind": "speed", "folder": folder, "steps": options.steps, "rows": options.rows}
        records = bench.rounds([shared | case for case in cases], options, "training")
    around = bench.surroundings(options, before, records) | {"parameters": made["parameters"]}
    text = (
        f"{made['parameters']:,} parameters, {options.rows} sequences of {LENGTH} tokens, forward and backward. Loss "
        f"{losses['ours']:.5f}, transformers {losses['transformers']:.5f}.\n\n"
    )
    bench.report(text + tables(records, options), around, records, options.json)


if __name__ == "__main__":
    main()
