"""Products of few rows, arranged for how a CPU's library multiplies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW = 4  # rows
_LARGE = 1 << 17  # values; smaller matrices are read before a second thread has woken


def few(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether ``rows`` rows of x through ``weight`` [..., out, in] are worth arranging as `columns`."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    return plain and rows <= _FEW and weight.shape[-2:].numel() >= _LARGE


def columns(x: Tensor) -> Tensor:
    """Up to 4 rows x [..., m, in] as the columns of a right-hand factor [..., in, max(m, 2)].

    The CPU library streams a large matrix through a product with two to four columns at two to three times the speed of
    x W^T with as few rows, and on more than one thread (2,048 x 512: 212 us, not 410), so one row goes twice."""
    if x.shape[-2] == 1:
        x = x.expand(*x.shape[:-2], 2, -1)
    return x.contiguous().mT


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> x W^T [..., out]."""
    rows = x.shape[:-1].numel()
    if not few(x, weight, rows):
        return F.linear(x, weight)
    out = torch.mm(weight, columns(x.reshape(rows, -1)))
    return out[:, :rows].T.reshape(*x.shape[:-1], -1)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., G, in], weight [G * out, in] -> [..., G, out]: every group through its own matrix."""
    groups = x.shape[-2]
    rows, matrices = x.reshape(-1, groups, x.shape[-1]).transpose(0, 1), weight.view(groups, -1, weight.shape[-1])
    if few(x, matrices, rows.shape[1]):
        out = torch.bmm(matrices, columns(rows))[..., : rows.shape[1]].permute(2, 0, 1)
    else:
        out = torch.bmm(rows, matrices.mT).transpose(0, 1)
    return out.reshape(*x.shape[:-1], -1)
