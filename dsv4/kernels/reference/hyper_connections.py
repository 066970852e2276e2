"""The maps and mixes of a hyper-connection site (report 2.2, eqs. 1-8). n = streams, D = hidden size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels.reference.sinkhorn import sinkhorn


def stream_logits(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """streams [..., n, D], fn float32 [m, n * D] -> float32 [..., m]: fn times the unweighted RMS norm of all n * D
    values."""
    v = streams.flatten(-2).float()
    return F.linear(v, fn.float()) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def collapse(streams: Tensor, weight: Tensor) -> Tensor:
    """sum_j weight_j X_j: streams [..., n, D], weight float32 [..., n] -> [..., D]."""
    return torch.matmul(weight.unsqueeze(-2), streams.float()).squeeze(-2).to(streams.dtype)


def hc_enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. 3-8. streams [..., n, D] -> the sub-layer's input [..., D] (mixed from un-normalised streams), and
    float32 maps
    post [..., n] and comb [..., n, n] for `hc_leave`.

    fn float32 [(2 + n) n, n D], base [(2 + n) n], scale [3]; rows are n pre, n post, n x n comb (row-major).
    pre = sigmoid + eps, post = 2 sigmoid, comb = Sinkhorn.
    """
    n = streams.shape[-2]
    u = stream_logits(streams, fn, rms_eps)
    pre = torch.sigmoid(u[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(u[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = u[..., 2 * n :] * scale[2] + base[2 * n :]
    # Items last: every pass of the normalisation then runs over long contiguous rows.
    comb = sinkhorn(logits.flatten(0, -2).T.contiguous().view(n, n, -1), iterations, eps)
    return collapse(streams, pre), post, comb.permute(2, 0, 1).reshape(*post.shape, n)


def hc_leave(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Eq. 1: X'_k = post_k y + sum_j comb_jk X_j. The release sums over comb's *first* index (the report's B is its
    transpose). Stream by stream: a batched product of n x n matrices would be one call of the library per token."""
    x = streams.float()
    out = post.unsqueeze(-1) * y.unsqueeze(-2).float()
    add = torch.addcmul if torch.is_grad_enabled() else torch.Tensor.addcmul_
    for j in range(x.shape[-2]):
        out = add(out, comb[..., j, :, None], x[..., j : j + 1, :])
    return out.to(streams.dtype)
