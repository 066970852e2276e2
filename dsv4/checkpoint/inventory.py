"""Every tensor of a released checkpoint: name, stored shape, stored dtype, in the official layout.

Reproduces the published tensor counts and byte totals exactly. Dtypes are safetensors' names ("BF16", "I8", ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4.config import Config
from dsv4.model.costs import Kind, Tensor, tensors

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}
UNQUANTISED: dict[Kind, str] = {"expert": "BF16", "linear": "BF16", "plain": "BF16", "exact": "F32", "table": "I64"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as it lies in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BYTES[self.dtype]


@dataclass(frozen=True)
class Format:
    """How a quantised matrix is stored: element dtype, elements per byte, rows and columns under one scale."""

    dtype: str
    per_byte: int
    block: tuple[int, int]
    scale: str


# Tensor class -> format. The base releases keep experts in FP8 and write every scale as fp32 (a power of two still).
_FP8 = Format("F8_E4M3", 1, (128, 128), "F8_E8M0")
_FP4 = Format("I8", 2, (1, 32), "F8_E8M0")
_BASE = Format("F8_E4M3", 1, (128, 128), "F32")
QUANTISATION: dict[str | None, dict[Kind, Format]] = {
    "fp4": {"expert": _FP4, "linear": _FP8},
    "fp8": {"expert": _BASE, "linear": _BASE},
    None: {},
}


def inventory(config: Config) -> list[TensorSpec]:
    """The tensors of the release that ``config`` describes: FP4 experts (``expert_dtype`` "fp4"), the FP8 base
    variant ("fp8"), or everything in bf16 and fp32 where the config names no quantisation."""
    formats = QUANTISATION[config.expert_dtype]
    return [spec for tensor in tensors(config) for spec in _stored(tensor, formats.get(tensor.kind))]


def _stored(tensor: Tensor, form: Format | None) -> list[TensorSpec]:
    if form is None:
        return [TensorSpec(tensor.name, tensor.shape, UNQUANTISED[tensor.kind])]
    rows, columns = tensor.shape
    if columns % form.per_byte:
        raise ValueError(f"{tensor.name}: {columns} columns do not pack into {form.dtype}, {form.per_byte} per byte")
    scales = (math.ceil(rows / form.block[0]), math.ceil(columns / form.block[1]))
    return [
        TensorSpec(tensor.name, (rows, columns // form.per_byte), form.dtype),
        TensorSpec(tensor.name.removesuffix("weight") + "scale", scales, form.scale),
    ]
