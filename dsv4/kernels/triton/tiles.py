"""What the kernels share on the device: products, number formats, and a matrix's tiles however it is stored."""
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton import INTERPRETED
from dsv4.numerics import Packed

_INTERPRETED = tl.constexpr(INTERPRETED)  # where tl.dot is wrong for bfloat16, and casts to it cut off
_2_120, _2_126 = tl.constexpr(2.0**120), tl.constexpr(2.0**126)


def stored(weight: Tensor | Packed) -> dict[str, int]:
    """How a matrix is stored, for a kernel. FORM: elements per byte (1 FP8, 2 FP4; 0 plain floats); HIGH, WIDE: the
    block under one scale; K: the inner width of a tile."""
    if isinstance(weight, Tensor):
        return {"FORM": 0, "HIGH": 1, "WIDE": 1, "K": 64}
    high, wide = weight.form.block
    return {"FORM": weight.form.per_byte, "HIGH": high, "WIDE": wide, "K": max(wide, 64)}


def parts(weight: Tensor | Packed) -> tuple[Tensor, Tensor]:
    """A matrix's elements and scales (of a plain one: itself twice)."""
    return (weight, weight) if isinstance(weight, Tensor) else (weight.elements, weight.scale)


def tile(size: int, least: int = 16) -> int:
    """The smallest power of two that holds ``size`` (tl.dot wants at least 16)."""
    return max(triton.next_power_of_2(size), least)


@triton.jit
def dot(a, b, acc):
    """acc + a b, added up in float32; float32 inputs are multiplied as such."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(value, kind: tl.constexpr):
    """float32 -> ``kind``, to nearest, ties to even."""
    if _INTERPRETED and kind == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return value.to(kind)


@triton.jit
def to_e4m3(value, floor):
    """float32 [M, K] rounded to E4M3 under one power of two per row, of which the largest counts as ``floor`` at least;
    to the bit what `numerics.rounded` gives, the sign of zero included."""
    largest = tl.maximum(tl.max(tl.abs(value), 1), floor).to(tl.int32, bitcast=True)
    # The smallest power of two with largest <= 448 * it: 448 = 1.75 * 2^8, so a mantissa above 1.75 needs one more.
    power = ((largest + 0x1FFFFF) >> 23) - 8
    size = tl.abs(value) * ((254 - power) << 23).to(tl.float32, bitcast=True)[:, None]
    # To the nearest multiple of 2^-3 of its own power of two, or of 2^-9 below 2^-6; the sum rounds ties to even.
    own = tl.maximum((size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 2.0**-6)
    push = own * 2.0**20
    return signed(((size + push) - push) * (power << 23).to(tl.float32, bitcast=True)[:, None], value)


@triton.jit
def signed(size, value):
    """A magnitude with the sign of ``value``, both float32."""
    sign = value.to(tl.int32, bitcast=True) & -0x80000000
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(byte):
    """FP8 bytes -> float32: exponent and mantissa moved into place, the exponents' biases made equal by a product."""
    bits = byte.to(tl.int32)
    return ((bits & 128) << 24 | (bits & 127) << 20).to(tl.float32, bitcast=True) * _2_120


@triton.jit
def e2m1(code):
    """FP4 codes int32 -> float32, likewise."""
    return ((code & 8) << 28 | (code & 7) << 22).to(tl.float32, bitcast=True) * _2_126


@triton.jit
def scales(at, seen):
    """Scales as stored (UE8M0 bytes or float32) -> float32."""
    value = tl.load(at, mask=seen, other=0)
    if value.dtype == tl.uint8:
        bits = value.to(tl.int32)
        value = tl.where(bits > 0, bits << 23, 1 << 22).to(tl.float32, bitcast=True)
    return value


@triton.jit
def multiply(
    x, row, w, scale, n, last, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of x times rows n < last of w -> float32 [M, N]: always the same tiles of K, in rising order.

    x: pointers [M] to rows (where ``row`` is False: not read, 0); w, scale: pointers to a matrix of ``width`` columns.
    """
    acc = tl.zeros([M, N], tl.float32)
    inner, seen, n = tl.arange(0, K), n < last, n.to(tl.int64)
    for k in range(0, width, K):
        a = tl.load(x[:, None] + (k + inner)[None, :], mask=row[:, None] & (k + inner < width)[None, :], other=0)
        if FORM == 2:
            pair = k // 2 + tl.arange(0, K // 2)
            there = seen[:, None] & (pair < width // 2)[None, :]
            byte = tl.load(w + n[:, None] * (width // 2) + pair[None, :], mask=there, other=0).to(tl.int32)
            block = k // WIDE + tl.arange(0, K // WIDE)
            columns = (width + WIDE - 1) // WIDE
            factor = scales(scale + n[:, None] * columns + block[None, :], seen[:, None] & (block < columns)[None, :])
            value = tl.reshape(e2m1(tl.join(byte & 15, byte >> 4)), [N, K // WIDE, WIDE]) * factor[:, :, None]
            acc = dot(a, tl.trans(tl.reshape(value, [N, K]).to(a.dtype)), acc)
        else:
            there = seen[:, None] & (k + inner < width)[None, :]
            b = tl.load(w + n[:, None] * width + (k + inner)[None, :], mask=there, other=0)
            if FORM == 1:  # one column of scales per tile
                factor = scales(scale + n // HIGH * ((width + WIDE - 1) // WIDE) + k // WIDE, seen)
                acc += dot(a, tl.trans(e4m3(b).to(a.dtype)), tl.zeros([M, N], tl.float32)) * factor[None, :]
            else:
                acc = dot(a, tl.trans(b), acc)
    return acc
