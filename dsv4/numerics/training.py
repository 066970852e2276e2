"""Quantisation-aware training (report 5.2.1): forward in the deployed formats, gradients straight through.

Experts go FP32 master -> FP4 -> FP8 without loss, as the deployed FP4 weights enter an FP8 multiplication; the
gradient of the FP8 weight is the master's. Index queries and keys go through `index_row`.

Plain arithmetic on values, the same to the bit as quantising and expanding: no bytes are made, and nothing waits for a
device. Values that are not finite give NaN where quantising refuses them, so a loss shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.numerics.formats import FP4, FP8
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


def fp4_values(x: Tensor) -> Tensor:
    """`rounded(x, FP4)`: [..., columns] in blocks of 32 along the last axis."""
    blocks, _ = _fp4_blocks(x)
    return _unblocked(blocks, x)


def deployed_weight(master: Tensor) -> Tensor:
    """Expert weights [..., out, in] as the FP8 multiplication of FP4 weights sees them, in the master's dtype. Should
    the FP4 scales of one 128 x 128 block differ by more than 2^14 (`recast` reports it), its smallest weights round
    once more."""
    blocks, exponent = _fp4_blocks(master)  # [..., out, in / 32, 32], [..., out, in / 32]
    live = exponent.masked_fill(~blocks.ne(0).any(-1), -127)
    (high, wide), (rows, columns) = FP8.block, live.shape[-2:]
    wide //= FP4.block[1]
    live = F.pad(live, (0, -columns % wide, 0, -rows % high), value=-127)
    top = live.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).amax((-3, -1))
    # E4M3 next to 2^6 resolves 2^-9, and every FP4 value above its smallest normal: one step for the whole block.
    step = _power((top - 6 - 9).clamp(min=-126)).repeat_interleave(high, -2).repeat_interleave(wide, -1)
    step = step[..., :rows, :columns, None]
    return _unblocked(torch.round(blocks / step) * step, master)


def _fp4_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as float32 [..., columns / 32, 32], rounded to FP4, and the exponents of its scales int32; the end filled up
    with zeros."""
    blocks = F.pad(x.float(), (0, -x.shape[-1] % FP4.block[1])).unflatten(-1, (-1, FP4.block[1]))
    most = blocks.abs().amax(-1)
    mantissa, exponent = torch.frexp(most.clamp(min=FP4.floor))
    exponent = exponent - 3 + (mantissa > 0.75)  # 6 is 0.75 * 2^3
    scale = torch.where(most.isfinite(), _power(exponent), torch.nan)[..., None]
    y = blocks / scale
    size = y.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.round(y / step) * step * scale, exponent


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in float32, for exponents of normal numbers."""
    return (exponent.to(torch.int32) + 127 << 23).view(torch.float32)


def _unblocked(blocks: Tensor, x: Tensor) -> Tensor:
    return blocks.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def trained_weight(master: Tensor) -> Tensor:
    """`deployed_weight` with the gradient passed straight to the master."""
    return straight_through(master, deployed_weight)


def trained_index_row(x: Tensor) -> Tensor:
    """`index_row` whose rounding passes gradients; they flow back through the Hadamard transform."""
    return straight_through(hadamard(x), fp4_values)


M = TypeVar("M", bound=nn.Module)


def quantisation_aware(model: M) -> M:
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
