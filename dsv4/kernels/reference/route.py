"""The router between its product and the experts (report 2.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def route(
    logits: Tensor, bias: Tensor | None, fixed: Tensor | None, k: int, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dsv4.kernels.route`."""
    scores = F.softplus(logits.double()).sqrt().float()  # as float32, its last bit depends on the batch
    if fixed is not None:
        experts = fixed
    else:  # a stable sort breaks ties towards the lowest index
        assert bias is not None
        experts = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, experts)
    return experts, weights / weights.sum(-1, keepdim=True) * factor, scores
