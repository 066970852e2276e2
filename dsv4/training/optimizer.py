"""The optimiser of a run: which parameter is trained how (one table), Muon stacks and AdamW over the rest.

Masters, moments and accumulated gradients are float32 here whatever the model's dtype; a step writes the parameters.
Muon and AdamW share one learning rate, because Muon's updates are scaled to AdamW's usual RMS (report 2.4).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.config import Config
from dsv4.training.muon import MuonStack

# AdamW trains what is not a matrix between hidden spaces (report 2.4); everything else is Muon's.
ADAMW = re.compile(r"(^|\.)((embed|head|\w*norm)\.weight|hc_\w+_(base|scale)|attn_sink|ape)$")
INDEXER = re.compile(r"\.indexer\.")


def is_adamw(name: str) -> bool:
    """Whether AdamW trains the parameter of that official name."""
    return ADAMW.search(name) is not None


def is_indexer(name: str) -> bool:
    """Whether the parameter belongs to a lightning indexer (trained by its own loss, in its own phases)."""
    return INDEXER.search(name) is not None


def logical_rows(name: str, shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    """How a Muon parameter, seen as [rows, last axis], splits into logically independent matrices: their row counts.

    Stacked experts are one matrix each; an mHC map holds W^pre, W^post and W^res; the grouped output projection one
    matrix a group; an overlapping compressor the two projections C^a and C^b.
    """
    rows = math.prod(shape[:-1])
    if len(shape) == 3:
        return (shape[1],) * shape[0]
    if re.search(r"hc_(attn|ffn)_fn$", name):
        return (config.hc_mult, config.hc_mult, config.hc_mult**2)
    if name.endswith("attn.wo_a.weight"):
        return (rows // config.o_groups,) * config.o_groups
    if re.search(r"compressor\.(wkv|wgate)\.weight$", name):
        blocks = config.layers + config.mtp_layers if name.startswith("layers.") else config.mtp_layers
        if blocks[int(name.split(".")[1])].overlap:
            return (rows // 2,) * 2
    return (rows,)


@dataclass(frozen=True)
class OptimizerSettings:
    """Report 4.2.1. `matmul` is the dtype of the Newton-Schulz products."""

    lr: float = 2.7e-4
    end_lr_ratio: float = 0.1
    momentum: float = 0.95
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-20
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    matmul: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.matmul not in ("bfloat16", "float32"):
            raise ValueError(f"optimizer.matmul is {self.matmul!r}; known: 'bfloat16', 'float32'")
        if not (self.lr > 0 and 0 <= self.end_lr_ratio <= 1 and self.grad_clip > 0 and len(self.betas) == 2):
            raise ValueError(f"optimizer: lr and grad_clip must be positive, end_lr_ratio 0..1, two betas: {self}")


class AdamW:
    """Decoupled AdamW over parameters laid end to end in one float32 vector."""

    def __init__(self, parameters: list[Tensor], settings: OptimizerSettings) -> None:
        self.parameters, self.settings = parameters, settings
        self.master = torch.cat([p.detach().float().flatten() for p in parameters])
        self.first, self.second, self.grad = (torch.zeros_like(self.master) for _ in range(3))
        self.grads = self._views(self.grad)
        self.masters = self._views(self.master)
        self.steps = 0

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters)]

    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update with the accumulated gradients times `scale`; writes the parameters, clears the gradients."""
        self.steps += 1
        beta1, beta2 = self.settings.betas
        self.grad.mul_(scale)
        self.first.lerp_(self.grad, 1 - beta1)
        self.second.mul_(beta2).addcmul_(self.grad, self.grad, value=1 - beta2)
        denominator = (self.second / (1 - beta2**self.steps)).sqrt_().add_(self.settings.eps)
        self.master.mul_(1 - lr * self.settings.weight_decay)
        self.master.addcdiv_(self.first, denominator, value=-lr / (1 - beta1**self.steps))
        torch._foreach_copy_(self.parameters, self.masters)
        self.grad.zero_()


class Optimizer:
    """Muon and AdamW over `parameters` (official name -> parameter). Per micro-batch `accumulate`, per step `step`."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], config: Config, settings: OptimizerSettings) -> None:
        named = dict(parameters)
        assert named, "nothing to train"
        self.adamw_names = [name for name in named if is_adamw(name)]
        self.adamw = AdamW([named[name].data for name in self.adamw_names], settings) if self.adamw_names else None
        self.named = named
        blocks: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self.places: dict[str, list[tuple[tuple[int, ...], int]]] = {}  # parameter -> (stack, index) of its matrices
        self.rows: dict[str, tuple[int, ...]] = {}
        for name, parameter in named.items():
            if is_adamw(name):
                continue
            assert parameter.ndim >= 2, f"{name} {tuple(parameter.shape)} is no matrix: give it to AdamW in the table"
            self.rows[name] = logical_rows(name, tuple(parameter.shape), config)
            self.places[name] = []
            for block in parameter.data.flatten(0, -2).split(self.rows[name]):
                shape = tuple(block.shape)
                self.places[name].append((shape, len(blocks[shape])))
                blocks[shape].append(block)
        dtype = getattr(torch, settings.matmul)
        self.stacks = {
            shape: MuonStack(stack, settings.momentum, settings.weight_decay, dtype) for shape, stack in blocks.items()
        }

    @torch.no_grad()
    def accumulate(self) -> None:
        """Moves every parameter's `.grad` into the float32 sums. Parameters without one add nothing."""
        grads = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        for name, places in self.places.items():
            if name in grads:
                pieces = grads[name].flatten(0, -2).split(self.rows[name])
                for (shape, index), piece in zip(places, pieces):
                    self.stacks[shape].add_grad(index, piece)
        if self.adamw:
            for name, total in zip(self.adamw_names, self.adamw.grads):
                if name in grads:
                    total += grads[name]
        self.discard()

    def discard(self) -> None:
        """Drops every parameter's `.grad`."""
        for parameter in self.named.values():
            parameter.grad = None

    def _parts(self) -> list[MuonStack | AdamW]:
        return [*self.stacks.values(), *([self.adamw] if self.adamw else [])]

    def grad_norm(self) -> Tensor:
        """The 2-norm of all accumulated gradients, float32 scalar."""
        return torch.stack([part.grad.norm() for part in self._parts()]).norm()

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Updates every parameter with the accumulated gradients times `scale` and clears them."""
        for part in self._parts():
            part.step(lr, scale)

    def state_dict(self) -> dict[str, Tensor]:
        """Masters and moments by flat names, to be saved with the step count; gradients are not state between steps."""
        state: dict[str, Tensor] = {}
        for (n, m), stack in self.stacks.items():
            state[f"muon.{n}x{m}.master"], state[f"muon.{n}x{m}.momentum"] = stack.master, stack.momentum
        if self.adamw:
            state |= {"adamw.master": self.adamw.master, "adamw.first": self.adamw.first}
            state |= {"adamw.second": self.adamw.second, "adamw.steps": torch.tensor(self.adamw.steps)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave for the same parameters; ValueError names what differs."""
        own = self.state_dict()
        differs = sorted(k for k in own.keys() ^ state.keys())
        differs += sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
        if differs:
            raise ValueError(f"optimiser state does not fit this model: {', '.join(differs[:5])}")
        for key, value in state.items():
            own[key].copy_(value)
        if self.adamw:
            self.adamw.steps = int(state["adamw.steps"])
