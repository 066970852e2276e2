"""FP4 -> FP8 without loss (report 5.2.1): the fine FP4 scales move into the E4M3 elements.

E4M3 holds 2^k times every E2M1 value exactly for k = -8 .. 6. Putting a 128 x 128 block's largest FP4 scale at 2^6
(the released converter's choice, and the best one) is therefore exact while the block's scales differ by at most
2^14; putting the smallest at 2^0 only while they differ by at most 2^6. Scales whose 32 elements are all zero do not
count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4.numerics.blocks import dequantise, scale_values
from dsv4.numerics.formats import FP4, FP8, Format

REACH = {"largest": 14, "smallest": 6}
"""Anchor -> log2 of the largest ratio of FP4 scales in one block that is exact."""


@dataclass(frozen=True)
class Recast:
    """FP8 elements and scales, log2 of the largest ratio of FP4 scales met in one block, and whether no value changed
    (always so up to `REACH`, rarely beyond)."""

    elements: Tensor
    scale: Tensor
    ratio: int
    exact: bool


def recast(
    elements: Tensor, scale: Tensor, anchor: Literal["largest", "smallest"] = "largest", form: Format = FP8
) -> Recast:
    """A packed FP4 matrix [..., rows, columns / 2] with its scales -> FP8 in blocks of ``form``. ValueError as in
    `dequantise`, or where no UE8M0 scale reaches the anchor."""
    values = scale_values(scale)
    shape = (*elements.shape[:-1], elements.shape[-1] * FP4.per_byte)
    columns = form.block[1] // FP4.block[1]  # FP4 scales per FP8 block, along the columns
    used = dequantise(elements, torch.full_like(scale, 127), FP4, torch.bfloat16)
    used = torch.nn.functional.pad(used, (0, -shape[-1] % FP4.block[1]))
    live = used.unflatten(-1, (-1, FP4.block[1])).ne(0).any(-1)
    exponent = torch.frexp(values)[1] - 1
    blocks = _blocked(exponent.masked_fill(~live, -999), form.block[0], columns, -999)
    high = blocks.amax((-3, -1))
    low = _blocked(exponent.masked_fill(~live, 999), form.block[0], columns, 999).amin((-3, -1))
    high, low = high.where(high > -999, 0), low.where(low < 999, 0)
    base = high - 6 if anchor == "largest" else low
    if int(base.min()) < -127 or int(base.max()) > 127:
        raise ValueError(f"FP8 scales would be 2^{int(base.min())}..2^{int(base.max())}, outside UE8M0")
    byte = (base + 127).to(torch.uint8)
    whole = dequantise(elements, scale, FP4)
    wide = base.repeat_interleave(form.block[0], -2).repeat_interleave(form.block[1], -1)
    wide = wide[..., : shape[-2], : shape[-1]]
    new = torch.ldexp(whole, -wide).clamp(-form.largest, form.largest).to(torch.float8_e4m3fn).view(torch.uint8)
    stored = byte if form.scale == "F8_E8M0" else scale_values(byte)
    exact = torch.equal(dequantise(new, stored, form), whole)
    return Recast(new, stored, int((high - low).max()), exact)


def _blocked(x: Tensor, rows: int, columns: int, fill: int) -> Tensor:
    """[..., R, C] -> [..., R / rows, rows, C / columns, columns], the edges filled up."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows), value=fill)
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
