"""The feed of a run: its tokenizer, and every step's batch as a pure function of (recipe, step)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dsv4.common.console import Progress
from dsv4.data import Documents, Packing, build_corpus, encode_corpus, heldout_texts, load_documents
from dsv4.data.documents import corpus_tokenizer
from dsv4.data.tasks import sft_samples
from dsv4.text import Tokenizer, load_tokenizer
from dsv4.training.losses import Batch
from dsv4.training.recipe import Recipe

Sample = tuple[list[int], list[int]]
PROBE = 500
"""Samples that are made in any case, to recognise the kept ones by: 0.4 s."""

FIM = {"begin": "<｜fim▁begin｜>", "hole": "<｜fim▁hole｜>", "end": "<｜fim▁end｜>"}


def prepare_corpus(recipe: Recipe) -> Path:
    """The encoded corpus folder of the recipe; builds text, tokenizer and tokens that are not there yet. A run that
    starts from a model encodes with that model's tokenizer, in a folder of its own."""
    root, start = Path(recipe.data.corpus), recipe.model.start
    text = root / "text"
    if not (text / "manifest.json").is_file():
        build_corpus(text, recipe.data.max_bytes)
    vocabulary = recipe.model.config().vocab_size
    tokens = root / ("tokens" if vocabulary == 4096 else f"tokens-{vocabulary}")
    if start:
        tokenizer = load_tokenizer(start)
        if (tokens / "meta.json").is_file() and _same(tokenizer, load_tokenizer(tokens)):
            return tokens
        tokens = root / f"tokens-{_digest(tokenizer)}"
    elif not (tokens / "meta.json").is_file():
        tokenizer = corpus_tokenizer(text, vocabulary)
    if not (tokens / "meta.json").is_file():
        encode_corpus(text, tokenizer, tokens)
    return tokens


def prepare_tasks(recipe: Recipe, tokens: Path, tokenizer: Tokenizer) -> Documents:
    """The recipe's procedural samples, kept in a folder beside the encoded corpus `tokens`: making them again takes
    minutes. The folder's name covers seed, number, tokenizer and the first samples as they are rendered, so that what
    another generator or codec made is never mistaken for these."""
    seed, count = recipe.seed, recipe.data.samples
    first = hashlib.sha256(f"{seed} {count} {_digest(tokenizer)}".encode())
    for ids, mask in sft_samples(seed, min(count, PROBE), tokenizer):
        first.update(json.dumps([ids, mask]).encode())
    folder = tokens.parent / f"tasks-{first.hexdigest()[:12]}"
    if not (folder / "meta.json").is_file():
        Documents.from_samples(_counted(sft_samples(seed, count, tokenizer), count)).save(folder, seed=seed)
    return Documents.load(folder)


def _counted(samples: Iterable[Sample], count: int) -> Iterator[Sample]:
    with Progress(count, "tasks", "samples") as progress:
        for sample in samples:
            yield sample
            progress.update()


def _digest(tokenizer: Tokenizer) -> str:
    spelled = b"\0".join(tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
    return hashlib.sha256(spelled).hexdigest()[:12]


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    return _digest(one) == _digest(other)


class Feed:
    """Batches of a recipe. A length stage has its own packing, drawn with its own seed and begun at its first row."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokens = prepare_corpus(recipe)
        self.tokenizer = load_tokenizer(recipe.model.start or self.tokens)
        vocabulary = recipe.model.config().vocab_size
        if self.tokenizer.vocab_size > vocabulary:
            raise ValueError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model only {vocabulary}")
        data = recipe.data
        filled = json.loads((self.tokens / "meta.json").read_text())["sources"]
        if unknown := data.repeats.keys() - filled.keys():
            raise ValueError(f"data.repeats names {', '.join(sorted(unknown))}; the corpus has {', '.join(filled)}")
        wanted = {name: repeats for name, repeats in data.repeats.items() if repeats > 0}
        wanted = {name: repeats for name, repeats in wanted.items() if filled[name]["tokens"]}  # no man pages here?
        texts = [(load_documents(self.tokens, name), repeats) for name, repeats in wanted.items()]
        self.sources: list[tuple[Documents, float]] = texts
        if data.kind == "tasks":
            tasks = prepare_tasks(recipe, self.tokens, self.tokenizer)
            text_tokens = sum(len(d.tokens) * repeats for d, repeats in texts)
            share = data.replay * len(tasks.tokens) / max(text_tokens, 1)
            self.sources = [(tasks, 1.0), *((d, repeats * share) for d, repeats in texts if share > 0)]
        self._packings: dict[int, Packing] = {}

    def _packing(self, start: int, length: int) -> Packing:
        if start not in self._packings:
            recipe, special = self.recipe, self.tokenizer.special
            rows, passes = recipe.batch.rows(length)
            self._packings[start] = Packing(
                self.sources, length, rows * passes, seed=recipe.seed + start,
                fim={part: special[token] for part, token in FIM.items()}, fim_rate=recipe.data.fim_rate,
            )  # fmt: skip
        return self._packings[start]

    def epoch(self, step: int) -> float:
        """Passes over the sources made in the length stage of `step`."""
        start, length = self.recipe.schedule.stage(step)
        return self._packing(start, length).epoch_of(step - start)

    def batches(self, step: int) -> list[Batch]:
        """The forward passes of a step. Weights sum to 1 over the whole step: every learned token counts alike."""
        start, length = self.recipe.schedule.stage(step)
        arrays = self._packing(start, length).batch(step - start)
        ids, documents, mask = (torch.from_numpy(array) for array in arrays)
        weights = mask.float() / mask.sum().clamp_min(1)
        rows, _ = self.recipe.batch.rows(length)
        return [Batch(*parts) for parts in zip(ids.split(rows), documents.split(rows), weights.split(rows))]

    def heldout(self) -> list[tuple[list[int], int]]:
        """(token ids from BOS, bytes of text) of the beginnings of held-out files, always the same ones."""
        settings, found = self.recipe.evaluate, []
        texts = heldout_texts(self.tokens.parent / "text")
        for text in list(texts.values())[: settings.files]:
            part = text.encode()[: settings.bytes].decode("utf-8", "ignore")
            found.append(([self.tokenizer.bos_id, *self.tokenizer.encode(part)], len(part.encode())))
        return found

    def facts(self) -> dict[str, Any]:
        """What identifies the data: the sha256 of the corpus manifest, and tokens per source."""
        manifest = (self.tokens.parent / "text" / "manifest.json").read_bytes()
        tokens = [len(documents.tokens) for documents, _ in self.sources]
        return {"manifest_sha256": hashlib.sha256(manifest).hexdigest(), "source_tokens": tokens}
