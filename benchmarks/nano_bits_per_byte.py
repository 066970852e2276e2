"""Bits per byte of a model on the held-out standard-library files, beside xz -9e and gzip -9 on the same files.

    python benchmarks/nano_bits_per_byte.py models/nano --corpus runs/corpus/text --out docs/runs/nano

The held-out files come from a corpus folder, or without one from this machine's standard library by the same rule.
Every file is coded by itself: the compressors see one file, the model starts each file with BOS and no other memory.
A file longer than the context is read in windows of that many tokens, each half on top of the one before; a token is
scored once, in the first window that holds it, so from the second window on with at least half a context behind it.
Bits are -log2 of the probability of each token; the model's own size is counted on no side.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import dsv4
from dsv4.common.console import Progress
from dsv4.common.files import atomic_write
from dsv4.data.corpus import candidates, heldout_files, heldout_texts


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """(start, stop, first scored) over ids 0..length; id 0 (BOS) is never scored."""
    found, scored, start = [], 1, 0
    while scored < length:
        stop = min(length, start + context)
        found.append((start, stop, scored))
        scored, start = stop, stop - context // 2
    return found


@torch.inference_mode()
def model_bits(model: Any, tokenizer: Any, texts: dict[str, str], context: int, at_once: int) -> dict[str, float]:
    """Total bits of each text under the model; `at_once` tokens per forward pass."""
    encoded = {name: [tokenizer.bos_id, *tokenizer.encode(text)] for name, text in texts.items()}
    work = [(name, *window) for name, ids in encoded.items() for window in windows(len(ids), context)]
    work.sort(key=lambda w: w[1] - w[2])  # longest first, so that a batch pads little
    bits = dict.fromkeys(texts, 0.0)
    with Progress(sum(stop - start for _, start, stop, _ in work), f"context {context}", "tokens") as progress:
        while work:
            rows = max(1, at_once // (work[0][2] - work[0][1]))
            batch, work = work[:rows], work[rows:]
            lengths = [stop - start for _, start, stop, _ in batch]
            ids = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
            for row, (name, start, stop, _) in enumerate(batch):
                ids[row, : stop - start] = torch.tensor(encoded[name][start:stop])
            ids = ids.to(model.device)
            logits = model(ids, lengths=lengths)
            for row, (name, start, stop, first) in enumerate(batch):
                skip = first - start
                odds = torch.log_softmax(logits[row, skip - 1 : stop - start - 1], -1)
                chosen = odds.gather(1, ids[row, skip : stop - start, None]).double()
                bits[name] -= float(chosen.sum()) / math.log(2)
            progress.update(sum(lengths))
    return bits


def table(sizes: dict[str, int], bits: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Per coder: total bits / total bytes, the mean over files of bits per byte, and that mean's standard error."""
    rows = {}
    for coder, found in bits.items():
        each = [found[name] / size for name, size in sizes.items()]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        total = sum(found.values()) / sum(sizes.values())
        rows[coder] = {"total": total, "mean": statistics.mean(each), "standard_error": error}
    return rows


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """The table, best below, with the saving against xz."""
    lines = ["| coder | bits per byte, all files | mean per file | below xz |", "|---|---|---|---|"]
    for coder, row in rows.items():
        saving = 1 - row["total"] / rows["xz -9e"]["total"]
        mean = f"{row['mean']:.4f} +- {row['standard_error']:.4f}"
        lines.append(f"| {coder} | {row['total']:.4f} | {mean} | {100 * saving:.1f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--corpus", type=Path, help="a corpus folder with heldout.txt; default: this machine's library")
    parser.add_argument("--context", type=int, nargs="*", help="window lengths in tokens (default: the model's)")
    parser.add_argument("--files", type=int, help="only the first N files (a trial)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per forward pass")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for bits_per_byte.json and bits_per_byte.md")
    options = parser.parse_args()
    if options.corpus:
        texts = heldout_texts(options.corpus)
    else:
        texts = {name: data.decode() for name, data in heldout_files(candidates()).items()}
    texts = dict(list(texts.items())[: options.files])
    data = {name: text.encode() for name, text in texts.items()}
    sizes = {name: len(file) for name, file in data.items()}
    extreme = 9 | lzma.PRESET_EXTREME
    bits = {
        "gzip -9": {name: 8.0 * len(gzip.compress(file, 9)) for name, file in data.items()},
        "xz -9e": {name: 8.0 * len(lzma.compress(file, preset=extreme)) for name, file in data.items()},
    }
    model = dsv4.load(options.model, dtype="auto", device=options.device)
    tokenizer = dsv4.load_tokenizer(options.model)
    started = time.time()
    for context in options.context or [model.config.max_position_embeddings]:
        if not 2 <= context <= model.config.max_position_embeddings:
            raise ValueError(f"context {context} is outside 2..{model.config.max_position_embeddings}")
        name = f"{options.model.name}, context {context}"
        bits[name] = model_bits(model, tokenizer, texts, context, options.tokens)
    rows = table(sizes, bits)
    report = {
        "model": options.model.name,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "tokens": sum(len(tokenizer.encode(text)) for text in texts.values()),
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "seconds": round(time.time() - started, 1),
        "coders": rows,
        "per_file": {
            name: {"bytes": size} | {c: found[name] / size for c, found in bits.items()} for name, size in sizes.items()
        },
    }
    text = f"{len(sizes)} held-out files, {sum(sizes.values()):,} bytes; each file by itself\n\n{markdown(rows)}"
    print(text)
    if options.out:
        atomic_write(options.out / "bits_per_byte.json", json.dumps(report, indent=1) + "\n")
        atomic_write(options.out / "bits_per_byte.md", text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
