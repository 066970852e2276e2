"""The routed experts of a layer: one launch per product, every tile with rows of one expert."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.linear import height, rounded
from dsv4.kernels.triton.tiles import cast, multiply, parts, stored
from dsv4.numerics import Packed

_WIDE = 64  # outputs of a tile


def routed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float
) -> Tensor:
    """See the reference of the same name."""
    return _experts(x.contiguous(), experts, weights, w1, w2, w3, limit)


def packed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Packed, w2: Packed, w3: Packed, limit: float
) -> Tensor:
    """See `numerics.packed_experts`."""
    return _experts(rounded(x), experts, weights, w1, w2, w3, limit, x.dtype)


def _experts(
    x: Tensor, experts: Tensor, weights: Tensor,
    w1: Tensor | Packed, w2: Tensor | Packed, w3: Tensor | Packed, limit: float, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    count, inner, dim = w1.shape
    (rows, choices), dtype = experts.shape, dtype or x.dtype
    size = height(rows * choices / count)
    order, owner, start, end = _tiles(experts.flatten(), count, size)
    hidden, out = (x.new_empty(rows * choices, width, dtype=dtype) for width in (inner, dim))
    common = {"M": size, "N": _WIDE, **stored(w1)}
    grid = (len(owner), triton.cdiv(inner, _WIDE))
    _enter[grid](
        x, *parts(w1), *parts(w3), weights.contiguous(), hidden, order, owner, start, end, *_sizes(w1),
        choices, inner, dim, limit, **common,
    )  # fmt: skip
    h = rounded(hidden) if isinstance(w2, Packed) else hidden
    grid = (len(owner), triton.cdiv(dim, _WIDE))
    _leave[grid](h, *parts(w2), out, order, owner, start, end, *_sizes(w2), dim, inner, **common)
    total = torch.empty(rows, dim, dtype=torch.float32, device=x.device)
    _add_up[(rows, triton.cdiv(dim, 1024))](out, total, choices, dim, 1024)
    return total


def _sizes(stack: Tensor | Packed) -> list[int]:
    """Elements of storage and scales of one matrix."""
    return [part[0].numel() for part in parts(stack)]


def _tiles(owner: Tensor, count: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """owner int64 [n]: the expert of each (token, choice) -> their order by expert [n], and for each of enough tiles of
    ``size`` rows: its expert (-1: nothing to do), where its rows begin and end in that order. The host never waits."""
    order = owner.argsort(stable=True)
    sizes = owner.new_zeros(count).scatter_add_(0, owner, torch.ones_like(owner))
    tiles = (sizes + size - 1) // size
    last, last_tile = sizes.cumsum(0), tiles.cumsum(0)
    number = torch.arange(len(owner) // size + min(count, len(owner)), device=owner.device)
    e = torch.searchsorted(last_tile, number, right=True).clamp_(max=count - 1)
    start = last[e] - sizes[e] + (number - last_tile[e] + tiles[e]) * size
    return order, e.where(number < last_tile[-1], -1), start, last[e]


@triton.jit
def _enter(
    x, w1, scale1, w3, scale3, weights, hidden, order, owner, start, end, size, scale_size, choices, inner, dim, limit,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """hidden = weight * silu(min(W1 x, limit)) * clamp(W3 x, -limit, limit)."""
    e = tl.load(owner + tl.program_id(0))
    if e < 0:
        return
    item, seen = _items(order, start, end, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    row = x + item // choices * dim
    kind: tl.constexpr = hidden.dtype.element_ty
    gate = multiply(row, seen, w1 + e * size, scale1 + e * scale_size, n, inner, dim, M, N, K, FORM, HIGH, WIDE)
    up = multiply(row, seen, w3 + e * size, scale3 + e * scale_size, n, inner, dim, M, N, K, FORM, HIGH, WIDE)
    gate, up = tl.minimum(cast(gate, kind).to(tl.float32), limit), cast(up, kind).to(tl.float32)
    value = gate * tl.sigmoid(gate) * tl.minimum(tl.maximum(up, -limit), limit)
    value *= tl.load(weights + item, mask=seen, other=0)[:, None]
    there = seen[:, None] & (n < inner)[None, :]
    tl.store(hidden + item[:, None] * inner + n[None, :], cast(value, kind), mask=there)


@triton.jit
def _leave(
    h, w2, scale2, out, order, owner, start, end, size, scale_size, dim, inner,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = W2 h, a row for each (token, choice)."""
    e = tl.load(owner + tl.program_id(0))
    if e < 0:
        return
    item, seen = _items(order, start, end, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    w2, scale2 = w2 + e * size, scale2 + e * scale_size
    value = multiply(h + item * inner, seen, w2, scale2, n, dim, inner, M, N, K, FORM, HIGH, WIDE)
    at = out + item[:, None] * dim + n[None, :]
    tl.store(at, cast(value, out.dtype.element_ty), mask=seen[:, None] & (n < dim)[None, :])


@triton.jit
def _items(order, start, end, M: tl.constexpr):
    """The (token, choice) numbers int64 [M] of this program's tile, and which of them are there."""
    i = tl.load(start + tl.program_id(0)) + tl.arange(0, M)
    seen = i < tl.load(end + tl.program_id(0))
    return tl.load(order + i, mask=seen, other=0), seen


@triton.jit
def _add_up(out, total, choices, dim, N: tl.constexpr):
    """A token's choices, added in their order."""
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    value = tl.zeros([N], tl.float32)
    for i in range(choices):
        value += tl.load(out + (token * choices + i) * dim + n, mask=n < dim, other=0).to(tl.float32)
    tl.store(total + token * dim + n, value, mask=n < dim)
