"""Every tensor of a released checkpoint: name, stored shape, stored dtype, in the official layout.

Reproduces the published tensor counts and byte totals exactly. Dtypes are safetensors' names ("BF16", "I8", ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4.config import Config
from dsv4.model.costs import Kind, Tensor, tensors
from dsv4.numerics import RELEASES, Format

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


def inventory(config: Config) -> list[TensorSpec]:
    """The tensors of the release that ``config`` describes: FP4 experts (``expert_dtype`` "fp4"), the FP8 base
    variant ("fp8"), or everything in bf16 and fp32 where the config names no quantisation."""
    formats = RELEASES[config.expert_dtype]
    return [spec for tensor in tensors(config) for spec in stored_as(tensor, formats.get(tensor.kind))]


def stored_as(tensor: Tensor, form: Format | None) -> list[TensorSpec]:
    """The one or, where it is quantised, two tensors of a file that hold ``tensor``: elements, then scales."""
    if form is None:
        return [TensorSpec(tensor.name, tensor.shape, UNQUANTISED[tensor.kind])]
    return [
        TensorSpec(tensor.name, form.packed(tensor.shape), form.dtype),
        TensorSpec(scale_name(tensor.name), form.scales(tensor.shape), form.scale),
    ]


def scale_name(name: str) -> str:
    """``x.weight`` -> ``x.scale``."""
    return name.removesuffix("weight") + "scale"
