"""RMS norm and rotation."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.tiles import cast, tile

_TILE = 4096  # elements of a program with short rows


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See the reference of the same name."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    rows, wide = x.numel() // width, tile(width)
    size = max(_TILE // wide, 1)
    w = x if weight is None else weight
    _norm[(triton.cdiv(rows, size),)](x, w, y, rows, width, eps, WEIGHED=weight is not None, M=size, N=wide)
    return y


@triton.jit
def _norm(x, weight, y, rows, width, eps, WEIGHED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, N)
    at, there = m[:, None] * width + n[None, :], (m < rows)[:, None] & (n < width)[None, :]
    value = tl.load(x + at, mask=there, other=0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    if WEIGHED:
        value *= tl.load(weight + n, mask=n < width, other=0).to(tl.float32)[None, :]
    tl.store(y + at, cast(value, y.dtype.element_ty), mask=there)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _rotated(x, angles)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _rotated(grads[0], ctx.saved_tensors[0].conj()), None  # a rotation's transpose is its inverse


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """See the reference of the same name."""
    return _Rotation.apply(x, angles) if torch.is_grad_enabled() else _rotated(x, angles)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    x = x.contiguous()
    y, width, pairs, lead = torch.empty_like(x), x.shape[-1], angles.shape[-1], x.shape[:-1]
    shape = (1,) * (len(lead) + 1 - angles.ndim) + angles.shape[:-1]
    split = max((i + 1 for i, size in enumerate(shape) if size > 1), default=0)
    turns = torch.view_as_real(angles.resolve_conj()).reshape(*shape, pairs, 2)
    turns = turns.expand(*lead[:split], *shape[split:], pairs, 2).contiguous()
    share, rows, wide = prod(lead[split:]), x.numel() // width, tile(width)  # so many rows (heads) turn alike
    size = max(_TILE // wide, 1)
    _rotate[(triton.cdiv(rows, size),)](x, turns, y, rows, width, width - 2 * pairs, share, M=size, N=wide)
    return y


@triton.jit
def _rotate(x, turns, y, rows, width, still, share, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, N)
    there, turned = (m < rows)[:, None] & (n < width)[None, :], ((n >= still) & (n < width))[None, :]
    pair = n - still
    own = tl.load(x + m[:, None] * width + n[None, :], mask=there, other=0)
    other = tl.load(x + m[:, None] * width + still + (pair ^ 1)[None, :], mask=there & turned, other=0)
    angle = turns + (m // share)[:, None] * (width - still) + (pair & -2)[None, :]
    real = tl.load(angle, mask=there & turned, other=0)
    imaginary = tl.load(angle + 1, mask=there & turned, other=0)
    sign = tl.where(pair % 2 == 0, -1.0, 1.0)[None, :]
    value = own.to(tl.float32) * real + sign * other.to(tl.float32) * imaginary
    value = tl.where(turned, cast(value, y.dtype.element_ty), own)
    tl.store(y + m[:, None] * width + n[None, :], value, mask=there)
