"""The pooling of a compressor: per channel a softmax over the slots of an entry."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.tiles import tile

_WIDE = 64  # channels of a program


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
