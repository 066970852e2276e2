"""A compressor's pooling through ``compress.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library, run


def usable(kv: Tensor) -> bool:
    """float32 on the CPU, and a compiled library."""
    return kv.device.type == "cpu" and kv.dtype == torch.float32 and library() is not None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, gate: Tensor) -> Tensor:
        kv, gate = kv.contiguous(), gate.contiguous()
        out = kv.new_empty(*kv.shape[:-2], kv.shape[-1])
        call("pool_forward", None, kv, gate, out, out.numel() // max(kv.shape[-1], 1), *kv.shape[-2:])
        ctx.save_for_backward(kv, gate)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        kv, gate = ctx.saved_tensors
        d, dkv, dgate = grads[0].contiguous(), torch.empty_like(kv), torch.empty_like(gate)
        call("pool_backward", None, d, kv, gate, dkv, dgate, d.numel() // max(kv.shape[-1], 1), *kv.shape[-2:])
        return dkv, dgate


def pool(kv: Tensor, gate: Tensor) -> Tensor:
    """See the reference of the same name."""
    return run(_Pool, kv, gate)
