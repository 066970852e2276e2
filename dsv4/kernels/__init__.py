"""The hot operations, one name each. This file is the only place that chooses a backend.

`reference` is plain torch: the specification of every operation, and what runs when nothing faster is there.
"""

from dsv4.kernels.reference.attention import joint_attention
from dsv4.kernels.reference.experts import grouped_experts
from dsv4.kernels.reference.rope import rms_norm, rotate
from dsv4.kernels.reference.select import top_mask
from dsv4.kernels.reference.sinkhorn import sinkhorn

__all__ = ["grouped_experts", "joint_attention", "rms_norm", "rotate", "sinkhorn", "top_mask"]
