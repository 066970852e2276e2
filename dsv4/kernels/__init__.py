"""The hot operations, one name each. This file is the only place that chooses a backend.

`reference` is plain torch: the specification of every operation, and what runs when nothing faster is there.
`cpu` is C++ compiled at first use, for what plain torch does badly. DSV4_KERNELS=reference switches it off.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels import reference
from dsv4.kernels.cpu import attention as _cpu_attention
from dsv4.kernels.cpu import few as _cpu_few
from dsv4.kernels.cpu import hyper_connections as _cpu_hc
from dsv4.kernels.cpu import rope as _cpu_rope
from dsv4.kernels.reference import collapse, stream_logits, swiglu, top_mask

__all__ = [
    "collapse",
    "hc_enter",
    "hc_leave",
    "joint_attention",
    "linear",
    "rms_norm",
    "rotate",
    "routed_experts",
    "stream_logits",
    "swiglu",
    "top_mask",
]


def hc_enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams -> sub-layer input and the maps for `hc_leave`; `reference.hc_enter` is the specification."""
    backend = _cpu_hc if _cpu_hc.usable(streams) else reference
    return backend.hc_enter(streams, fn, base, scale, iterations, rms_eps, eps)


def hc_leave(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Sub-layer output back into the streams; `reference.hc_leave` is the specification."""
    backend = _cpu_hc if _cpu_hc.usable(streams) else reference
    return backend.hc_leave(streams, y, post, comb)


def joint_attention(
    q: Tensor, near: Tensor, near_mask: Tensor, far: Tensor | None, far_mask: Tensor | None, sink: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Window rows and compressed rows under one softmax with a sink; `reference.joint_attention` is the
    specification."""
    backend = _cpu_attention if _cpu_attention.usable(q) else reference
    return backend.joint_attention(q, near, near_mask, far, far_mask, sink, scale)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last axis; `reference.rms_norm` is the specification."""
    backend = _cpu_rope if _cpu_rope.usable(x) else reference
    return backend.rms_norm(x, weight, eps)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Partial interleaved RoPE; `reference.rotate` is the specification."""
    backend = _cpu_rope if _cpu_rope.usable(x) else reference
    return backend.rotate(x, angles)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> x W^T [..., out]."""
    backend = _cpu_few.linear if _cpu_few.usable(x, weight, x.numel() // max(x.shape[-1], 1)) else F.linear
    return backend(x, weight)


def routed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float
) -> Tensor:
    """Every token through its own experts; `reference.routed_experts` is the specification."""
    backend = _cpu_few if _cpu_few.usable(x, w1, x.shape[0]) else reference
    return backend.routed_experts(x, experts, weights, w1, w2, w3, limit)
