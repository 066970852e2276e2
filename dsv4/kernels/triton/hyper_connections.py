"""The maps and mixes of a hyper-connection site; the doubly stochastic map never leaves the registers in between."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.tiles import cast, dot, tile

_SPAN = 1024  # channels whose share of the logits is one program's: also a single token fills the device
_WIDE = 1024  # channels of a mixing program


def hc_enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference of the same name."""
    streams, fn = streams.contiguous(), fn.contiguous()
    *lead, n, dim = streams.shape
    rows, width, logits = streams.numel() // (n * dim), n * dim, fn.shape[0]
    spans = triton.cdiv(width, _SPAN)
    shares = torch.empty(rows, spans, logits + 1, dtype=torch.float32, device=streams.device)
    _logits[triton.cdiv(rows, 16), spans](
        streams, fn, shares, rows, width, logits, M=16, N=tile(logits), K=64, SPAN=_SPAN
    )
    x = streams.new_empty(*lead, dim)
    post, comb = base.new_empty(*lead, n), base.new_empty(*lead, n, n)
    _maps[(rows,)](
        streams, shares, base, scale, x, post, comb, n, dim, spans, iterations, rms_eps, eps,
        N=tile(n, 1), S=tile(spans, 1), WIDE=_WIDE,
    )  # fmt: skip
    return x, post, comb


@triton.jit
def _logits(
    streams, fn, shares, rows, width, logits,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One span's share of fn . v, and of v . v behind it."""
    m, n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, N)
    acc, squares = tl.zeros([M, N], tl.float32), tl.zeros([M], tl.float32)
    for k in range(tl.program_id(1) * SPAN, tl.program_id(1) * SPAN + SPAN, K):
        i = k + tl.arange(0, K)
        there = (m < rows)[:, None] & (i < width)[None, :]
        v = tl.load(streams + m[:, None] * width + i[None, :], mask=there, other=0).to(tl.float32)
        there = (n < logits)[:, None] & (i < width)[None, :]
        f = tl.load(fn + n[:, None] * width + i[None, :], mask=there, other=0)
        acc = dot(v, tl.trans(f), acc)
        squares += tl.sum(v * v, 1)
    at = shares + (m * tl.num_programs(1) + tl.program_id(1)) * (logits + 1)
    tl.store(at[:, None] + n[None, :], acc, mask=(m < rows)[:, None] & (n < logits)[None, :])
    tl.store(at + logits, squares, mask=m < rows)


@triton.jit
def _maps(
    streams, shares, base, scale, x, post, comb, n, dim, spans, iterations, rms_eps, eps,
    N: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token: its shares added up, the three maps (eqs. 3-8), and the sub-layer's input."""
    row, i, s = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.arange(0, S)
    logits = (2 + n) * n
    shares += row * spans * (logits + 1)
    at, there = shares + s[:, None] * (logits + 1) + i[None, :], (s < spans)[:, None] & (i < n)[None, :]
    squares = tl.sum(tl.load(shares + s * (logits + 1) + logits, mask=s < spans, other=0), 0)
    r = tl.rsqrt(squares / (n * dim) + rms_eps)
    u = tl.sum(tl.load(at, mask=there, other=0), 0) * r
    pre = tl.sigmoid(u * tl.load(scale) + tl.load(base + i, mask=i < n, other=0)) + eps
    u = tl.sum(tl.load(at + n, mask=there, other=0), 0) * r
    after = 2 * tl.sigmoid(u * tl.load(scale + 1) + tl.load(base + n + i, mask=i < n, other=0))
    tl.store(post + row * n + i, after, mask=i < n)

    cell, square = i[:, None] * n + i[None, :], (i < n)[:, None] & (i < n)[None, :]
    at = shares + s[:, None, None] * (logits + 1) + 2 * n + cell[None, :, :]
    u = tl.sum(tl.load(at, mask=(s < spans)[:, None, None] & square[None, :, :], other=0), 0) * r
    c = u * tl.load(scale + 2) + tl.load(base + 2 * n + cell, mask=square, other=0)
    c = tl.where(square, tl.exp(c - tl.max(tl.where(square, c, -1e30), 1)[:, None]), 0)
    c = tl.where(square, c / tl.maximum(tl.sum(c, 1), 1)[:, None] + eps, 0)  # a sum with its largest term, 1, in it
    c /= tl.sum(c, 0)[None, :] + eps
    for _ in range(iterations - 1):
        c /= tl.sum(c, 1)[:, None] + eps
        c /= tl.sum(c, 0)[None, :] + eps
    tl.store(comb + row * n * n + cell, c, mask=square)

    for first in range(0, dim, WIDE):
        d = first + tl.arange(0, WIDE)
        part = (i < n)[:, None] & (d < dim)[None, :]
        v = tl.load(streams + (row * n + i)[:, None] * dim + d[None, :], mask=part, other=0).to(tl.float32)
        tl.store(x + row * dim + d, cast(tl.sum(v * pre[:, None], 0), x.dtype.element_ty), mask=d < dim)


def hc_leave(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See the reference of the same name."""
    streams, y, post, comb = (t.contiguous() for t in (streams, y, post, comb))
    n, dim = streams.shape[-2:]
    out = torch.empty_like(streams)
    grid = (streams.numel() // (n * dim), triton.cdiv(dim, _WIDE))
    _mix[grid](streams, y, post, comb, out, n, dim, N=tile(n, 1), WIDE=_WIDE)
    return out


@triton.jit
def _mix(streams, y, post, comb, out, n, dim, N: tl.constexpr, WIDE: tl.constexpr):
    """X'_k = post_k y + sum_j comb_jk X_j."""
    row, k, d = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    value = tl.load(y + row * dim + d, mask=d < dim, other=0).to(tl.float32)
    acc = tl.load(post + row * n + k, mask=k < n, other=0)[:, None] * value[None, :]
    for j in range(n):
        v = tl.load(streams + (row * n + j) * dim + d, mask=d < dim, other=0).to(tl.float32)
        acc += tl.load(comb + (row * n + j) * n + k, mask=k < n, other=0)[:, None] * v[None, :]
    at = out + (row * n + k)[:, None] * dim + d[None, :]
    tl.store(at, cast(acc, out.dtype.element_ty), mask=(k < n)[:, None] & (d < dim)[None, :])
