"""What one forward pass knows about its tokens before it touches them: where each stands in its own sequence,
how far back its window reaches, which compressed entries it completes and which it may see.

Positions, windows, compression and visibility all follow a token's own sequence: rows of a ragged batch start at
their own position 0, and packed samples never see each other. B rows, T tokens, E compressed entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsv4.config import Config


@dataclass
class Entries:
    """The compressed entries of one ratio. New ones are named by the token that completes them."""

    last: Tensor  # int64 [B, n] index of the completing token in this call's tokens; rows with fewer are padded
    real: Tensor  # bool [B, n]
    slot: Tensor  # int64 [B, n] where the entry goes in its source's history
    low: Tensor  # int64 [B, T] a query sees entries low <= e < high
    high: Tensor  # int64 [B, T]
    angles: Tensor  # complex64 [B, n, rope/2] at each new entry's first token
    count: int  # entries in the longest row's history after this call

    def visible(self) -> Tensor:
        """bool [B, T, count]."""
        e = torch.arange(self.count, device=self.low.device)
        return (e >= self.low[..., None]) & (e < self.high[..., None])


@dataclass
class Plan:
    """Shared by every layer of one forward pass."""

    window: int  # tokens, the same in every layer
    position: Tensor  # int64 [B, T] in the token's own sequence
    reach: Tensor  # int64 [B, T] previous tokens inside the window (at most window - 1)
    valid: Tensor | None  # bool [B, T]; None = every token is real
    before: Tensor  # int64 [B] tokens already in the state
    after: Tensor  # int64 [B] tokens in the state afterwards
    entries: dict[int, Entries]  # by compress_ratio
    angles: dict[str, Tensor]  # complex64 [B, T, rope/2] by rope kind

    @cached_property
    def span(self) -> tuple[Tensor, Tensor]:
        """The rows from <= r < to that each token's window reaches where ``window`` older rows stand before the new
        ones, int32 [B, T]."""
        reach = self.reach.int()
        last = self.window + torch.arange(reach.shape[1], dtype=torch.int32, device=reach.device)
        return last - reach, (last + 1).expand_as(reach)

    @cached_property
    def ring_span(self) -> tuple[Tensor, Tensor]:
        """The same in a ring that one decoded token has just entered."""
        reach = self.reach.int()
        return torch.zeros_like(reach), reach + 1

    @staticmethod
    def build(
        config: Config,
        shape: tuple[int, int],
        frequencies: dict[str, Tensor],
        before: Tensor,
        lengths: Tensor | None,
        documents: Tensor | None,
    ) -> Plan:
        """``before`` int64 [B]: state length; ``lengths`` int64 [B]: real tokens per row; ``documents`` int64 [B,
        T]."""
        tokens = shape[1]
        device = before.device
        if shape == (1, 1) and lengths is None and documents is None and device.type == "cpu":
            return _one(config, frequencies, before)
        index = torch.arange(tokens, device=device)
        valid = None
        if documents is not None:
            starts = torch.ones(shape, dtype=torch.bool, device=device)
            starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
            position = index - torch.where(starts, index, 0).cummax(1).values
        else:
            position = before[:, None] + index
        after = before + tokens
        if lengths is not None:
            valid = index < lengths[:, None]
            after = before + lengths
        reach = position.clamp(max=config.sliding_window - 1)
        entries = {
            ratio: _entries(ratio, position, valid, before, documents is not None, frequencies["compress"])
            for ratio in sorted(set(config.compress_ratios) - {0})
        }
        angles = {kind: _turn(position, f) for kind, f in frequencies.items()}
        return Plan(config.sliding_window, position, reach, valid, before, after, entries, angles)


def _one(config: Config, frequencies: dict[str, Tensor], before: Tensor) -> Plan:
    """`Plan.build` of one token of one sequence on a CPU: mostly Python's integers, fewer calls."""
    t, entries = int(before), {}
    for ratio in sorted(set(config.compress_ratios) - {0}):
        count, new = (t + 1) // ratio, int((t + 1) % ratio == 0)
        numbers = torch.tensor([[0, count, count - 1, t - ratio + 1]])
        low, high, slot, first = (numbers[:, i : i + 1] for i in range(4))
        angles = (
            _turn(first, frequencies["compress"])
            if new
            else first.new_empty(1, 0, *frequencies["compress"].shape, dtype=torch.complex64)
        )
        entries[ratio] = Entries(low[:, :new], low[:, :new] == 0, slot[:, :new], low, high, angles, count)
    position, reach = torch.tensor([[[t]], [[min(t, config.sliding_window - 1)]]])
    turns = {kind: _turn(position, f) for kind, f in frequencies.items()}
    return Plan(config.sliding_window, position, reach, None, before, before + 1, entries, turns)


def _turn(position: Tensor, frequency: Tensor) -> Tensor:
    angle = position[..., None].float() * frequency
    return torch.polar(torch.ones_like(angle), angle)


def _entries(
    ratio: int, position: Tensor, valid: Tensor | None, before: Tensor, packed: bool, frequency: Tensor
) -> Entries:
    """Visibility is exact: an entry is seen from the very token that completes it, e < (t + 1) // ratio."""
    done = (position + 1) % ratio == 0
    if valid is not None:
        done = done & valid
    rank = done.cumsum(1)
    new = int(rank[:, -1].max())
    old = before // ratio
    last = torch.zeros(position.shape[0], new + 1, dtype=torch.int64, device=position.device)
    index = torch.arange(position.shape[1], device=position.device).expand_as(position)
    last.scatter_(1, torch.where(done, rank - 1, new), index)  # the spare column swallows the others
    last = last[:, :new]
    real = torch.arange(new, device=position.device) < rank[:, -1:]
    slot = old[:, None] + torch.arange(new, device=position.device)
    high = old[:, None] + rank
    if packed:
        low = high - (position + 1) // ratio  # entries of earlier samples in this row
    else:
        low = torch.zeros_like(high)
    first = position.gather(1, last) - ratio + 1
    return Entries(last, real, slot, low, high, _turn(first, frequency), int((old + rank[:, -1]).max()))
