"""What a cache holds in low precision (model card B.8, D.1): KV rows and index rows, rounded or as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.numerics.blocks import dequantise, quantise, rounded
from dsv4.numerics.formats import INDEX_ROW, KV_ROW, Format

_ALIGNMENT = 8  # a KV row's scales are padded to whole words: 448 + 128 + 7 + 1 = 584 bytes


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last axis, orthonormal (factor n^-0.5), natural order, in float32; its own
    inverse. ValueError unless the axis is a power of two."""
    n = x.shape[-1]
    if n & (n - 1) or not n:
        raise ValueError(f"the Hadamard transform needs a power of two, got {n} channels")
    out, half = x.float(), n // 2
    while half:
        pairs = out.unflatten(-1, (-1, 2, half))
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.stack((even + odd, even - odd), -2).flatten(-3)
        half //= 2
    return (out * n**-0.5).to(x.dtype)


def kv_row(x: Tensor, rope: int) -> Tensor:
    """KV rows [..., d] after rotation -> what an FP8 cache gives back: all but the last ``rope`` channels in E4M3
    blocks of 64. Window rows and compressed entries alike."""
    if rope == x.shape[-1]:
        return x
    return torch.cat((rounded(x[..., : x.shape[-1] - rope], KV_ROW), x[..., x.shape[-1] - rope :]), -1)


def index_row(x: Tensor) -> Tensor:
    """Index queries or keys [..., d] after rotation -> Hadamard-transformed and rounded to FP4 in blocks of 32. Both
    sides are transformed, so without the rounding their dot products are unchanged."""
    return rounded(hadamard(x), INDEX_ROW)


def pack_kv(x: Tensor, rope: int) -> Tensor:
    """KV rows [..., d] -> bytes uint8 [..., n]: E4M3 elements, rotated channels in bf16, scales, padding (584 for the
    released 512 + 64)."""
    split = x.shape[-1] - rope
    rows = x.reshape(-1, x.shape[-1])
    elements, scale = quantise(rows[:, :split], KV_ROW)
    tail = rows[:, split:].to(torch.bfloat16).contiguous().view(torch.uint8)
    pad = scale.new_zeros(len(rows), -scale.shape[1] % _ALIGNMENT)
    return torch.cat((elements, tail, scale, pad), 1).view(*x.shape[:-1], -1)


def unpack_kv(data: Tensor, d: int, rope: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse of `pack_kv`: equal to the bit to `kv_row` of bf16 rows."""
    split, rows = d - rope, data.reshape(-1, data.shape[-1])
    scales = KV_ROW.scales((len(rows), split))[1]
    elements, tail, scale, _ = rows.split((split, 2 * rope, scales, rows.shape[1] - split - 2 * rope - scales), 1)
    head = dequantise(elements.contiguous(), scale, KV_ROW, dtype)
    return torch.cat((head, tail.contiguous().view(torch.bfloat16).to(dtype)), 1).view(*data.shape[:-1], d)


def pack_index(x: Tensor) -> Tensor:
    """Index keys [..., d] before the transform -> bytes [..., d / 2 + d / 32]: E2M1 pairs, then scales (68 for 128)."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.cat(quantise(hadamard(rows), INDEX_ROW), 1).view(*x.shape[:-1], -1)


def unpack_index(data: Tensor, d: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse of `pack_index`: equal to the bit to `index_row`."""
    form: Format = INDEX_ROW
    rows = data.reshape(-1, data.shape[-1])
    elements, scale = rows.split((d // form.per_byte, rows.shape[1] - d // form.per_byte), 1)
    return dequantise(elements.contiguous(), scale, form, dtype).view(*data.shape[:-1], d)
