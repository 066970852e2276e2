"""The router through ``route.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library


def usable(logits: Tensor) -> bool:
    """float32 on the CPU, no gradient wanted, and a compiled library."""
    kind = logits.device.type == "cpu" and logits.dtype == torch.float32
    return kind and not (torch.is_grad_enabled() and logits.requires_grad) and library() is not None


def route(
    logits: Tensor, bias: Tensor | None, fixed: Tensor | None, k: int, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dsv4.kernels.route`."""
    logits, (rows, count) = logits.contiguous(), logits.shape
    scores, weights = torch.empty_like(logits), torch.empty(rows, k)
    experts = torch.empty(rows, k, dtype=torch.int64) if fixed is None else fixed.contiguous()
    bias = None if bias is None else bias.float().contiguous()  # a model may have been cast as a whole
    call("route", None, logits, bias, scores, experts, weights, rows, count, k, factor)
    return experts, weights, scores
