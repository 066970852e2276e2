"""Full-size V4-Flash layers with experts on disk, against the same layers in memory: logits to the bit, memory, time.

    dsv4 convert --synthesise flash --layers 0,2,3,4 runs/flash4      # 16.4 GB of random weights as released
    python benchmarks/flash_stream.py runs/flash4 --budget 4GiB --json runs/flash_stream.json

One process a side. Resident needs all of the weights in memory (16 GiB). The tokens are fixed, so both sides see the
same; the first decoded tokens of the streamed side wait for the disk, later ones find some of their experts held.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _bench as bench


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Reads a prompt and decodes; the logits of all positions go to a file."""
    import torch

    import dsv4

    started = time.perf_counter()
    model = dsv4.load(spec["folder"], dtype="native", expert_memory=spec["budget"])
    record: dict[str, Any] = {"load s": time.perf_counter() - started, "loaded gib": bench.peak_gib()}
    tokens = spec["prompt"] + spec["decode"]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    with torch.inference_mode():
        state, seconds, logits = model.new_state(), [], []
        for part in (ids[:, : spec["prompt"]], *ids[:, spec["prompt"] :].split(1, 1)):
            started = time.perf_counter()
            logits.append(model(part, state)[0].clone())
            seconds.append(time.perf_counter() - started)
    torch.save(torch.cat(logits), spec["out"])
    if spec["budget"]:
        cache = model.layers[0].ffn.experts.w1.cache
        record |= {"hits": cache.hits, "misses": cache.misses}
    return record | {"prompt s": seconds[0], "token s": statistics.median(seconds[1:])}


def main() -> None:
    parser = bench.arguments(__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--budget", default="4GiB")
    parser.add_argument("--prompt", type=int, default=24)
    parser.add_argument("--decode", type=int, default=16)
    options = parser.parse_args()
    if options.worker:
        bench.worker(json.loads(options.worker), {"run": run})
        return
    if not options.folder or not (options.folder / "config.json").exists():
        parser.error(f"no release in {options.folder or 'no folder'}: synthesise one first (--help says how)")
    import torch

    before = bench.before(options.busy_ok)
    with tempfile.TemporaryDirectory() as scratch:
        shape = {"kind": "run", "folder": str(options.folder), "prompt": options.prompt, "decode": options.decode}
        sides = {"streamed": options.budget, "resident": None}
        cases = [{"kind": "machine"}]
        cases += [shape | {"side": s, "budget": b, "out": f"{scratch}/{s}.pt"} for s, b in sides.items()]
        records = bench.rounds(cases, options, "sides")
        streamed, resident = (torch.load(f"{scratch}/{side}.pt") for side in sides)
    fields = ("load s", "loaded gib", "prompt s", "token s", "peak_gib")
    rows = [[side, *(bench.shown(records, field, 2, side=side) for field in fields)] for side in sides]
    text = bench.table(
        ["", "load, s", "loaded, GiB", f"{options.prompt} tokens read, s", "a token, s", "peak, GiB"], rows
    )
    equal = torch.equal(streamed, resident)
    text += f"\n{len(resident)} x {resident.shape[1]} logits {'equal to the bit' if equal else 'DIFFER'}"
    hits, misses = (sum(bench.values(records, name)) for name in ("hits", "misses"))
    text += f"; {hits} of {hits + misses} look-ups of experts (three an expert) found it held.\n"
    bench.report(text, bench.surroundings(options, before, records), records, options.json)
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
