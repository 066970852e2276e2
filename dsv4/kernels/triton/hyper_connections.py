"""The maps and mixes of a hyper-connection site; the doubly stochastic map never leaves the registers in between."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

from typing import Any

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
    if torch.is_grad_enabled():
        return _Enter.apply(streams, fn, base, scale, iterations, rms_eps, eps)
    return _entered(streams, fn, base, scale, iterations, rms_eps, eps)[:3]


def _entered(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `hc_enter` returns, and each span's share of fn . v and of v . v [rows, spans, logits + 1]."""
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
    return x, post, comb, shares


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
    return (_Leave.apply if torch.is_grad_enabled() else _left)(streams, y, post, comb)


def _left(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
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


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(*(t.contiguous() for t in (streams, y, post, comb)))
        return _left(streams, y, post, comb)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        streams, y, post, comb = ctx.saved_tensors
        n, dim = streams.shape[-2:]
        found = tuple(torch.empty_like(t) for t in ctx.saved_tensors)
        grid = (streams.numel() // (n * dim),)
        _leave_gradient[grid](streams, y, post, comb, grads[0].contiguous(), *found, n, dim, N=tile(n, 1), WIDE=_PART)
        return found


_PART = 256  # channels at a time where n x n x channels are held in registers


@triton.jit
def _leave_gradient(
    streams, y, post, comb, grad, d_streams, d_y, d_post, d_comb, n, dim, N: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """One token: dX_j = sum_k comb_jk dO_k, dy = sum_k post_k dO_k, dpost_k = y . dO_k, dcomb_jk = X_j . dO_k."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    cell, square = i[:, None] * n + i[None, :], (i < n)[:, None] & (i < n)[None, :]
    c, p = tl.load(comb + row * n * n + cell, mask=square, other=0), tl.load(post + row * n + i, mask=i < n, other=0)
    sum_comb, sum_post = tl.zeros([N, N], tl.float32), tl.zeros([N], tl.float32)
    for first in range(0, dim, WIDE):
        d = first + tl.arange(0, WIDE)
        at, there = (row * n + i)[:, None] * dim + d[None, :], (i < n)[:, None] & (d < dim)[None, :]
        x = tl.load(streams + at, mask=there, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=there, other=0).to(tl.float32)
        v = tl.load(y + row * dim + d, mask=d < dim, other=0).to(tl.float32)
        back = tl.sum(c[:, :, None] * g[None, :, :], 1)
        tl.store(d_streams + at, cast(back, d_streams.dtype.element_ty), mask=there)
        back = tl.sum(p[:, None] * g, 0)
        tl.store(d_y + row * dim + d, cast(back, d_y.dtype.element_ty), mask=d < dim)
        sum_post += tl.sum(v[None, :] * g, 1)
        sum_comb += tl.sum(x[:, None, :] * g[None, :, :], 2)
    tl.store(d_post + row * n + i, sum_post, mask=i < n)
    tl.store(d_comb + row * n * n + cell, sum_comb, mask=square)


class _Enter(torch.autograd.Function):
    """Nothing of a token's maps is kept but fn . v and v . v; the backward computes them again, with torch's autograd
    over what is small."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, post, comb, shares = _entered(streams, fn, base, scale, iterations, rms_eps, eps)
        ctx.save_for_backward(streams.contiguous(), fn, base, scale, shares.sum(1))
        ctx.settings = iterations, rms_eps, eps
        return x, post, comb

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, *small = ctx.saved_tensors
        iterations, rms_eps, eps = ctx.settings
        n, dim = streams.shape[-2:]
        dx, d_post, d_comb = (g.contiguous() for g in grads)
        with torch.enable_grad():
            base, scale, sums = leaves = [t.detach().requires_grad_() for t in small]
            u = sums[:, :-1] * torch.rsqrt(sums[:, -1:] / (n * dim) + rms_eps)
            pre, post, comb = (
                u[:, part] * scale[j] + base[part]
                for j, part in enumerate((slice(n), slice(n, 2 * n), slice(2 * n, None)))
            )
            maps = torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post), _Sinkhorn.apply(comb, n, iterations, eps)
        d_pre = torch.empty_like(maps[0])
        rows = len(d_pre)
        _dots[(rows,)](streams, dx, d_pre, n, dim, N=tile(n, 1), WIDE=_WIDE)
        d_maps = d_pre, d_post.view(rows, n), d_comb.view(rows, n * n)
        d_base, d_scale, d_sums = torch.autograd.grad(maps, leaves, d_maps)
        d_logits, d_square = d_sums[:, :-1].contiguous(), d_sums[:, -1].contiguous()
        product, d_streams = d_logits @ fn, torch.empty_like(streams)
        _enter_gradient[(rows, triton.cdiv(dim, _WIDE))](
            streams, dx, product, maps[0].detach(), d_square, d_streams, n, dim, N=tile(n, 1), WIDE=_WIDE
        )
        return d_streams, d_logits.T @ streams.view(rows, -1).float(), d_base, d_scale, None, None, None


@triton.jit
def _dots(streams, dx, d_pre, n, dim, N: tl.constexpr, WIDE: tl.constexpr):
    """One token: dpre_j = X_j . dx."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for first in range(0, dim, WIDE):
        d = first + tl.arange(0, WIDE)
        at, there = (row * n + i)[:, None] * dim + d[None, :], (i < n)[:, None] & (d < dim)[None, :]
        g = tl.load(dx + row * dim + d, mask=d < dim, other=0).to(tl.float32)
        total += tl.sum(tl.load(streams + at, mask=there, other=0).to(tl.float32) * g[None, :], 1)
    tl.store(d_pre + row * n + i, total, mask=i < n)


@triton.jit
def _enter_gradient(streams, dx, product, pre, d_square, out, n, dim, N: tl.constexpr, WIDE: tl.constexpr):
    """dX_j = (fn^T du)_j + pre_j dx + 2 d(v . v) X_j."""
    row, i, d = tl.program_id(0).to(tl.int64), tl.arange(0, N), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    at, there = (row * n + i)[:, None] * dim + d[None, :], (i < n)[:, None] & (d < dim)[None, :]
    g = tl.load(dx + row * dim + d, mask=d < dim, other=0).to(tl.float32)
    value = tl.load(product + at, mask=there, other=0) + tl.load(pre + row * n + i, mask=i < n, other=0)[:, None] * g
    value += 2 * tl.load(d_square + row) * tl.load(streams + at, mask=there, other=0).to(tl.float32)
    tl.store(out + at, cast(value, out.dtype.element_ty), mask=there)


class _Sinkhorn(torch.autograd.Function):
    """logits float32 [rows, n * n] -> comb. The sum of every pass is kept: from the last matrix back, each is its
    successor times its sum (see the reference)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, n: int, iterations: int, eps: float) -> Tensor:
        logits, rows = logits.contiguous(), len(logits)
        out, sums = torch.empty_like(logits), logits.new_empty(rows, 2 * iterations - 1, n)
        _balance[(triton.cdiv(rows, _ITEMS),)](logits, out, sums, rows, n, iterations, eps, B=_ITEMS, N=tile(n, 1))
        ctx.save_for_backward(out, sums)
        ctx.settings = n, iterations, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (out, sums), (n, iterations, eps), rows = ctx.saved_tensors, ctx.settings, len(grads[0])
        found = torch.empty_like(out)
        _balance_gradient[(triton.cdiv(rows, _ITEMS),)](
            out, sums, grads[0].contiguous(), found, rows, n, iterations, eps, B=_ITEMS, N=tile(n, 1)
        )
        return found, None, None, None


_ITEMS = 64  # matrices of a program


@triton.jit
def _balance(logits, out, sums, rows, n, iterations, eps, B: tl.constexpr, N: tl.constexpr):
    item, i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B), tl.arange(0, N)
    line = (item < rows)[:, None] & (i < n)[None, :]
    there = line[:, :, None] & (i < n)[None, None, :]
    cell = (item[:, None, None] * n + i[None, :, None]) * n + i[None, None, :]
    c = tl.load(logits + cell, mask=there, other=-1e30)
    c = tl.where(there, tl.exp(c - tl.max(c, 2)[:, :, None]), 0)
    c = tl.where(there, c / tl.maximum(tl.sum(c, 2), 1)[:, :, None] + eps, 0)  # a sum with its largest term, 1, in it
    total = tl.sum(c, 1) + eps
    at = sums + item[:, None] * (2 * iterations - 1) * n + i[None, :]
    tl.store(at, total, mask=line)
    c /= total[:, None, :]
    for _ in range(iterations - 1):
        total = tl.sum(c, 2) + eps
        tl.store(at + n, total, mask=line)
        c /= total[:, :, None]
        total = tl.sum(c, 1) + eps
        at += 2 * n
        tl.store(at, total, mask=line)
        c /= total[:, None, :]
    tl.store(out + cell, c, mask=there)


@triton.jit
def _balance_gradient(out, sums, grad, found, rows, n, iterations, eps, B: tl.constexpr, N: tl.constexpr):
    """For y = x / s, s = sum(x) + eps: dx = (dy - sum(dy y)) / s and x = y s, pass by pass; then the row softmax."""
    item, i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B), tl.arange(0, N)
    line = (item < rows)[:, None] & (i < n)[None, :]
    there = line[:, :, None] & (i < n)[None, None, :]
    cell = (item[:, None, None] * n + i[None, :, None]) * n + i[None, None, :]
    y, g = tl.load(out + cell, mask=there, other=0), tl.load(grad + cell, mask=there, other=0)
    at = sums + (item[:, None] * (2 * iterations - 1) + 2 * iterations - 2) * n + i[None, :]
    for _ in range(iterations - 1):
        total = tl.load(at, mask=line, other=1)
        g = (g - tl.sum(g * y, 1)[:, None, :]) / total[:, None, :]
        y *= total[:, None, :]
        total = tl.load(at - n, mask=line, other=1)
        g = (g - tl.sum(g * y, 2)[:, :, None]) / total[:, :, None]
        y *= total[:, :, None]
        at -= 2 * n
    total = tl.load(at, mask=line, other=1)
    g = (g - tl.sum(g * y, 1)[:, None, :]) / total[:, None, :]
    y = tl.where(there, y * total[:, None, :] - eps, 0)
    tl.store(found + cell, y * (g - tl.sum(g * y, 2)[:, :, None]), mask=there)
