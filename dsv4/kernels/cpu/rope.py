"""RMS norm and rotation through ``norm.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library, parallel, parts_of, run


def usable(x: Tensor) -> bool:
    """float32 or bfloat16 on the CPU, and a compiled library."""
    kind = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return kind and library(x.dtype) is not None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        y, width = torch.empty_like(x), x.shape[-1]
        r = torch.empty(x.shape[:-1], dtype=torch.float32)
        w = 0 if weight is None else weight
        parallel(r.numel(), lambda _, begin, end: call("norm_forward", x.dtype, x, w, y, r, begin, end, width, eps))
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        dy, dx, width = grads[0].contiguous(), torch.empty_like(x), x.shape[-1]
        dw = None if weight is None else weight.new_zeros(parts_of(r.numel()), width)

        def work(part: int, begin: int, end: int) -> None:
            w, out = (0, 0) if weight is None or dw is None else (weight, dw[part])
            call("norm_backward", x.dtype, dy, x, w, r, dx, out, begin, end, width)

        parallel(r.numel(), work)
        return dx, None if dw is None else dw.sum(0), None


def _turned(x: Tensor, angles: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    y, (width, pairs) = torch.empty_like(x), (x.shape[-1], angles.shape[-1])
    rows, table = x.numel() // max(width, 1), angles.resolve_conj().contiguous()
    repeat = max(rows // max(table.numel() // pairs, 1), 1)
    parallel(rows, lambda _, begin, end: call("turn", x.dtype, x, table, y, begin, end, width, pairs, repeat, sign))
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _turned(x, angles, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _turned(grads[0], ctx.saved_tensors[0], -1.0), None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See the reference of the same name."""
    return run(_Norm, x, None if weight is None else weight.float(), eps)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """See the reference of the same name; angles must cover x's rows, or each serve a run of consecutive rows."""
    return run(_Rotate, x, angles)
