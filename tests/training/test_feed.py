"""The kept samples of a fine-tuning: the batches are those of fresh ones, and never those of something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4.data import Documents
from dsv4.data.tasks import sft_samples
from dsv4.training import feed as module
from dsv4.training.feed import Feed
from dsv4.training.losses import Batch
from dsv4.training.recipe import Recipe

Make = Callable[..., Recipe]
TASKS = ("data.kind='tasks'", "data.replay=0.3", "batch.micro_tokens=512", "schedule.lengths=[[0, 256]]")


@pytest.fixture
def tasks(recipe: Make, corpus: Path, tmp_path: Path) -> Make:
    """The small recipe over tasks, with a corpus folder of its own; more samples than are compared."""
    Feed(recipe())  # the shared corpus is encoded once
    shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("tasks-*"))
    own = f"data.corpus='{tmp_path / 'corpus'}'"
    return lambda *overrides: recipe(*TASKS, own, f"data.samples={module.PROBE + 40}", *overrides)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "corpus").glob("tasks-*"))


def batches(feed: Feed) -> list[Batch]:
    return [batch for step in range(4) for batch in feed.batches(step)]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(torch.equal(vars(a)[name], vars(b)[name]) for a, b in zip(one, other) for name in vars(a))


def counted(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Any], Any] = lambda _, sample: sample) -> list[int]:
    """Has the feed make samples through `change` (number, sample); the list grows by one for every sample made."""
    made: list[int] = []

    def samples(seed: int, count: int, tokenizer: Any) -> Iterator[Any]:
        for number, sample in enumerate(sft_samples(seed, count, tokenizer)):
            made.append(number)
            yield change(number, sample)

    monkeypatch.setattr(module, "sft_samples", samples)
    return made


def test_kept_samples_give_the_batches_of_fresh_ones(
    tasks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, settings = counted(monkeypatch), tasks()
    first, again = Feed(settings), Feed(settings)
    assert len(made) == 3 * module.PROBE + 40, "the second feed made the first samples only"
    (folder,) = kept(tmp_path)
    fresh = Feed(settings)
    fresh.sources[0] = (Documents.from_samples(sft_samples(settings.seed, settings.data.samples, fresh.tokenizer)), 1.0)
    assert same(batches(first), batches(fresh)) and same(batches(again), batches(fresh))
    assert isinstance(again.sources[0][0].tokens, np.memmap)
    assert json.loads((folder / "meta.json").read_text())["documents"] == settings.data.samples


def test_other_samples_are_made_anew(tasks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = batches(Feed(tasks()))
    for number, other in enumerate(("seed=7", f"data.samples={module.PROBE + 41}"), 2):
        Feed(tasks(other))
        assert len(kept(tmp_path)) == number

    def last_learned(number: int, sample: Any) -> Any:
        ids, mask = sample
        return (ids, [0] * len(mask)) if number == module.PROBE - 1 else sample

    counted(monkeypatch, last_learned)
    assert len(kept(tmp_path)) == 3
    changed = Feed(tasks())
    assert len(kept(tmp_path)) == 4, "a generator that differs in the mask of one of the first samples"
    documents = changed.sources[0][0]
    assert documents.mask is not None and not documents.mask[slice(*documents.offsets[module.PROBE - 1 :][:2])].any()
    monkeypatch.undo()
    assert same(batches(Feed(tasks())), before)


def test_a_half_written_folder_is_not_used(tasks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(number: int, sample: Any) -> Any:
        if number > module.PROBE:
            raise KeyboardInterrupt
        return sample

    with monkeypatch.context() as patched:
        counted(patched, breaks)
        with pytest.raises(KeyboardInterrupt):
            Feed(tasks())
    assert not kept(tmp_path)
    before = batches(Feed(tasks()))
    (folder,) = kept(tmp_path)
    (folder / "meta.json").unlink()  # as a copy by hand leaves it when it is broken off
    np.save(folder / "tokens.npy", np.zeros(3, np.uint16))
    assert same(batches(Feed(tasks())), before)
    np.save(folder / "mask.npy", np.zeros(3, bool))
    with pytest.raises(ValueError, match="remove the folder"):
        Feed(tasks())


def test_wide_ids_and_documents_without_a_mask_come_back(tmp_path: Path) -> None:
    wide = Documents(np.array([1, 70_000, 3], np.int32), np.array([0, 2, 3]))
    wide.save(tmp_path / "wide")
    back = Documents.load(tmp_path / "wide")
    assert back.tokens.tolist() == [1, 70_000, 3] and back.offsets.tolist() == [0, 2, 3]
    assert back.mask is None and not back.whole
    pairs = [([5, 65_535], [0, 1]), ([9], [1])]
    Documents.from_samples(pairs).save(tmp_path / "narrow")
    back = Documents.load(tmp_path / "narrow")
    assert back.whole and back.mask is not None and back.tokens.dtype == np.uint16
    assert (back.tokens.tolist(), back.mask.tolist()) == ([5, 65_535, 9], [False, True, True])
    assert list(islice(back.offsets, 3)) == [0, 2, 3]
