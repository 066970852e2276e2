"""Packing: every token once, samples kept apart, and batches that depend on seed and step alone."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4.data import Documents, Packing


def _documents(sizes: list[int], base: int = 100) -> Documents:
    """Documents whose tokens are all different, so that each can be found again."""
    offsets = np.cumsum([0, *sizes])
    return Documents(np.arange(base, base + offsets[-1], dtype=np.int32), offsets)


SIZES = [5, 40, 3, 17, 64, 130, 2, 9, 33, 21, 200, 12] * 4


def _samples(packing: Packing, steps: int) -> list[tuple[list[int], list[bool]]]:
    found = []
    for step in range(steps):
        for ids, documents, mask in zip(*packing.batch(step)):
            for sample in range(documents.max() + 1):
                chosen = documents == sample
                found.append((ids[chosen].tolist(), mask[chosen].tolist()))
    return found


def test_an_epoch_holds_every_token_once() -> None:
    documents = _documents(SIZES)
    packing = Packing([(documents, 1.0)], 64, 1, seed=3)
    samples = _samples(packing, packing.rows_in_epoch(0))
    tokens = sorted(t for ids, _ in samples for t in ids if t != 2)
    lone = {int(o) - 1 + 100 for o, n in zip(documents.offsets[1:], SIZES) if n % 64 == 1}
    assert tokens == [t for t in documents.tokens.tolist() if t not in lone]
    best = -(-sum(SIZES) // 64)
    assert packing.rows_in_epoch(0) <= best + 1, "best fit leaves almost no padding"


def test_samples_are_pieces_of_one_document() -> None:
    documents = _documents(SIZES)
    for ids, mask in _samples(Packing([(documents, 1.0)], 64, 4, seed=1), 8):
        if ids[0] == 2:
            assert set(ids) == {2} and not any(mask), "padding is never learned"
            continue
        assert ids == list(range(ids[0], ids[0] + len(ids))), "a sample is contiguous in its source"
        first, last = (np.searchsorted(documents.offsets, t - 100, "right") for t in (ids[0], ids[-1]))
        assert first == last, "a sample never spans two documents"
        assert mask == [False] + [True] * (len(ids) - 1)


def test_documents_are_numbered_in_order_and_contiguous() -> None:
    ids, documents, mask = Packing([(_documents(SIZES), 1.0)], 64, 8).batch(0)
    assert ids.shape == documents.shape == mask.shape == (8, 64)
    assert ids.dtype == documents.dtype == np.int64 and mask.dtype == bool
    assert (np.diff(documents, axis=1) >= 0).all() and (np.diff(documents, axis=1) <= 1).all()
    assert (documents[:, 0] == 0).all()


def test_batch_is_a_pure_function_of_seed_and_step() -> None:
    sources = [(_documents(SIZES), 1.5), (_documents([50] * 9, 10_000), 0.5)]
    straight = Packing(sources, 32, 3, seed=7, fim={"begin": 3, "hole": 4, "end": 5}, fim_rate=0.3)
    batches = [straight.batch(step) for step in range(130)]
    assert straight.epoch_of(130) > 2
    for step in (129, 0, 61, 7, 128):
        fresh = Packing(sources, 32, 3, seed=7, fim={"begin": 3, "hole": 4, "end": 5}, fim_rate=0.3)
        for one, other in zip(batches[step], fresh.batch(step)):
            assert (one == other).all()
    other = Packing(sources, 32, 3, seed=8).batch(0)[0]
    assert (batches[0][0] != other).any()
    assert [(b[0] == c[0]).all() for b, c in zip(straight.batches(5), batches[5:8])] == [True] * 3


def test_epochs_are_shuffled_differently() -> None:
    packing = Packing([(_documents(SIZES), 1.0)], 64, 1)
    rows = packing.rows_in_epoch(0)
    first, second = ([packing.batch(e * rows + r)[0].tolist() for r in range(rows)] for e in (0, 1))
    assert first != second and packing.epoch_of(rows) == 1.0


def test_repeats_weigh_the_sources() -> None:
    packing = Packing([(_documents([20] * 400), 2.0), (_documents([20] * 400, 50_000), 0.25)], 64, 1)
    firsts = [ids[0] for ids, _ in _samples(packing, packing.rows_in_epoch(0)) if ids[0] != 2]
    assert sum(t < 50_000 for t in firsts) == 800
    assert 70 <= sum(t >= 50_000 for t in firsts) <= 130


def test_samples_with_a_mask_are_never_cut() -> None:
    sizes = {100: 10, 200: 30, 300: 65, 400: 64}
    pairs = [(list(range(n, n + size)), [0] * (size - 2) + [1] * 2) for n, size in sizes.items()]
    packing = Packing([(Documents.from_samples(pairs), 1.0)], 64, 1)
    assert packing.left_out == 1
    seen = [s for s in _samples(packing, packing.rows_in_epoch(0)) if s[0][0] != 2]
    assert sorted(seen) == [(ids, [bool(m) for m in mask]) for ids, mask in pairs if len(ids) <= 64]


def test_the_first_token_of_a_sample_is_never_learned() -> None:
    packing = Packing([(Documents.from_samples([([7, 8, 9], [1, 1, 1])]), 1.0)], 8, 1)
    assert packing.batch(0)[2].tolist() == [[False, True, True] + [False] * 5]


def test_fill_in_the_middle_rearranges_and_loses_nothing() -> None:
    fim = {"begin": 3, "hole": 4, "end": 5}
    packing = Packing([(_documents([60] * 50), 1.0)], 64, 1, fim=fim, fim_rate=0.4)
    rearranged, cuts = 0, set()
    for ids, mask in _samples(packing, packing.rows_in_epoch(0)):
        if ids[0] == 2:
            continue
        if 3 in ids:
            rearranged += 1
            hole, end = ids.index(4), ids.index(5)
            cuts.add((hole, end))
            assert ids[1] == 3 and ids.count(4) == ids.count(5) == 1
            prefix, suffix, middle = ids[:1] + ids[2:hole], ids[hole + 1 : end], ids[end + 1 :]
            ids = prefix + middle + suffix
        assert ids == list(range(ids[0], ids[0] + 60)) and sum(mask) == len(mask) - 1
    assert 10 <= rearranged <= 30 and len(cuts) > rearranged // 2, "every piece is cut in places of its own"


def test_bad_settings_are_refused() -> None:
    documents = _documents([20])
    with pytest.raises(ValueError, match="begin, hole and end"):
        Packing([(documents, 1.0)], 64, 1, fim_rate=0.1)
    with pytest.raises(ValueError, match="length 4"):
        Packing([(documents, 1.0)], 4, 1)
    with pytest.raises(ValueError, match="nothing to pack"):
        Packing([(documents, 0.0)], 64, 1)
    with pytest.raises(ValueError, match="negative"):
        Packing([(documents, 1.0)], 64, 1).batch(-1)
    with pytest.raises(ValueError, match="sample 0 has 2 ids but 1"):
        Documents.from_samples([([1, 2], [1])])
