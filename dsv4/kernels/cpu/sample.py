"""The choice of a token through ``sample.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library


def usable(logits: Tensor) -> bool:
    """float32 on the CPU, and a compiled library."""
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and library() is not None


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    """See the reference of the same name."""
    logits = logits.contiguous()
    out = torch.empty(len(logits), dtype=torch.int64)
    numbers = (t.to("cpu", torch.float64).contiguous() for t in (temperature, top_p, draw))
    call("sample", None, logits, *numbers, out, *logits.shape)
    return out
