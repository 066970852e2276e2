"""A compressor: its two projections in one launch, and its pooling, a softmax over the slots of an entry."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.linear import height, wide
from dsv4.kernels.triton.tiles import multiply, stored, tile

_WIDE = 64  # channels of a program


def project(x: Tensor, values: Tensor, gates: Tensor, ape: Tensor, position: Tensor, dim: int) -> Tensor:
    """See `dsv4.kernels.project`: products of x's own dtype, added up in float32."""
    x, values, gates, ape, position = (t.contiguous() for t in (x, values, gates, ape, position))
    out, width = values.shape
    y = x.new_empty(*x.shape[:-1], 2 * out, dtype=torch.float32)
    rows, size, many = position.numel(), height(position.numel()), tile(wide(2 * out))
    grid = (triton.cdiv(rows, size), triton.cdiv(out, many), 2)
    _project[grid](
        x, values, gates, ape, position, y, rows, out, width, dim, len(ape), M=size, N=many, **stored(values)
    )
    return y


@triton.jit
def _project(
    x, values, gates, ape, position, y, rows, out, width, dim, ratio,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Values where program_id(2) is 0, gates where it is 1; per ``dim`` channels of y the one, then the other."""
    m, n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    gate, there = tl.program_id(2), (m < rows)[:, None] & (n < out)[None, :]
    w = values
    if gate == 1:
        w = gates
    acc = multiply(x + m * width, m < rows, w, w, n, out, width, M, N, K, FORM, HIGH, WIDE)
    if gate == 1:
        place = tl.load(position + m, mask=m < rows, other=0) % ratio
        acc += tl.load(ape + place[:, None] * out + n[None, :], mask=there, other=0)
    channel = n // dim * 2 * dim + gate * dim + n % dim
    tl.store(y + m[:, None] * 2 * out + channel[None, :], acc, mask=there)


def pool(kv: Tensor, gate: Tensor) -> Tensor:
    """(softmax(gate, -2) * kv).sum(-2), float32: kv, gate [..., slots, dim] -> [..., dim]. A gate may be -inf, but not
    all of a channel's (report eqs. 11-12 and 22-23)."""
    kv, gate = kv.contiguous(), gate.contiguous()
    slots, dim = kv.shape[-2:]
    out = kv.new_empty(*kv.shape[:-2], dim)
    grid = (out.numel() // dim, triton.cdiv(dim, _WIDE))
    _pool[grid](kv, gate, out, slots, dim, S=tile(slots, 1), N=_WIDE)
    return out


@triton.jit
def _pool(kv, gate, out, slots, dim, S: tl.constexpr, N: tl.constexpr):
    row, s, n = tl.program_id(0).to(tl.int64), tl.arange(0, S), tl.program_id(1) * N + tl.arange(0, N)
    at, there = (row * slots + s)[:, None] * dim + n[None, :], (s < slots)[:, None] & (n < dim)[None, :]
    g = tl.load(gate + at, mask=there, other=float("-inf"))
    g = tl.where((n < dim)[None, :], g, 0)
    p = tl.exp(g - tl.max(g, 0)[None, :])
    value = tl.sum(p * tl.load(kv + at, mask=there, other=0), 0) / tl.sum(p, 0)
    tl.store(out + row * dim + n, value, mask=n < dim)
