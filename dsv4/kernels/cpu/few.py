"""Linear layers and experts for a handful of rows (decoding), through ``few.cpp``. There torch's products reach half of
the memory's bandwidth in float32 and a quarter in bfloat16; a plain loop over the weights reaches it."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library, parallel

_ROWS = 4  # beyond, torch's matrix product is faster
_PARALLEL = 1 << 20  # weights below this are read sooner than a second thread starts


def usable(x: Tensor, weight: Tensor, rows: int, most: int = _ROWS) -> bool:
    """Few rows, no gradient wanted, one dtype of float32 or bfloat16 on the CPU, and a compiled library."""
    kind = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return kind and 0 < rows <= most and not wanted and weight.is_contiguous() and library() is not None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    x = x.contiguous()
    (out, width), rows = weight.shape, x.numel() // x.shape[-1]
    y = x.new_empty(*x.shape[:-1], out)

    def work(_: int, begin: int, end: int) -> None:
        call("few_linear", x.dtype, x, weight, y, begin, end, rows, width, out)

    parallel(out, work, grain=max(_PARALLEL // width, 1))
    return y


def routed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float
) -> Tensor:
    """See the reference of the same name."""
    rows = x.repeat_interleave(experts.shape[1], 0)
    owner, weight, out = experts.flatten(), weights.flatten(), torch.empty_like(rows)
    inner, width = w1.shape[1:]

    def work(_: int, begin: int, end: int) -> None:
        call("few_experts", x.dtype, rows, weight, owner, w1, w2, w3, out, begin, end, width, inner, limit)

    parallel(len(rows), work, grain=max(_PARALLEL // (3 * inner * width), 1))
    return out.view(*experts.shape, -1).float().sum(1)
