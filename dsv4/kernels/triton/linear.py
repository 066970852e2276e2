"""Linear layers on FP8 and FP4 weights as they are stored, and their inputs' rounding to FP8."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton import EXACT
from dsv4.kernels.triton.tiles import cast, multiply, parts, stored, tile, to_e4m3
from dsv4.numerics import ACTIVATION, Packed


def wide(out: int) -> int:
    """Outputs of a tile: so few that a narrow matrix still keeps the device's 100 or so processors busy."""
    return max(16, min(64, out // 128 & -16))


def height(rows: float) -> int:
    """Rows of a tile: few while decoding, where reading weights is the cost; many when there are many, unless results
    must be the same to the bit in every batch."""
    return 64 if rows > 32 and not EXACT else 16


def packed_linear(x: Tensor, weight: Packed) -> Tensor:
    """See `numerics.packed_linear`. A rounded input is exact in bfloat16, and so is every product in float32."""
    return _multiply(rounded(x).unsqueeze(-2), weight, x.dtype).squeeze(-2)


def grouped_linear(x: Tensor, weight: Tensor | Packed, wide: bool = False) -> Tensor:
    """x [..., G, in], weight [G * out, in] -> [..., G, out]; float32 when ``wide``. The input is not rounded."""
    return _multiply(x.contiguous(), weight, torch.float32 if wide else x.dtype)


def linear(x: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; float32 when ``wide``. For DSV4_EXACT: torch's own is faster."""
    return grouped_linear(x.unsqueeze(-2), weight.contiguous(), wide).squeeze(-2)


def _multiply(x: Tensor, weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    groups, width, out = *x.shape[-2:], weight.shape[0] // x.shape[-2]
    rows = x.numel() // (groups * width)
    y, size, many = x.new_empty(*x.shape[:-1], out, dtype=dtype), height(rows), tile(wide(out * groups))
    grid = (triton.cdiv(rows, size), triton.cdiv(out, many), groups)
    _linear[grid](x, *parts(weight), y, rows, out, width, M=size, N=many, **stored(weight))
    return y


@triton.jit
def _linear(
    x, w, scale, y, rows, out, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    g, groups = tl.program_id(2), tl.num_programs(2)
    row, there = m * groups + g, (m < rows)[:, None] & (n < out)[None, :]
    acc = multiply(x + row * width, m < rows, w, scale, g * out + n, g * out + out, width, M, N, K, FORM, HIGH, WIDE)
    tl.store(y + row[:, None] * out + n[None, :], cast(acc, y.dtype.element_ty), mask=there)


def rounded(x: Tensor) -> Tensor:
    """`numerics.rounded(x, ACTIVATION)`, as bfloat16 (exact): E4M3 under one power of two per 128 channels."""
    x = x.contiguous()
    width, block = x.shape[-1], ACTIVATION.block[1]
    y, blocks = torch.empty_like(x, dtype=torch.bfloat16), triton.cdiv(width, block)
    count = x.numel() // width * blocks
    _round[(triton.cdiv(count, 16),)](x, y, count, width, blocks, ACTIVATION.floor, M=16, K=block)
    return y


@triton.jit
def _round(x, y, count, width, blocks, floor, M: tl.constexpr, K: tl.constexpr):
    item = tl.program_id(0) * M + tl.arange(0, M)
    channel = (item % blocks)[:, None] * K + tl.arange(0, K)[None, :]
    there = (item < count)[:, None] & (channel < width)
    at = (item // blocks).to(tl.int64)[:, None] * width + channel
    value = tl.load(x + at, mask=there, other=0).to(tl.float32)
    tl.store(y + at, to_e4m3(value, floor).to(tl.bfloat16), mask=there)
