"""The smallest modules. Weights start at zero: `Transformer.init_weights` or a checkpoint fills them, and building a
284 B model on the meta device costs nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.kernels import linear, rms_norm


def unrounded(x: Tensor) -> Tensor:
    """Default of every ``round``: full precision. dtype "native" and quantisation-aware training set others."""
    return x


class Linear(nn.Module):
    """x W^T; weight [out_features, in_features]. V4 has no bias anywhere."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(nn.Module):
    """ids int64 [...] -> rows [..., dim] of weight [rows, dim]."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Norm(nn.Module):
    """RMS norm with a float32 weight [dim]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
