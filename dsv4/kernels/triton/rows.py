"""Cache rows in low precision, rounded to what a cache gives back."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.tiles import cast, signed, to_e4m3
from dsv4.numerics import INDEX_ROW, KV_ROW

_TILE = 1024  # elements of a program


def kv_row(x: Tensor, rope: int) -> Tensor:
    """See `numerics.kv_row`; here values that are not finite are not looked for (the host would have to wait)."""
    x = x.contiguous()
    y, width, block = torch.empty_like(x), x.shape[-1], KV_ROW.block[1]
    blocks = triton.cdiv(width, block)
    count, size = x.numel() // width * blocks, _TILE // block
    grid = (triton.cdiv(count, size),)
    _kv_row[grid](x, y, count, width, width - rope, blocks, KV_ROW.floor, M=size, K=block)
    return y


@triton.jit
def _kv_row(x, y, count, width, split, blocks, floor, M: tl.constexpr, K: tl.constexpr):
    """Blocks of K channels; those from ``split`` on stay as they are, and a block may hold both kinds."""
    item = tl.program_id(0) * M + tl.arange(0, M)
    channel = (item % blocks)[:, None] * K + tl.arange(0, K)[None, :]
    at, there = (item // blocks).to(tl.int64)[:, None] * width + channel, (item < count)[:, None] & (channel < width)
    own = tl.load(x + at, mask=there, other=0)
    value = to_e4m3(tl.where(channel < split, own, 0).to(tl.float32), floor)
    tl.store(y + at, tl.where(channel < split, cast(value, y.dtype.element_ty), own), mask=there)


def index_row(x: Tensor) -> Tensor:
    """See `numerics.index_row`; here values that are not finite are not looked for (the host would have to wait)."""
    x = x.contiguous()
    y, width, block = torch.empty_like(x), x.shape[-1], INDEX_ROW.block[1]
    assert not width & (width - 1) and width % block == 0, width
    rows, size = x.numel() // width, max(_TILE // width, 1)
    grid = (triton.cdiv(rows, size),)
    _index_row[grid](x, y, rows, width**-0.5, INDEX_ROW.floor, M=size, N=width, STAGES=width.bit_length() - 1, B=block)
    return y


@triton.jit
def _index_row(
    x, y, rows, factor, floor, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Sums and differences of channels N/2, N/4 ... 1 apart, then E2M1 under a power of two per block."""
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    at, there = m[:, None] * N + tl.arange(0, N)[None, :], (m < rows)[:, None]
    value = tl.load(x + at, mask=there, other=0).to(tl.float32)
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(value, [M << stage, 2, N >> (stage + 1)])
        even, odd = tl.split(tl.permute(pairs, (0, 2, 1)))
        value = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), [M, N])
    value = cast(value * factor, y.dtype.element_ty).to(tl.float32)
    value = tl.reshape(value, [M * N // B, B])
    largest = tl.maximum(tl.max(tl.abs(value), 1), floor).to(tl.int32, bitcast=True)
    # The smallest power of two with largest <= 6 * it: 6 = 1.5 * 2^2, so a mantissa above 1.5 needs one more.
    power = ((largest + 0x3FFFFF) >> 23) - 2
    small = value * ((254 - power) << 23).to(tl.float32, bitcast=True)[:, None]
    size = tl.abs(small)
    # To the nearest multiple of a half, of 1 from 2 on, of 2 from 4 on; the sum rounds ties to even.
    push = tl.where(size < 2, 2.0**22, tl.where(size < 4, 2.0**23, 2.0**24))
    size = ((size + push) - push) * (power << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(y + at, cast(tl.reshape(signed(size, value), [M, N]), y.dtype.element_ty), mask=there)
