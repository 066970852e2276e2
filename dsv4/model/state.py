"""The memory of a batch of sequences between calls (report 3.5.1).

Two families. *History*: compressed entries and index keys, append-only. *Ring*: the last rows of something, fixed
size, slot = position mod size: the window's keys, and the projected tokens that no finished entry has used up.
Rows of a batch may have different lengths. Every tensor belongs to a source layer; layers hold a handle to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4.config import Config, Layer
from dsv4.model.plan import Entries, Plan


class Ring:
    """The last ``size`` rows of width ``dim`` of every sequence."""

    def __init__(self, batch: int, size: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(batch, size, dim, dtype=dtype, device=device)

    def ordered(self, before: Tensor) -> Tensor:
        """[B, size, dim] oldest first: row i is position before - size + i (garbage where that is negative)."""
        size = self.rows.shape[1]
        slots = (before[:, None] + torch.arange(size, device=before.device)) % size
        return _take(self.rows, slots)

    def write(self, new: Tensor, plan: Plan) -> None:
        """Stores new [B, T, dim], which stands at positions before..after."""
        size, tokens = self.rows.shape[1], new.shape[1]
        slots = torch.arange(size, device=new.device)
        newest = plan.after[:, None] - 1 - (plan.after[:, None] - 1 - slots) % size  # last position that owns each slot
        source = newest - plan.before[:, None]
        fresh = (source >= 0) & (plan.after > plan.before)[:, None]
        rows = _take(new, source.clamp(0, tokens - 1)).to(self.rows.dtype)
        self.rows = torch.where(fresh[..., None], rows, self.rows)

    def write_one(self, new: Tensor, plan: Plan) -> None:
        """`write` for one token per row, in place."""
        if len(new) == 1 and new.device.type == "cpu":
            self.rows[0, int(plan.before) % self.rows.shape[1]] = new[0, 0]
        else:
            slots = plan.before % self.rows.shape[1]
            self.rows[torch.arange(len(slots), device=slots.device), slots] = new[:, 0].to(self.rows.dtype)


class History:
    """Append-only rows; the buffer doubles when full."""

    def __init__(self, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(batch, 0, dim, dtype=dtype, device=device)

    def append(self, new: Tensor, entries: Entries) -> Tensor:
        """new [B, n, dim] at entries.slot -> all rows [B, entries.count, dim]."""
        batch, capacity, dim = self.rows.shape
        if entries.count > capacity:
            grown = self.rows.new_zeros(batch, max(entries.count, 2 * capacity, 16), dim)
            grown[:, :capacity] = self.rows
            self.rows = grown
        row, column = entries.real.nonzero(as_tuple=True)
        self.rows[row, entries.slot[row, column]] = new[row, column].to(self.rows.dtype)
        return self.rows[:, : entries.count]


@dataclass
class Compression:
    """What one compressor remembers: finished entries, and the inputs of unfinished ones (values and gates, ape
    added)."""

    history: History
    tail: Ring

    @staticmethod
    def empty(batch: int, layer: Layer, dim: int, dtype: torch.dtype, device: torch.device) -> Compression:
        halves = 2 if layer.overlap else 1
        tail = Ring(batch, halves * layer.compress_ratio, 2 * halves * dim, torch.float32, device)
        return Compression(History(batch, dim, dtype, device), tail)


@dataclass
class LayerState:
    """One layer's memory. Which parts exist follows from its `Layer` record."""

    window: Ring
    kv: Compression | None = None
    index: Compression | None = None

    def parts(self) -> list[Ring | History]:
        """Every holder of rows, in a fixed order."""
        found: list[Ring | History] = [self.window]
        for compression in (self.kv, self.index):
            if compression is not None:
                found += [compression.history, compression.tail]
        return found


@dataclass
class State:
    """The memory of ``batch`` sequences. ``length`` int64 [B]: tokens each has taken."""

    length: Tensor
    layers: list[LayerState] = field(default_factory=list)

    @staticmethod
    def empty(config: Config, layers: tuple[Layer, ...], batch: int, dtype: torch.dtype, device: torch.device) -> State:
        state = State(torch.zeros(batch, dtype=torch.int64, device=device))
        for layer in layers:
            part = LayerState(Ring(batch, layer.window, config.head_dim, dtype, device))
            if layer.compress_ratio:
                part.kv = Compression.empty(batch, layer, config.head_dim, dtype, device)
            if layer.indexer:
                part.index = Compression.empty(batch, layer, config.index_head_dim, dtype, device)
            state.layers.append(part)
        return state

    def _copy(self, change: Any) -> State:
        new = State(change(self.length))
        for layer in self.layers:
            copied = LayerState(_like(layer.window, change))
            for name in ("kv", "index"):
                part = getattr(layer, name)
                if part is not None:
                    setattr(copied, name, Compression(_like(part.history, change), _like(part.tail, change)))
            new.layers.append(copied)
        return new

    def clone(self) -> State:
        """An independent copy."""
        return self._copy(torch.clone)

    def select(self, rows: Tensor | list[int]) -> State:
        """The state of some rows (repeats allowed), as a new state."""
        index = torch.as_tensor(rows, device=self.length.device)
        return self._copy(lambda tensor: tensor.index_select(0, index))

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name, for saving; `load_state_dict` of an empty state of the same model restores it."""
        tensors = {"length": self.length}
        for i, layer in enumerate(self.layers):
            tensors |= {f"layers.{i}.{j}": part.rows for j, part in enumerate(layer.parts())}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> State:
        """Takes over copies of the tensors of `state_dict`. Raises ValueError if the names differ."""
        if tensors.keys() != self.state_dict().keys():
            raise ValueError(f"state has {len(tensors)} tensors, this model's state has {len(self.state_dict())}")
        self.length = tensors["length"].clone()
        for i, layer in enumerate(self.layers):
            for j, part in enumerate(layer.parts()):
                part.rows = tensors[f"layers.{i}.{j}"].clone()
        return self


def _like(part: Any, change: Any) -> Any:
    copied = object.__new__(type(part))
    copied.rows = change(part.rows)
    return copied


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, S, dim], index [B, n] -> [B, n, dim]."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
