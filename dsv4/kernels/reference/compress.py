"""What a compressor does between its projections and its norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(kv: Tensor, gate: Tensor, ape: Tensor, position: Tensor, dim: int) -> Tensor:
    """A compressor's projected tokens kv, gate float32 [B, T, N] -> [B, T, 2 N]: [kv A, gate A, kv B, gate B], or
    [kv, gate] without overlap (N = dim). See `dsv4.kernels.project`."""
    gate = gate + F.embedding(position % len(ape), ape)
    return torch.cat([half for pair in zip(kv.split(dim, -1), gate.split(dim, -1)) for half in pair], -1)


def pool(kv: Tensor, gate: Tensor) -> Tensor:
    """kv, gate float32 [..., slots, dim] -> [..., dim]: per channel the softmax over the slots times their values
    (eqs. 11-12, 22-23). A gate may be -inf, but not all of a channel's."""
    return (torch.softmax(gate, -2) * kv).sum(-2)
