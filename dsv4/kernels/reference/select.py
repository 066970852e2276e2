"""Top-k with a deterministic tie-break: among equal scores the lowest index wins."""

from __future__ import annotations

import torch
from torch import Tensor


def top_mask(scores: Tensor, k: int) -> Tensor:
    """scores [..., E] -> bool [..., E] with exactly min(k, E) True per row.

    `torch.topk` alone breaks ties by memory layout, so the same sequence would select different entries in
    different chunkings; here it only finds the threshold.
    """
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = torch.topk(scores, k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    reached = scores >= threshold
    if scores.device.type == "cpu" and bool((reached.sum(-1) == k).all()):  # no ties; elsewhere asking costs a wait
        return reached
    above = scores > threshold
    tied = scores == threshold
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))
