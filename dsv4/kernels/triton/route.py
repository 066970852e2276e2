"""The router after its product: a row stays in registers from its logits to its weights."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.tiles import tile


def route(
    logits: Tensor, bias: Tensor | None, fixed: Tensor | None, k: int, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dsv4.kernels.route`. Affinities are those of the reference, rounded once from float64 (whose exponential may
    differ in its last bit); weights are added up in the experts' order."""
    logits, (rows, count) = logits.contiguous(), logits.shape
    scores, weights = torch.empty_like(logits), logits.new_empty(rows, k)
    experts = torch.empty(rows, k, dtype=torch.int64, device=logits.device) if fixed is None else fixed.contiguous()
    given = logits if bias is None else bias.float().contiguous()  # not read where experts are given
    _route[(rows,)](
        logits, given, scores, experts, weights, count, k, factor, FIXED=fixed is not None, E=tile(count), K=tile(k, 1)
    )
    return experts, weights, scores


@triton.jit
def _route(
    logits, bias, scores, experts, weights, count, k, factor, FIXED: tl.constexpr, E: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    row, e, i = tl.program_id(0).to(tl.int64), tl.arange(0, E), tl.arange(0, K)
    x = tl.load(logits + row * count + e, mask=e < count, other=0).to(tl.float64)
    score = tl.sqrt(_softplus(x)).to(tl.float32)
    tl.store(scores + row * count + e, score, mask=e < count)
    value, left = score, e < count
    if not FIXED:
        value += tl.load(bias + e, mask=left, other=0)
    weight, total = tl.zeros([K], tl.float32), tl.zeros([], tl.float32)
    for j in range(k):
        if FIXED:
            best = tl.load(experts + row * k + j).to(tl.int32)
        else:  # the lowest number first among equals, each once
            top = tl.max(tl.where(left, value, float("-inf")), 0)
            best = tl.min(tl.where(left & (value == top), e, E), 0)
            left = left & (e != best)
            tl.store(experts + row * k + j, best.to(tl.int64))
        own = tl.sum(tl.where(e == best, score, 0), 0)
        weight, total = tl.where(i == j, own, weight), total + own
    tl.store(weights + row * k + i, weight / total * factor, mask=i < k)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), float64; x itself above 20, as torch has it. What 1 + exp(x) rounds away is multiplied back."""
    small = tl.exp(tl.minimum(x, 20))
    whole = 1 + small
    return tl.where(x > 20, x, tl.where(whole > 1, tl.log(whole) * small / tl.maximum(whole - 1, 1e-300), small))
