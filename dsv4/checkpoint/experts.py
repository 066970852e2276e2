"""Routed experts that stay on disk: a model larger than memory runs, with its hottest experts kept.

An expert is read when a token is routed to it and stays until the budget is full; then the one used longest ago goes.
What the file holds is what the kernels get, so logits do not depend on the budget.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from dsv4.checkpoint.folder import Folder
from dsv4.numerics import Packed

Expert = tuple[Packed, Packed, Packed]
WEIGHTS = ("w1", "w2", "w3")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_bytes(text: str | int) -> int:
    """``8GiB``, ``500 MB``, ``4096`` -> bytes. ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = (found[2].upper() or "B") if found else ""
    if not found or unit not in _UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write it like 8GiB or 500MB")
    return int(float(found[1]) * _UNITS[unit])


class ExpertCache:
    """Experts by (layer, number), at most ``budget`` bytes of them, the least recently used leaving first. ``hits`` and
    ``misses`` count look-ups of experts."""

    def __init__(self, budget: int, expert_bytes: int) -> None:
        if budget < expert_bytes:
            raise ValueError(f"an expert memory of {budget:,} bytes does not hold one expert of {expert_bytes:,}")
        self.room, self.expert_bytes = budget // expert_bytes, expert_bytes
        self.held: OrderedDict[tuple[str, int], Expert] = OrderedDict()
        self.hits = self.misses = 0

    @property
    def nbytes(self) -> int:
        return len(self.held) * self.expert_bytes

    def get(self, key: tuple[str, int], read: Callable[[], Expert]) -> Expert:
        """The expert of ``key``, read now if it is not held."""
        if key in self.held:
            self.hits += 1
            self.held.move_to_end(key)
        else:
            self.misses += 1
            while len(self.held) >= self.room:  # before the read, so that the budget holds at every moment
                self.held.popitem(last=False)
            self.held[key] = read()
        return self.held[key]


class StreamedStack(nn.Module):
    """One of the three stacks of a layer's experts, as a stacked `Packed` shows itself: ``shape`` and ``stack[e]``."""

    def __init__(self, folder: Folder, cache: ExpertCache, prefix: str, part: int, shape: torch.Size) -> None:
        super().__init__()
        self.folder, self.cache, self.prefix, self.part, self.shape = folder, cache, prefix, part, shape

    @property
    def room(self) -> int:
        """So many experts may be held at once; a kernel that needs more of them takes turns."""
        return self.cache.room

    def __getitem__(self, expert: int) -> Packed:
        return self.cache.get((self.prefix, expert), lambda: self._read(expert))[self.part]

    def _read(self, expert: int) -> Expert:
        w1, w2, w3 = (self.folder.read(f"{self.prefix}.{expert}.{w}.weight") for w in WEIGHTS)
        assert isinstance(w1, Packed) and isinstance(w2, Packed) and isinstance(w3, Packed)
        return w1, w2, w3


def stream_experts(model: nn.Module, folder: Folder, budget: int) -> ExpertCache:
    """Puts `StreamedStack`s that share one cache where ``model`` (on the meta device) has its stacked experts."""
    groups = [(name, module) for name, module in model.named_modules() if name.endswith(".ffn.experts")]
    one = [folder.places[f"{groups[0][0]}.0.{w}.weight"] for w in WEIGHTS]
    size = sum(place.stored.nbytes + (place.scale.nbytes if place.scale else 0) for place in one)
    cache = ExpertCache(budget, size)
    for prefix, module in groups:
        for part, w in enumerate(WEIGHTS):
            shape = getattr(module, w).shape
            delattr(module, w)
            setattr(module, w, StreamedStack(folder, cache, prefix, part, shape))
    return cache
