"""Plain torch, forward and backward: the specification of every kernel."""

from dsv4.kernels.reference.attend import attend, choose
from dsv4.kernels.reference.attention import joint_attention
from dsv4.kernels.reference.compress import pool, project
from dsv4.kernels.reference.experts import grouped_experts, routed_experts, swiglu
from dsv4.kernels.reference.hyper_connections import collapse, hc_enter, hc_leave, stream_logits
from dsv4.kernels.reference.linear import grouped_linear, linear
from dsv4.kernels.reference.rope import rms_norm, rotate
from dsv4.kernels.reference.route import route
from dsv4.kernels.reference.sample import sample
from dsv4.kernels.reference.select import top_mask
from dsv4.kernels.reference.sinkhorn import sinkhorn

__all__ = [
    "attend",
    "choose",
    "collapse",
    "grouped_experts",
    "grouped_linear",
    "hc_enter",
    "hc_leave",
    "joint_attention",
    "linear",
    "pool",
    "project",
    "rms_norm",
    "rotate",
    "route",
    "routed_experts",
    "sample",
    "sinkhorn",
    "stream_logits",
    "swiglu",
    "top_mask",
]
