"""Inference attention and the indexer's choice: every query reads its own rows, where they lie."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.tiles import cast, dot, tile

_HEADS, _ROWS = 16, 32  # attention: heads of a program, rows of a step
_ENTRIES = 64  # index scores of a program
_SCRATCH_FLOATS = 1 << 26  # index scores held at a time: 256 MiB


def attend(
    q: Tensor, near: Tensor, near_from: Tensor, near_to: Tensor, far: Tensor | None,
    low: Tensor | None, high: Tensor | None, picked: tuple[Tensor, Tensor] | None, sink: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `dsv4.kernels.attend`."""
    batch, tokens, heads, dim = q.shape
    q, near, near_from, near_to = (t.contiguous() for t in (q, near, near_from, near_to))
    out, mode, k = torch.empty_like(q), 0, 0
    rows, stride = [near, near_from, near_to], 0  # far rows, and where each query's begin and end
    if far is not None and low is not None and high is not None:
        far = far if far.stride()[1:] == (dim, 1) else far.contiguous()
        rows, stride, mode = [far, low.contiguous(), high.contiguous()], far.stride(0), 1
    if far is not None and picked is not None:
        rows, mode, k = [far, *(t.contiguous() for t in picked)], 2, picked[0].shape[-1]
    grid = (batch * tokens, triton.cdiv(heads, _HEADS))
    _attend[grid](
        q, near, near_from, near_to, *rows, sink, out, scale, tokens, heads, dim, near.shape[1], stride, k,
        MODE=mode, H=_HEADS, N=_ROWS, D=tile(dim),
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    q, near, near_from, near_to, far, far_from, far_to, sink, out, scale, tokens, heads, dim, near_rows, stride, k,
    MODE: tl.constexpr, H: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """MODE 0: window rows only; 1: also far_from <= e < far_to; 2: also the far_to entries that far_from [k] names."""
    t, h, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, D)
    at, there = (t * heads + h)[:, None] * dim + d[None, :], (h < heads)[:, None] & (d < dim)[None, :]
    queries = tl.load(q + at, mask=there, other=0)
    # The sink is a first row of weight 1 and value 0, so the running maximum is finite from the start.
    top = tl.load(sink + h, mask=h < heads, other=0).to(tl.float32)
    total, acc = tl.full([H], 1.0, tl.float32), tl.zeros([H, D], tl.float32)
    near += t // tokens * near_rows * dim
    last = tl.load(near_to + t)
    for first in range(tl.load(near_from + t), last, N):
        r = first + tl.arange(0, N)
        acc, top, total = _read(queries, near, r, r < last, dim, scale, acc, top, total, D)
    far += t // tokens * stride
    if MODE == 1:
        last = tl.load(far_to + t)
        for first in range(tl.load(far_from + t), last, N):
            r = first + tl.arange(0, N)
            acc, top, total = _read(queries, far, r, r < last, dim, scale, acc, top, total, D)
    if MODE == 2:
        count = tl.load(far_to + t)
        for first in range(0, count, N):
            i = first + tl.arange(0, N)
            r = tl.load(far_from + t * k + i, mask=i < count, other=0)
            acc, top, total = _read(queries, far, r, i < count, dim, scale, acc, top, total, D)
    tl.store(out + at, cast(acc / total[:, None], out.dtype.element_ty), mask=there)


@triton.jit
def _read(queries, rows, r, seen, dim, scale, acc, top, total, D: tl.constexpr):
    """Takes rows r (keys and values at once) into the running softmax."""
    d = tl.arange(0, D)
    there = seen[:, None] & (d < dim)[None, :]
    keys = tl.load(rows + r.to(tl.int64)[:, None] * dim + d[None, :], mask=there, other=0)
    z = dot(queries, tl.trans(keys), tl.zeros([queries.shape[0], r.shape[0]], tl.float32)) * scale
    z = tl.where(seen[None, :], z, float("-inf"))
    highest = tl.maximum(top, tl.max(z, 1))
    p, shrink = tl.exp(z - highest[:, None]), tl.exp(top - highest)
    return dot(cast(p, keys.dtype), keys, acc * shrink[:, None]), highest, total * shrink + tl.sum(p, 1)


def choose(q: Tensor, weights: Tensor, keys: Tensor, low: Tensor, high: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `dsv4.kernels.choose`."""
    batch, tokens, heads, dim = q.shape
    q, weights, low, high = q.contiguous(), weights.contiguous(), low.contiguous(), high.contiguous()
    keys = keys if keys.stride()[1:] == (dim, 1) else keys.contiguous()
    count, rows = keys.shape[1], batch * tokens
    chosen = torch.empty(batch, tokens, k, dtype=torch.int32, device=q.device)
    found = torch.empty(batch, tokens, dtype=torch.int32, device=q.device)
    piece = max(_SCRATCH_FLOATS // max(count, 1), 1)
    for first in range(0, rows, piece):
        part = min(piece, rows - first)
        scores = torch.empty(part, count, dtype=torch.float32, device=q.device)
        _score[part, triton.cdiv(count, _ENTRIES)](
            q, weights, keys, low, high, scores, first, tokens, count, heads, dim, keys.stride(0),
            N=_ENTRIES, H=tile(heads), D=tile(dim),
        )  # fmt: skip
        # The k-th largest score; -inf where fewer are visible, and everything visible lies above that.
        least = torch.topk(scores, min(k, count), sorted=False).values.amin(-1)
        _collect[(part,)](scores, least, low, high, chosen, found, first, count, k, N=1024)
    return chosen, found


@triton.jit
def _score(
    q, weights, keys, low, high, scores, first, tokens, count, heads, dim, stride,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """sum_h w_h ReLU(q_h . key_e); -inf for an entry that the query does not see."""
    row = tl.program_id(0).to(tl.int64)
    t, e, h, d = first + row, tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, H), tl.arange(0, D)
    lowest, highest = tl.load(low + t), tl.load(high + t)
    seen = (e >= lowest) & (e < highest)
    value = tl.full([N], float("-inf"), tl.float32)
    if (tl.program_id(1) * N < highest) & (tl.program_id(1) * N + N > lowest):
        at = (t * heads + h)[:, None] * dim + d[None, :]
        queries = tl.load(q + at, mask=(h < heads)[:, None] & (d < dim)[None, :], other=0)
        at = t // tokens * stride + e.to(tl.int64)[:, None] * dim + d[None, :]
        block = tl.load(keys + at, mask=seen[:, None] & (d < dim)[None, :], other=0)
        dots = dot(queries, tl.trans(block), tl.zeros([H, N], tl.float32))
        weight = tl.load(weights + t * heads + h, mask=h < heads, other=0)
        value = tl.where(seen, tl.sum(tl.maximum(dots, 0) * weight[:, None], 0), value)
    tl.store(scores + row * count + e, value, mask=e < count)


@triton.jit
def _collect(scores, least, low, high, chosen, found, first, count, k, N: tl.constexpr):
    """The entries above ``least`` and, lowest first, as many of those equal to it as there is room for."""
    row = tl.program_id(0).to(tl.int64)
    t, edge = first + row, tl.load(least + row)
    begin, end = tl.load(low + t), tl.minimum(tl.load(high + t), count)
    room = k + tl.zeros([], tl.int32)
    for start in range(begin, end, N):
        e = start + tl.arange(0, N)
        value = tl.load(scores + row * count + e, mask=e < end, other=float("-inf"))
        room -= tl.sum((value > edge).to(tl.int32))
    place = tl.zeros([], tl.int32)
    for start in range(begin, end, N):
        e = start + tl.arange(0, N)
        value = tl.load(scores + row * count + e, mask=e < end, other=float("-inf"))
        tied = ((value == edge) & (e < end)).to(tl.int32)
        take = (value > edge) | ((tied > 0) & (tl.cumsum(tied, 0) <= room))
        one = take.to(tl.int32)
        tl.store(chosen + t * k + place + tl.cumsum(one, 0) - 1, e.to(tl.int32), mask=take)
        place += tl.sum(one)
        room -= tl.sum(tied)
    tl.store(found + t, place)
