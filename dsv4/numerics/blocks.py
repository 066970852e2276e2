"""Block quantisation: float -> (elements, scales) and exactly back.

Elements and UE8M0 scales are raw bytes (uint8), so that casting a model's dtype cannot touch them; FP4 holds two
elements a byte, the even one in the low nibble. Blocks at the edges of a matrix may be smaller than the format's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.numerics.formats import Format

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitude of each 3-bit code; bit 3 is the sign."""
_SIGNED = torch.cat((E2M1, -E2M1))
_PAIRS = torch.stack((_SIGNED.repeat(16), _SIGNED.repeat_interleave(16)), -1)  # byte -> its low, its high element
# Midpoints between magnitudes. One that ties to the upper, even code is put just below itself: what lies above counts.
_MIDDLE = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_MIDDLE[1::2] = torch.nextafter(_MIDDLE[1::2], torch.zeros(3))


def scale_bytes(amax: Tensor, form: Format) -> Tensor:
    """Block maxima float32 -> UE8M0 bytes uint8: the smallest power of two with amax <= largest * scale, which is
    2^ceil(log2(max(amax, floor) / largest)) without its rounding. ValueError for a maximum that is not finite."""
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("cannot quantise values that are not finite")
    mantissa, exponent = torch.frexp(amax.clamp(min=form.floor))
    top, bits = math.frexp(form.largest)
    exponent = exponent - bits + (mantissa > top)
    return (exponent + 127).clamp(0, 254).to(torch.uint8)


def scale_values(scale: Tensor) -> Tensor:
    """Scales as stored (UE8M0 bytes as uint8 or float8_e8m0fnu, or float32) -> float32. ValueError for NaN (byte 255),
    and for what no scale can be: infinite, zero or negative."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = scale.view(torch.uint8)
        if bool((scale == 255).any()):
            raise ValueError(f"{int((scale == 255).sum())} of {scale.numel()} scales are NaN (UE8M0 byte 255)")
        # Exponent bits of a float32; 2^-127 alone is a subnormal one.
        return torch.where(scale > 0, scale.to(torch.int32) << 23, 1 << 22).view(torch.float32)
    if scale.dtype != torch.float32:
        raise ValueError(f"scales must be UE8M0 bytes or float32, got {scale.dtype}")
    if wrong := int((~(torch.isfinite(scale) & (scale > 0))).sum()):
        raise ValueError(f"{wrong} of {scale.numel()} scales are not positive numbers")
    return scale


def quantise(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """x [..., rows, columns] float -> elements uint8 (`Format.packed`), scales (`Format.scales`) uint8 or float32.

    Round to nearest, ties to even, in float32. ValueError where x is not finite or its columns do not pack.
    """
    form.packed(tuple(x.shape))
    amax = _per_block(x, form)
    scale = scale_bytes(amax, form)
    scaled = _times(x.float(), scale_values(254 - scale), form)  # 2^-e is exact, and so is the product
    scaled = scaled.clamp_(-form.largest, form.largest)
    elements = encode_e2m1(scaled) if form.per_byte == 2 else scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return elements, scale if form.scale == "F8_E8M0" else scale_values(scale)


def dequantise(elements: Tensor, scale: Tensor, form: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse, exact: elements and scales as stored -> [..., rows, columns] of ``dtype``.

    ValueError for NaN scales, NaN elements, or scales of the wrong shape. (In bfloat16 an FP8 element under a scale
    below 2^-117 may fall below its smallest number.)
    """
    values = check(elements, scale, form)
    elements = elements.view(torch.uint8)
    if form.per_byte == 2:
        out = _PAIRS.to(elements.device, dtype)[elements.int()].flatten(-2)
    else:
        out = elements.view(torch.float8_e4m3fn).to(dtype)
    return _times(out, values.to(dtype), form)


def check(elements: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Float32 scales of sound ``elements``. ValueError for NaN scales, NaN elements or scales of the wrong shape."""
    elements = elements.view(torch.uint8)
    expected = form.scales((*elements.shape[:-1], elements.shape[-1] * form.per_byte))
    if tuple(scale.shape) != expected:
        raise ValueError(f"scales of shape {list(scale.shape)}, expected {list(expected)}")
    if form.per_byte == 1 and (wrong := int((elements & 127 == 127).sum())):
        raise ValueError(f"{wrong} of {elements.numel()} elements are NaN")
    return scale_values(scale)


def rounded(x: Tensor, form: Format) -> Tensor:
    """What is left of x after a round trip through ``form``, in x's dtype; any shape, blocks along the last axis."""
    return dequantise(*quantise(x.reshape(-1, x.shape[-1]), form), form, x.dtype).view_as(x)


def encode_e2m1(x: Tensor) -> Tensor:
    """x [..., columns] within +-6 -> packed codes uint8 [..., columns / 2], ties to even; the sign of zero is kept."""
    codes = torch.bucketize(x.abs(), _MIDDLE.to(x.device), out_int32=True).to(torch.uint8)
    codes |= torch.signbit(x).to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _whole(x: Tensor, form: Format) -> bool:
    return x.shape[-2] % form.block[0] == 0 and x.shape[-1] % form.block[1] == 0


def _per_block(x: Tensor, form: Format) -> Tensor:
    """Largest magnitude of every block, float32."""
    (rows, columns), (high, wide) = x.shape[-2:], form.block
    if not _whole(x, form):
        x = torch.nn.functional.pad(x, (0, -columns % wide, 0, -rows % high))
    return x.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).abs().amax((-3, -1)).float()


def _times(x: Tensor, scale: Tensor, form: Format) -> Tensor:
    """x * its block's scale, in x's dtype; x is overwritten where it may be."""
    if _whole(x, form):
        blocks = x.unflatten(-1, (-1, form.block[1])).unflatten(-3, (-1, form.block[0]))
        return (blocks * scale[..., :, None, :, None]).view(x.shape)
    full = scale.repeat_interleave(form.block[0], -2).repeat_interleave(form.block[1], -1)
    return x * full[..., : x.shape[-2], : x.shape[-1]]
