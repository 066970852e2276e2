"""Packing: documents of several sources into rows of fixed length, best fit, samples isolated by id.

Everything is a pure function of (seed, step): no cursor is stored, so a resumed run sees exactly the batches that an
uninterrupted one would. The plan of an epoch (which pieces share a row) is rebuilt from the seed in a second or so.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from dsv4.data.documents import Documents


class Packing:
    """Batches of packed rows.

    sources     (documents, repeats): in each epoch every document appears floor(repeats) times, and once more with the
                probability of the remainder. Weights of a mixture are its repeats.
    length      tokens per row (T); rows: rows per batch (B)
    fim         special ids {"begin", "hole", "end"} and a rate: that part of the pieces is rearranged as
                begin prefix hole suffix end middle (PSM, V3). Pieces rather than documents, so that a piece keeps its
                middle in view.

    A document longer than a row is cut into rows (unless its source is `whole`: then it is left out and counted in
    `left_out`). The last piece and short documents are packed best-fit decreasing, which leaves almost no padding.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Documents, float]],
        length: int,
        rows: int,
        seed: int = 0,
        pad_id: int = 2,
        fim: Mapping[str, int] | None = None,
        fim_rate: float = 0.0,
    ) -> None:
        if fim_rate and (fim is None or set(fim) != {"begin", "hole", "end"}):
            raise ValueError(f"fim_rate {fim_rate} needs the ids of begin, hole and end, got {fim}")
        if length < 8 or rows < 1:
            raise ValueError(f"length {length} (at least 8) or rows {rows} (at least 1) is too small")
        self.sources, self.length, self.rows, self.seed, self.pad_id = list(sources), length, rows, seed, pad_id
        self.fim, self.fim_rate = fim, fim_rate
        self.left_out = sum(int((np.diff(d.offsets) > length).sum()) for d, _ in sources if d.whole)
        self._ends: list[int] = []  # rows in epochs 0..e
        self._epoch = lru_cache(maxsize=2)(self._plan)
        if not self._epoch(0):
            raise ValueError(f"nothing to pack: (documents, repeats) {[(len(d), r) for d, r in sources]}")

    def _pieces(self, epoch: int) -> np.ndarray:
        """int64 [P, 4]: source, start, stop (in its token stream), 1 if rearranged for fill-in-the-middle."""
        found = []
        for number, (documents, repeats) in enumerate(self.sources):
            rng = np.random.default_rng([self.seed, epoch, number, 1])
            sizes = np.diff(documents.offsets)
            times = int(repeats) + (rng.random(len(sizes)) < repeats % 1)
            for document in np.repeat(np.arange(len(sizes)), times).tolist():
                start, stop = int(documents.offsets[document]), int(documents.offsets[document + 1])
                if documents.whole:
                    if stop - start <= self.length:
                        found.append((number, start, stop, 0))
                    continue
                while stop - start > 1:  # a lone token has nothing to predict
                    middle = int(self.fim_rate > 0 and rng.random() < self.fim_rate and stop - start > 16)
                    cut = min(stop, start + self.length - 3 * middle)
                    found.append((number, start, cut, middle))
                    start = cut
        return np.array(found, np.int64).reshape(-1, 4)

    def _plan(self, epoch: int) -> list[list[np.ndarray]]:
        """Rows of an epoch, in their final order; a row is a list of pieces."""
        pieces = self._pieces(epoch)
        rng = np.random.default_rng([self.seed, epoch, 2])
        pieces = pieces[rng.permutation(len(pieces))]
        sizes = pieces[:, 2] - pieces[:, 1] + 3 * pieces[:, 3]
        open_rows: list[list[int]] = [[] for _ in range(self.length + 1)]  # by free space
        free: list[int] = []  # the sizes of free space that some row has, sorted
        plan: list[list[np.ndarray]] = []
        for index in np.argsort(-sizes, kind="stable").tolist():
            size = int(sizes[index])
            at = bisect.bisect_left(free, size)
            if at < len(free):
                space = free[at]
                row = open_rows[space].pop()
                if not open_rows[space]:
                    del free[at]
            else:
                space, row = self.length, len(plan)
                plan.append([])
            plan[row].append(pieces[index])
            left = space - size
            if left >= 2:
                if not open_rows[left]:
                    bisect.insort(free, left)
                open_rows[left].append(row)
        return [plan[i] for i in rng.permutation(len(plan))]

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows that one pass over the sources fills."""
        return len(self._epoch(epoch))

    def epoch_of(self, step: int) -> float:
        """How many passes over the sources have been seen before `step`."""
        epoch, row = self._locate(step * self.rows)
        return epoch + row / len(self._epoch(epoch))

    def _locate(self, row: int) -> tuple[int, int]:
        while not self._ends or row >= self._ends[-1]:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._epoch(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, row)
        return epoch, row - (self._ends[epoch - 1] if epoch else 0)

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        epoch, index = self._locate(row)
        ids = np.full(self.length, self.pad_id, np.int64)
        documents = np.zeros(self.length, np.int64)
        mask = np.zeros(self.length, bool)
        at = 0
        for sample, (number, start, stop, middle) in enumerate(self._epoch(epoch)[index]):
            source = self.sources[number][0]
            piece = source.tokens[start:stop].astype(np.int64)
            learn = np.ones(len(piece), bool) if source.mask is None else source.mask[start:stop].copy()
            if middle:
                piece = self._rearrange(piece, np.random.default_rng([self.seed, epoch, number, start, 3]))
                learn = np.ones(len(piece), bool)
            learn[0] = False  # nothing precedes it
            end = at + len(piece)
            ids[at:end], documents[at:end], mask[at:end] = piece, sample, learn
            at = end
        documents[at:] = documents[at - 1] + 1  # padding is a sample of its own
        return ids, documents, mask

    def _rearrange(self, piece: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        assert self.fim is not None
        a, b = np.sort(rng.integers(1, len(piece), 2))  # a BOS stays in front
        begin, hole, end = ([self.fim[name]] for name in ("begin", "hole", "end"))
        return np.concatenate([piece[:1], begin, piece[1:a], hole, piece[b:], end, piece[a:b]])

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int64 [B, T], documents int64 [B, T], loss_mask bool [B, T]) of a step.

        documents counts the samples of a row from 0, padding last. loss_mask[b, t] says that ids[b, t] is to be learned
        as the successor of ids[b, t - 1]; it is False on the first token of a sample, on padding, and on prompts.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        rows = [self._row(step * self.rows + r) for r in range(self.rows)]
        ids, documents, mask = (np.stack(column) for column in zip(*rows, strict=True))
        return ids, documents, mask

    def batches(self, step: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Batches from `step` on, without end."""
        while True:
            yield self.batch(step)
            step += 1
