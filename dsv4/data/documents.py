"""Token streams on disk: all documents of a source back to back, and where each begins."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.common.console import Progress
from dsv4.common.files import atomic_folder, atomic_write
from dsv4.data.corpus import SHARES, load_manifest, texts
from dsv4.text import Tokenizer, train_tokenizer


@dataclass(frozen=True)
class Documents:
    """tokens [N] (uint16 or wider) of D documents; offsets int64 [D + 1]; mask bool [N], True on tokens to be learned
    (None: all). whole: never cut a document; those longer than a sequence are left out by the packing."""

    tokens: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray | None = None
    whole: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Documents:
        """From (ids, mask) pairs, as `dsv4.text.render_training` gives them. Samples are never cut."""
        pairs = list(samples)
        for number, (ids, mask) in enumerate(pairs):
            if len(ids) != len(mask):
                raise ValueError(f"sample {number} has {len(ids)} ids but {len(mask)} mask entries")
        offsets = np.cumsum([0, *(len(ids) for ids, _ in pairs)], dtype=np.int64)
        tokens = np.fromiter((i for ids, _ in pairs for i in ids), np.int32, offsets[-1])
        learn = np.fromiter((bool(m) for _, mask in pairs for m in mask), bool, offsets[-1])
        return cls(tokens, offsets, learn, whole=True)

    def save(self, folder: Path, **facts: Any) -> None:
        """Keeps the documents as a folder of arrays, and meta.json: their number, and `facts`. Complete or absent."""
        narrow = not len(self.tokens) or int(self.tokens.max()) < 1 << 16
        arrays = {"tokens": self.tokens.astype(np.uint16) if narrow else self.tokens, "offsets": self.offsets}
        arrays |= {} if self.mask is None else {"mask": self.mask}
        meta = {"documents": len(self), "tokens": len(self.tokens), "whole": self.whole, **facts}
        with atomic_folder(folder) as fresh:
            for name, array in arrays.items():
                np.save(fresh / f"{name}.npy", array)
            atomic_write(fresh / "meta.json", json.dumps(meta, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Documents:
        """What `save` kept, memory-mapped. Raises ValueError when the arrays do not belong together."""
        whole = json.loads((folder / "meta.json").read_text())["whole"]
        tokens, offsets = np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "offsets.npy")
        mask = np.load(folder / "mask.npy", mmap_mode="r") if (folder / "mask.npy").is_file() else None
        if len(tokens) != offsets[-1] or (mask is not None and len(mask) != len(tokens)):
            raise ValueError(f"{folder} holds {len(tokens)} tokens, its offsets say {offsets[-1]}; remove the folder")
        return cls(tokens, offsets, mask, whole)


def corpus_tokenizer(corpus: Path, vocab_size: int, sample_bytes: int = 24_000_000) -> Tokenizer:
    """A byte-level BPE with digits one by one, learned from documents spread evenly over the training text."""
    total = sum(load_manifest(corpus)["train_bytes"].values())
    every = max(1, total // sample_bytes)
    sample = (text for source in SHARES for text in islice((t for _, t in texts(corpus, source)), 0, None, every))
    return train_tokenizer(sample, vocab_size, digits="single")


def _splittable(tokenizer: Tokenizer) -> dict[int, tuple[int, int]]:
    """Tokens of punctuation with line ends, as (punctuation, line ends), where both are single tokens."""
    table = {}
    for token in range(tokenizer.vocab_size):
        match = re.fullmatch(rb"( ?[!-/:-@\[-`{-~]+)([\r\n]+)", tokenizer.token_bytes(token, skip_special=True))
        halves = [tokenizer.encode(part.decode()) for part in match.groups()] if match else []
        if len(halves) == 2 and all(len(half) == 1 for half in halves):
            table[token] = (halves[0][0], halves[1][0])
    return table


def _split(ids: np.ndarray, table: dict[int, tuple[int, int]], rate: float, rng: np.random.Generator) -> np.ndarray:
    """Breaks a random part of the merged tokens in two, so that prompts that end inside one are no surprise."""
    chosen = np.flatnonzero(np.isin(ids, list(table)) & (rng.random(len(ids)) < rate))
    left, right = (np.array([table[int(t)][side] for t in ids[chosen]], ids.dtype) for side in (0, 1))
    ids = ids.copy()
    ids[chosen] = left
    return np.insert(ids, chosen + 1, right)


def encode_corpus(
    corpus: Path, tokenizer: Tokenizer, out: Path, split_rate: float = 0.02, seed: int = 0
) -> dict[str, Any]:
    """Encodes every training document as BOS + text + EOS into `out`: SOURCE.bin (uint16), SOURCE.offsets.npy (int64),
    the tokenizer, and meta.json (returned): tokens and bytes per source, sha256 of the manifest.

    split_rate: fraction of merged punctuation-and-newline tokens that are broken in two (spec: V3's token splitting;
    the fraction is undisclosed, this one is ours). Held-out documents are not encoded.
    """
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"a vocabulary of {tokenizer.vocab_size} does not fit uint16 (at most {1 << 16})")
    manifest = load_manifest(corpus)
    table, started = _splittable(tokenizer), time.monotonic()
    sources: dict[str, dict[str, int]] = {}
    with (
        atomic_folder(out) as folder,
        Progress(sum(manifest["train_bytes"].values()), "encode", "bytes") as progress,
    ):
        for source in SHARES:
            rng = np.random.default_rng([seed, list(SHARES).index(source)])
            offsets, total_bytes = [0], 0
            with open(folder / f"{source}.bin", "wb") as stream:
                for batch in _batches((text for _, text in texts(corpus, source)), 256):
                    for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                        row = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.uint16)
                        row = _split(row, table, split_rate, rng) if split_rate and table else row
                        row.tofile(stream)
                        offsets.append(offsets[-1] + len(row))
                        total_bytes += len(text.encode())
                    progress.update(sum(len(t.encode()) for t in batch), tokens=offsets[-1])
            np.save(folder / f"{source}.offsets.npy", np.array(offsets, np.int64))
            sources[source] = {"documents": len(offsets) - 1, "tokens": offsets[-1], "bytes": total_bytes}
        tokenizer.save(folder)
        meta = {
            "manifest_sha256": hashlib.sha256((Path(corpus) / "manifest.json").read_bytes()).hexdigest(),
            "vocab_size": tokenizer.vocab_size,
            "split_rate": split_rate,
            "tokens": sum(s["tokens"] for s in sources.values()),
            "bytes": sum(s["bytes"] for s in sources.values()),
            "sources": sources,
            "seconds": round(time.monotonic() - started, 1),
        }
        atomic_write(folder / "meta.json", json.dumps(meta, indent=1))
    return meta


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def load_documents(folder: Path, source: str) -> Documents:
    """The encoded documents of one source, memory-mapped."""
    tokens_path, offsets_path = Path(folder) / f"{source}.bin", Path(folder) / f"{source}.offsets.npy"
    if not tokens_path.is_file() or not offsets_path.is_file():
        known = sorted(p.stem for p in Path(folder).glob("*.bin"))
        raise ValueError(f"no encoded source {source!r} in {folder}; it has {known or 'nothing'}")
    offsets = np.load(offsets_path)
    if tokens_path.stat().st_size != 2 * offsets[-1]:
        raise ValueError(f"{tokens_path} holds {tokens_path.stat().st_size // 2} tokens, its offsets say {offsets[-1]}")
    return Documents(np.memmap(tokens_path, np.uint16, "r"), offsets)
