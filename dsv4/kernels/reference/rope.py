"""Norm and rotation: the two small operations around every projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ZERO = torch.zeros(())
_SHORT = 1 << 14  # values; below that the number of calls decides


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., C] any float dtype -> same; computed in float32 with one cast at the end (model card B.0)."""
    wide = x.float()
    if x.numel() == x.shape[-1] and weight is not None and not torch.is_grad_enabled() and x.device.type == "cpu":
        row = wide.reshape(-1)  # one row: the fewest calls
        return torch.addcmul(_ZERO, wide, weight, value=(float(row.dot(row)) / len(row) + eps) ** -0.5).to(x.dtype)
    if torch.is_grad_enabled() or x.numel() < _SHORT:
        return torch.nn.functional.rms_norm(wide, x.shape[-1:], weight, eps).to(x.dtype)
    # The same without what a gradient needs: on a CPU several times faster for many short rows.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    out = wide * torch.rsqrt(norm.square_().mul_(1 / x.shape[-1]).add_(eps))
    return (out if weight is None else out.mul_(weight)).to(x.dtype)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    turned = out[..., -2 * angles.shape[-1] :]
    # float32 is turned where it lies
    pairs = torch.view_as_complex(turned.float().view(*x.shape[:-1], angles.shape[-1], 2))
    pairs.mul_(angles)
    if x.dtype != torch.float32:
        turned.copy_(torch.view_as_real(pairs).flatten(-2))
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _rotated(x, angles)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _rotated(grads[0], ctx.saved_tensors[0].conj()), None  # a rotation's transpose is its inverse


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Interleaved RoPE on the last 2R channels (report 2.3.3): channels (2i, 2i+1) turn as one complex number.

    x [..., C] any float dtype; angles complex64 [..., R] of unit magnitude, broadcastable. Pass ``angles.conj()`` to
    undo.
    """
    return _Rotate.apply(x, angles) if torch.is_grad_enabled() else _rotated(x, angles)
