"""A few tokens around their attention through ``decode.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call
from dsv4.kernels.cpu.linear import packed_usable, powers
from dsv4.numerics import Packed

_FEW = 4  # rows


def usable(x: Tensor, *weights: object) -> bool:
    """A few bfloat16 rows, and FP8 weights that `packed_usable` takes."""
    packed = [w for w in weights if isinstance(w, Packed) and w.form.per_byte == 1]
    few = x.dtype == torch.bfloat16 and 0 < x.shape[:-1].numel() <= _FEW
    return few and len(packed) == len(weights) and packed_usable(x, *packed)


def _table(angles: Tensor) -> Tensor:
    return torch.view_as_real(angles.resolve_conj()).contiguous()


def attention_inputs(
    h: Tensor, wq_a: Packed, q_norm: Tensor, wq_b: Packed, wkv: Packed, kv_norm: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dsv4.kernels.attention_inputs`."""
    (rank, width), dim = wq_a.shape, wkv.shape[0]
    h, heads, lead = h.contiguous(), wq_b.shape[0] // dim, h.shape[:-1]
    latent, q, kv = h.new_empty(*lead, rank), h.new_empty(*lead, heads, dim), h.new_empty(*lead, dim)
    a, b, c = ((w.elements, powers(w)) for w in (wq_a, wq_b, wkv))
    sizes = (lead.numel(), width, rank, heads, dim, angles.shape[-1])
    norms = q_norm.float(), kv_norm.float()
    call("attention_inputs", h.dtype, h, *a, norms[0], *b, *c, norms[1], _table(angles), latent, q, kv, *sizes, eps)
    return latent, q, kv


def index_queries(
    h: Tensor, latent: Tensor, wq_b: Packed, proj: Tensor, angles: Tensor, size: float
) -> tuple[Tensor, Tensor]:
    """See `dsv4.kernels.index_queries`."""
    (heads, width), (out, rank), lead = proj.shape, wq_b.shape, h.shape[:-1]
    h, latent, dim = h.contiguous(), latent.contiguous(), out // heads
    q, weights = h.new_empty(*lead, heads, dim), torch.empty(*lead, heads)
    sizes = (lead.numel(), width, rank, heads, dim, angles.shape[-1])
    matrices = wq_b.elements, powers(wq_b), proj
    call("index_queries", h.dtype, h, latent, *matrices, _table(angles), q, weights, *sizes, size)
    return q, weights


def attention_output(o: Tensor, wo_a: Packed, wo_b: Packed, angles: Tensor, groups: int) -> Tensor:
    """See `dsv4.kernels.attention_output`."""
    o, (*lead, heads, dim) = o.contiguous(), o.shape
    out = o.new_empty(*lead, wo_b.shape[0])
    a, b = ((w.elements, powers(w)) for w in (wo_a, wo_b))
    sizes = (out.numel() // wo_b.shape[0], heads, dim, angles.shape[-1], groups, wo_a.shape[0] // groups, wo_b.shape[0])
    call("attention_output", o.dtype, o, _table(angles), *a, *b, out, *sizes)
    return out
