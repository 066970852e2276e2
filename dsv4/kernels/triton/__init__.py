"""Triton kernels for one CUDA device: the names and signatures of the reference.

Importing this package imports nothing of triton: a module loads when its first kernel is asked for. Hyper-connections
and rotations also have a backward; the others do not, and where gradients are wanted the plain torch reference runs.
Tiles and orders of addition are fixed: with DSV4_EXACT a row's result is the same to the bit in every batch; without
it, matrix products with many rows take taller tiles. No autotuning, nothing that could change a result from run to run.

Legend: M rows, N outputs or entries, K inner width, H heads, D head_dim or hidden size, as tile sizes (powers of two).
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

EXACT = os.environ.get("DSV4_EXACT", "0") not in ("", "0")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels on the CPU, slowly: for tests (with DSV4_KERNELS=triton, through the model)."""
_MODULES = "attend compress experts hyper_connections linear norm route rows sample".split()


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


@cache
def _device() -> str | None:
    """The kind of device the kernels run on here, or None."""
    wanted = os.environ.get("DSV4_KERNELS", "")
    if wanted == "reference" or find_spec("triton") is None:
        return None
    if INTERPRETED:
        return "cpu" if wanted == "triton" else None
    return "cuda" if torch.cuda.is_available() and torch.version.hip is None else None


def usable(x: Tensor, *others: Tensor | None, backward: bool = False) -> bool:
    """x in float32 or bfloat16 and everything else on a CUDA device, triton installed, and no gradient wanted (unless
    the kernel has a ``backward``)."""
    device = _device()
    if device is None or x.device.type != device or x.dtype not in (torch.float32, torch.bfloat16) or not x.numel():
        return False
    tensors = [x, *(t for t in others if t is not None)]
    wanted = not backward and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not wanted and all(t.device == x.device for t in tensors)


def exact(x: Tensor, weight: Tensor) -> bool:
    """`usable` for a product of plain matrices, which only DSV4_EXACT wants from us."""
    return EXACT and x.dtype == weight.dtype and usable(x, weight)
