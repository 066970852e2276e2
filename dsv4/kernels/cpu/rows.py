"""Cache rows in low precision through ``rows.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library
from dsv4.numerics import INDEX_ROW


def usable(x: Tensor) -> bool:
    """float32 or bfloat16 on the CPU, no gradient wanted, and a compiled library."""
    kind = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    return kind and not (torch.is_grad_enabled() and x.requires_grad) and library(x.dtype) is not None


def kv_row(x: Tensor, rope: int) -> Tensor:
    """See `numerics.kv_row`; here values that are not finite are not looked for."""
    x = x.contiguous()
    out, d = torch.empty_like(x), x.shape[-1]
    call("kv_rows", x.dtype, x, out, x.numel() // d, d, rope)
    return out


def index_row(x: Tensor) -> Tensor:
    """See `numerics.index_row`; here values that are not finite are not looked for."""
    x = x.contiguous()
    out, d = torch.empty_like(x), x.shape[-1]
    assert not d & (d - 1) and d % INDEX_ROW.block[1] == 0, d
    call("index_rows", x.dtype, x, out, x.numel() // d, d)
    return out
