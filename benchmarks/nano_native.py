"""What the released formats cost: bits per byte of a model in float32, bf16 and, quantised to FP4 and FP8, `native`.

    python benchmarks/nano_native.py models/nano --corpus runs/corpus/text --files 8 --out docs/runs/nano

The folder is quantised by `dsv4 convert --to official --quantise` into a temporary one. "weights" is that one expanded
to float32: what rounding the weights costs; "native" adds the roundings of inputs and cache rows. The same files and
windows as nano_bits_per_byte.py, coded by every variant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from nano_bits_per_byte import model_bits

import dsv4
from dsv4.checkpoint.convert import convert
from dsv4.common.files import atomic_write
from dsv4.data.corpus import candidates, heldout_files, heldout_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an unquantised model folder")
    parser.add_argument("--corpus", type=Path, help="a corpus folder with heldout.txt; default: this machine's library")
    parser.add_argument("--files", type=int, help="only the first N files (a trial)")
    parser.add_argument("--context", type=int, default=2048, help="window length in tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per forward pass")
    parser.add_argument("--out", type=Path, help="folder for native_bits_per_byte.json")
    options = parser.parse_args()
    if options.corpus:
        texts = heldout_texts(options.corpus)
    else:
        texts = {name: data.decode() for name, data in heldout_files(candidates()).items()}
    texts = dict(list(texts.items())[: options.files])
    size = sum(len(text.encode()) for text in texts.values())
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "packed"
        convert(options.model, packed, "official", quantise=True)
        tokenizer = dsv4.load_tokenizer(options.model)
        rows = {}
        for name, folder, dtype in (
            ("float32", options.model, "float32"),
            ("bfloat16", options.model, "bfloat16"),
            ("weights", packed, "float32"),
            ("native", packed, "native"),
        ):
            bits = model_bits(dsv4.load(folder, dtype=dtype), tokenizer, texts, options.context, options.tokens)
            rows[name] = sum(bits.values()) / size
            print(f"{name:<10} {rows[name]:.4f} bits per byte, {100 * (rows[name] / rows['float32'] - 1):+.2f} %")
    report = {
        "model": options.model.name,
        "files": len(texts),
        "bytes": size,
        "context": options.context,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "bits_per_byte": rows,
    }
    if options.out:
        atomic_write(options.out / "native_bits_per_byte.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
