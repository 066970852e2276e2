"""Routed experts that stay on disk: a model larger than memory runs, with its hottest experts kept.

An expert is read when a token is routed to it and stays until the budget is full; then the one used longest ago goes.
What the file holds is what the kernels get, so logits do not depend on the budget.

Reading overlaps with everything else. Experts that a call is known to need are read side by side, those of the kernel's
next turn while it works on this one; and while a layer computes, the disk is already asked for what the next one will
need: exactly where the router looks tokens up, by a guess (its router on this layer's input) where it computes. Guesses
only warm the page cache, so a wrong one displaces nothing.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from dsv4.checkpoint.folder import Folder
from dsv4.model import Transformer
from dsv4.numerics import Packed

Expert = tuple[Packed, Packed, Packed]
Key = tuple[str, int]
Begin = Callable[[Key], Callable[[], Expert]]
"""Takes memory for an expert, and gives the work of reading it, for any thread: what readers took themselves would lie
in arenas of their own, a gigabyte more of them."""
_READERS = 4  # reads at a time: a disk with several queues is faster so, and checking what was read takes a core
_FEW = 8  # tokens
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
    """Experts by (layer, number), at most ``budget`` bytes of them with those on their way, the least recently used
    leaving first. ``hits`` and ``misses`` count look-ups of experts."""

    def __init__(self, budget: int, expert_bytes: int) -> None:
        if budget < expert_bytes:
            raise ValueError(f"an expert memory of {budget:,} bytes does not hold one expert of {expert_bytes:,}")
        self.room, self.expert_bytes = budget // expert_bytes, expert_bytes
        self.held: OrderedDict[Key, Expert] = OrderedDict()
        self.coming: dict[Key, Future[Expert]] = {}
        self.hits = self.misses = 0
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="dsv4-experts")

    @property
    def nbytes(self) -> int:
        return (len(self.held) + len(self.coming)) * self.expert_bytes

    def ask(self, keys: Iterable[Key], begin: Begin) -> None:
        """Begins to read those of ``keys`` that are not here, as many of them as there is room for."""
        wanted = list(keys)[: self.room]
        for key in wanted:
            if key in self.held:
                self.held.move_to_end(key)
        for key in wanted:
            if key not in self.held and key not in self.coming and len(self.coming) < self.room:
                self._make_room()
                self.coming[key] = self._readers.submit(begin(key))

    def get(self, key: Key, begin: Begin) -> Expert:
        """The expert of ``key``, read now if it is neither held nor on its way."""
        if key in self.held:
            self.hits += 1
            self.held.move_to_end(key)
        else:
            self.misses += 1
            coming = self.coming.pop(key, None)
            self._make_room()
            self.held[key] = coming.result() if coming else begin(key)()
        return self.held[key]

    def _make_room(self) -> None:
        """For one more, before it is read, so that the budget holds at every moment."""
        while len(self.held) + len(self.coming) >= self.room:
            if self.held:
                self.held.popitem(last=False)
            else:  # asked for, and then not fetched
                dropped = self.coming.pop(next(iter(self.coming)))
                if not dropped.cancel():
                    wait([dropped])


class StreamedStack(nn.Module):
    """One of the three stacks of a layer's experts, as a stacked `Packed` shows itself: ``shape`` and ``stack[e]``."""

    def __init__(self, folder: Folder, cache: ExpertCache, prefix: str, part: int, shape: torch.Size) -> None:
        super().__init__()
        self.folder, self.cache, self.prefix, self.part, self.shape = folder, cache, prefix, part, shape

    @property
    def room(self) -> int:
        """So many experts may be held at once; a kernel that needs more of them takes turns."""
        return self.cache.room

    def ask(self, experts: Iterable[int]) -> None:
        """These will be fetched next: begin to read them."""
        self.cache.ask([(self.prefix, e) for e in experts], self._begin)

    def foresee(self, experts: Iterable[int]) -> None:
        """These may be needed soon: tell the operating system, and wait for nothing."""
        for e in experts:
            if (self.prefix, e) not in self.cache.held and (self.prefix, e) not in self.cache.coming:
                for w in WEIGHTS:
                    self.folder.foresee(f"{self.prefix}.{e}.{w}.weight")

    def __getitem__(self, expert: int) -> Packed:
        return self.cache.get((self.prefix, expert), self._begin)[self.part]

    def _begin(self, key: Key) -> Callable[[], Expert]:
        names = [f"{key[0]}.{key[1]}.{w}.weight" for w in WEIGHTS]
        w1, w2, w3 = (self.folder.empty(name) for name in names)

        def read() -> Expert:
            for name, room in zip(names, (w1, w2, w3)):
                self.folder.read(name, room)
            return w1, w2, w3

        return read


def stream_experts(model: Transformer, folder: Folder, budget: int) -> ExpertCache:
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
    layers: list[Any] = list(model.layers)
    for block in layers:
        block.ffn.gate.register_forward_hook(partial(_ask, block.ffn.experts.w1))
    for block, following in pairwise(layers):
        block.ffn.register_forward_pre_hook(partial(_look_ahead, following.ffn))
    return cache


def _ask(stack: StreamedStack, _: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """A router has spoken: its experts are read while the kernel prepares."""
    if len(inputs[0]) <= _FEW:  # a prompt asks for nearly all of them, turn by turn
        stack.ask(output[0].unique().tolist())


def _look_ahead(following: Any, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Before a layer's experts work on ``inputs`` (h, ids, ...): which experts the next layer will probably ask for."""
    h, ids = inputs[:2]
    if ids.numel() <= _FEW:
        chosen, _, _ = following.gate.forward(h.flatten(0, 1), ids.flatten())  # not through `_ask`: it is a guess
        following.experts.w1.foresee(chosen.unique().tolist())
