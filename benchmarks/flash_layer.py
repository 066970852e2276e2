"""Full-size V4-Flash layers, decoding and prefill, against the same layers in transformers' DeepseekV4ForCausalLM.

    python benchmarks/flash_layer.py --json runs/flash_layer.json

A synthetic release of three real-size layers (window, CSA, HCA; random weights, fewer routed experts so that both
sides fit into 24 GB; a token still uses six) is written once. Ours runs it in bfloat16 and as released (native: FP4
experts, FP8 linears), transformers in bfloat16. Each layer is timed by itself. The cache of a long context is filled
with random rows on both sides: reading 65,536 tokens through transformers' dense attention would take days.

The floor of decoding is the bytes of the weights a token uses over the bandwidth of a copy measured in the same run,
that of prefill the operations of the linear layers over the rate of the best matrix product.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench as bench

LAYERS = {"window": 0, "CSA": 4, "HCA": 5}
SIDES = {"ours": "bfloat16", "ours, native": "native", "transformers": "bfloat16"}


def write(spec: dict[str, Any]) -> dict[str, Any]:
    """The release, and the same in transformers' layout."""
    from dsv4.checkpoint.convert import convert
    from dsv4.checkpoint.synthetic import synthesise

    folder = Path(spec["folder"])
    synthesise("flash", list(LAYERS.values()), folder / "release", experts=spec["experts"])
    convert(folder / "release", folder / "transformers", to="transformers")
    return {}


class Clock:
    """Seconds of every call of a module."""

    def __init__(self, module: Any) -> None:
        self.seconds: list[float] = []
        module.register_forward_pre_hook(lambda *_: self.seconds.append(-time.perf_counter()))
        module.register_forward_hook(lambda *_: self.seconds.append(self.seconds.pop() + time.perf_counter()))


class Ours:
    def __init__(self, folder: Path, dtype: str) -> None:
        import dsv4

        self.model = dsv4.load(folder / "release", dtype=dtype)
        self.layers, self.state = self.model.layers, self.model.new_state()

    def feed(self, ids: Any) -> None:
        self.model._trunk(ids, self.state, None, None, None)

    def pretend(self, context: int) -> None:
        """A state as after `context` tokens, with random rows."""
        import torch

        self.state.length = torch.tensor([context])
        for layer, memory in zip(self.model.config.layers, self.state.layers):
            memory.window.rows.normal_()
            for part in (memory.kv, memory.index):
                if part is not None:
                    part.tail.rows.normal_()
                    shape = (1, context // layer.compress_ratio, part.history.rows.shape[-1])
                    part.history.rows = torch.randn(shape, dtype=part.history.rows.dtype)

    def bytes_per_token(self) -> list[float]:
        """Weights that one token reads in each layer."""
        found, config = [], self.model.config
        for block in self.layers:
            size = sum(t.nbytes for t in block.state_dict().values() if t.dim() > 1)
            routed = sum(t.nbytes for t in block.ffn.experts.state_dict().values())
            table = block.ffn.gate.tid2eid.nbytes if block.layer.router == "hash" else 0
            found.append(size - table - routed * (1 - config.num_experts_per_tok / config.n_routed_experts))
        return found


class Theirs:
    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        settings = {"dtype": getattr(torch, dtype), "experts_implementation": "grouped_mm"}
        self.model = AutoModelForCausalLM.from_pretrained(folder / "transformers", **settings).eval().model
        self.layers, self.cache = self.model.layers, DynamicCache(config=self.model.config)

    def feed(self, ids: Any) -> None:
        self.model(ids, past_key_values=self.cache)

    def pretend(self, context: int) -> None:
        import torch

        for cached in self.cache.layers:
            cached.keys = cached.values = torch.randn_like(cached.keys)
            cached.cumulative_length = context
            for name, rows in getattr(cached, "compressed_kv", {}).items():
                entries = context // cached.compress_rate
                cached.compressed_kv[name] = torch.randn(1, entries, rows.shape[-1], dtype=rows.dtype)
                cached.entry_count[name] = entries

    def bytes_per_token(self) -> list[float]:
        return [0.0 for _ in self.layers]


def speed(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each layer: a decoded token at every context (median), a prefill of 2,048 (best of two)."""
    import torch

    side = (Theirs if spec["side"] == "transformers" else Ours)(Path(spec["folder"]), SIDES[spec["side"]])
    ids = torch.randint(1000, (1, spec["prefill"]), generator=torch.Generator().manual_seed(1))
    record: dict[str, Any] = {}
    with torch.inference_mode():
        clocks = [Clock(layer) for layer in side.layers]
        side.feed(ids[:, :256])
        for context in spec["contexts"]:
            side.pretend(context)
            for clock in clocks:
                clock.seconds.clear()
            for token in ids[:, : spec["decode"]].split(1, 1):
                side.feed(token)
            for name, clock in zip(LAYERS, clocks):
                record[f"{name} decode {context} ms"] = 1000 * statistics.median(clock.seconds)
        for _ in range(2):
            if isinstance(side, Ours):
                side.state = side.model.new_state()
            else:
                from transformers import DynamicCache

                side.cache = DynamicCache(config=side.model.config)
            for clock in clocks:
                clock.seconds.clear()
            side.feed(ids)
            for name, clock in zip(LAYERS, clocks):
                key = f"{name} prefill ms"
                record[key] = min(record.get(key, 1e9), 1000 * clock.seconds[-1])
    for name, size in zip(LAYERS, side.bytes_per_token()):
        record[f"{name} bytes"] = size
    return record


def tables(records: list[dict[str, Any]], options: Any) -> str:
    """One row per layer and task: all three, the ratios, and the share of the limit: decoding of the bandwidth, with
    the bytes of weights; prefill of the matrix rate, with the operations of the linear layers alone."""
    copy = max(bench.values(records, "copy_gb_s"))
    rate = max(bench.values(records, "bfloat16_gflop_s"))
    rows = []
    for name in LAYERS:
        for task in [*(f"decode {c}" for c in options.contexts), "prefill"]:
            key = f"{name} {task} ms"
            found = {side: bench.middle(records, key, side=side) for side in SIDES}
            row = [f"{name}, {task}", *(f"{value:,.1f}" for value in found.values())]
            row += [f"**{found['transformers'] / found[side]:.1f}**" for side in ("ours", "ours, native")]
            if task == "prefill":  # a bfloat16 weight has two bytes, and two operations with every token
                work = bench.middle(records, f"{name} bytes", side="ours") * options.prefill / 1e6
                row.append(" / ".join(f"{work / found[side] / rate:.0%}" for side in ("ours", "ours, native")))
            else:
                shares = [
                    bench.middle(records, f"{name} bytes", side=side) / found[side] / 1e6 / copy
                    for side in ("ours", "ours, native")
                ]
                row.append(" / ".join(f"{100 * share:.0f} %" for share in shares))
            rows.append(row)
    head = ["full-size Flash layer, ms", *SIDES, "ratio", "ratio, native", "of the limit: bf16 / native"]
    return bench.table(head, rows) + f"\nMatrix products reach {rate:.0f} GFLOP/s in bfloat16.\n"


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--decode", type=int, default=8, help="tokens decoded at each context")
    parser.add_argument("--experts", type=int, default=32, help="routed experts in each layer (the release has 256)")
    parser.add_argument("--folder", type=Path, help="keep the weights here, or use those that are there")
    options = parser.parse_args()
    if options.worker:
        bench.worker(json.loads(options.worker), {"write": write, "speed": speed})
        return
    before = bench.before(options.busy_ok)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "transformers" / "config.json").exists():
            bench.measure(
                {"kind": "write", "folder": str(folder), "experts": options.experts, "threads": options.threads}
            )
        shape = {key: getattr(options, key) for key in ("contexts", "prefill", "decode")}
        cases = [{"kind": "machine"}]
        cases += [{"kind": "speed", "side": side, "folder": str(folder), **shape} for side in SIDES]
        records = bench.rounds(cases, options, "layers")
    around = bench.surroundings(options, before, records)
    bench.report(f"{options.experts} routed experts.\n\n" + tables(records, options), around, records, options.json)


if __name__ == "__main__":
    main()
