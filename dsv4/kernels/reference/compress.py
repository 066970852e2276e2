"""The pooling of a compressor."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(kv: Tensor, gate: Tensor) -> Tensor:
    """kv, gate float32 [..., slots, dim] -> [..., dim]: per channel the softmax over the slots times their values
    (eqs. 11-12, 22-23). A gate may be -inf, but not all of a channel's."""
    return (torch.softmax(gate, -2) * kv).sum(-2)
