"""Quantisation-aware training (report 5.2.1): forward in the deployed formats, gradients straight through.

Experts go FP32 master -> FP4 -> FP8 without loss, as the deployed FP4 weights enter an FP8 multiplication; the
gradient of the FP8 weight is the master's. Index queries and keys go through `index_row`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv4.numerics.blocks import dequantise, quantise, rounded
from dsv4.numerics.formats import FP4, FP8, INDEX_ROW
from dsv4.numerics.recast import recast
from dsv4.numerics.rows import hadamard


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """change(x), with the gradient of x."""
    return _StraightThrough.apply(x, change)


def deployed_weight(master: Tensor) -> Tensor:
    """Expert weights as the FP8 multiplication of FP4 weights sees them, in the master's dtype. Should the FP4 scales
    of one block differ by more than 2^14 (`recast` reports it), its smallest weights round once more."""
    eight = recast(*quantise(master, FP4))
    return dequantise(eight.elements, eight.scale, FP8, master.dtype)


def trained_weight(master: Tensor) -> Tensor:
    """`deployed_weight` with the gradient passed straight to the master."""
    return straight_through(master, deployed_weight)


def trained_index_row(x: Tensor) -> Tensor:
    """`index_row` whose rounding passes gradients; they flow back through the Hadamard transform."""
    return straight_through(hadamard(x), lambda y: rounded(y, INDEX_ROW))


def quantisation_aware(model: nn.Module) -> nn.Module:
    """Switches a float model's training to deployed precision: routed experts through `trained_weight`, index queries
    and keys through `trained_index_row`, wherever modules named ``ffn`` and ``indexer`` have a ``round``. Parameters
    stay the float32 masters, so saving and optimisers know nothing of it."""
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "ffn":
            module.round = trained_weight
        elif leaf == "indexer":
            module.round = module.compressor.round = trained_index_row
    return model
