"""Linear layers and experts through ``linear.cpp``: any number of rows, and a row's result never depends on the others.

One pass over the weights when there are few rows (decoding: the memory's bandwidth), blocks that stay in the caches
when there are many. torch's own product wins for many rows in bfloat16, so `usable` leaves those to it unless
DSV4_EXACT asks for results that are the same to the bit in every batch.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library

_MANY = 48
EXACT = os.environ.get("DSV4_EXACT", "0") not in ("", "0")


def plain(x: Tensor, *weights: Tensor) -> bool:
    """No gradient wanted, one dtype of float32 or bfloat16 on the CPU, contiguous weights and a compiled library."""
    kind = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    kind = kind and all(w.dtype == x.dtype and w.is_contiguous() for w in weights)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    return kind and not wanted and x.numel() > 0 and library() is not None


def usable(x: Tensor, weight: Tensor) -> bool:
    """`plain`, and faster than torch."""
    many = x.dtype == torch.bfloat16 and x.numel() >= _MANY * x.shape[-1] and not EXACT
    return not many and plain(x, weight)


def linear(x: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; float32 when ``wide``."""
    return grouped_linear(x.unsqueeze(-2), weight.unsqueeze(0), wide).squeeze(-2)


def grouped_linear(x: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
    """x [..., G, in], weight [G, out, in] -> [..., G, out]."""
    x = x.contiguous()
    groups, out, width = weight.shape
    wide = wide and x.dtype != torch.float32
    y = torch.empty(*x.shape[:-1], out, dtype=torch.float32 if wide else x.dtype)
    name = "linear_wide" if wide else "linear"
    call(name, x.dtype, x, weight, y, x.numel() // (groups * width), out, width, groups)
    return y


def routed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float
) -> Tensor:
    """See the reference of the same name; here a token adds its experts in the order of their numbers."""
    rows, choices = experts.shape
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    out = torch.zeros(rows, x.shape[-1])
    call("experts", x.dtype, x, weights, experts, w1, w2, w3, out, rows, choices, *w1.shape[::2], w1.shape[1], limit)
    return out
