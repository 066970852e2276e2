"""The choice of a token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    """logits float32 [B, V]; temperature, top_p, draw float64 [B] -> ids int64 [B].

    Temperature 0: the largest logit, the lowest id among equals. Otherwise the id that draw in [0, 1) selects from
    softmax(logits / temperature), in float64: ids in their order when top_p is 1, else the most probable first (the
    lowest id first among equals) until their mass reaches top_p.
    """
    rows = zip(logits.double(), temperature.tolist(), top_p.tolist(), draw.tolist())
    return torch.tensor([_one(*row) for row in rows], dtype=torch.int64, device=logits.device)


def _one(logits: Tensor, temperature: float, top_p: float, draw: float) -> int:
    if temperature == 0:
        return int(torch.nonzero(logits == logits.max())[0])
    odds = torch.softmax(logits / temperature, -1)
    ids = None
    if top_p < 1:
        odds, ids = torch.sort(odds, descending=True, stable=True)
        odds = odds[: 1 + int((odds.cumsum(-1) < top_p).sum())]
    mass = odds.cumsum(-1)
    chosen = min(int(torch.searchsorted(mass, draw * mass[-1], right=True)), len(mass) - 1)
    return chosen if ids is None else int(ids[chosen])
