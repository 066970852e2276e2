"""The hot operations, one name each. This file is the only place that chooses a backend.

`reference` is plain torch: the specification of every operation, and what runs when nothing faster is there.
`cpu` is C++ compiled at first use, for what plain torch does badly. DSV4_KERNELS=reference switches it off.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.kernels import reference
from dsv4.kernels.cpu import attention as _cpu_attention
from dsv4.kernels.cpu import hyper_connections as _cpu_hc
from dsv4.kernels.cpu import rope as _cpu_rope
from dsv4.kernels.reference import collapse, grouped_experts, stream_logits, swiglu, top_mask

__all__ = [
    "collapse",
    "grouped_experts",
    "hc_enter",
    "hc_leave",
    "joint_attention",
    "rms_norm",
    "rotate",
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
