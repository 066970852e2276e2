"""Which tensor class is stored how: the one table of number formats, block shapes and scale formats.

Dtypes are safetensors' names. A scale multiplies (value = element * scale) and is a power of two in every release:
one UE8M0 byte (2^(byte - 127), 255 is NaN), or float32 in the two Base models.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Format:
    """How a matrix [.., rows, columns] is quantised: element dtype, elements per byte, the block under one scale, the
    scale's dtype, the largest element, and the smallest magnitude that a block's maximum counts as."""

    dtype: str
    per_byte: int
    block: tuple[int, int]
    scale: str
    largest: float
    floor: float

    def packed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in bytes of the stored elements of a matrix of ``shape``. ValueError where they do not pack."""
        if shape[-1] % self.per_byte:
            raise ValueError(f"{shape[-1]} columns do not pack into {self.dtype}, {self.per_byte} per byte")
        return (*shape[:-1], shape[-1] // self.per_byte)

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a matrix of ``shape``; blocks at the edges may be partly empty."""
        rows, columns = shape[-2:]
        return (*shape[:-2], ceil(rows / self.block[0]), ceil(columns / self.block[1]))


_E4M3, _E2M1 = 448.0, 6.0
_TINY = 2.0**-126  # the smallest normal float32: no block gets a scale below it

FP8 = Format("F8_E4M3", 1, (128, 128), "F8_E8M0", _E4M3, _E4M3 * _TINY)
FP4 = Format("I8", 2, (1, 32), "F8_E8M0", _E2M1, _E2M1 * _TINY)
FP8_BASE = Format("F8_E4M3", 1, (128, 128), "F32", _E4M3, _E4M3 * _TINY)

RELEASES: dict[str | None, dict[str, Format]] = {
    "fp4": {"expert": FP4, "linear": FP8},
    "fp8": {"expert": FP8_BASE, "linear": FP8_BASE},
    None: {},
}
"""expert_dtype of a release -> tensor class (`dsv4.model.costs.Kind`) -> format. Other classes are not quantised."""

STORED = {("I8", "F8_E8M0"): FP4, ("F8_E4M3", "F8_E8M0"): FP8, ("F8_E4M3", "F32"): FP8_BASE}
"""(dtype of the elements, dtype of the scales) in a file -> format."""

# At run time (model card B.8): inputs of quantised linears, cache rows (their channels without position), index rows.
ACTIVATION = Format("F8_E4M3", 1, (1, 128), "F8_E8M0", _E4M3, 1e-4)
KV_ROW = Format("F8_E4M3", 1, (1, 64), "F8_E8M0", _E4M3, 1e-4)
INDEX_ROW = FP4
