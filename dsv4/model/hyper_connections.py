"""Manifold-constrained hyper-connections (report 2.2, eqs. 1-8): n residual streams around every sub-layer.

N = tokens, n = streams (hc_mult), D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.config import Config
from dsv4.kernels import sinkhorn


@dataclass
class Mix:
    """The dynamic maps of one site, float32: post [..., n], comb [..., n, n]."""

    post: Tensor
    comb: Tensor


def stream_logits(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """streams [..., n, D], fn float32 [m, n * D] -> float32 [..., m]: fn times the unweighted RMS norm of all n * D values."""
    v = streams.flatten(-2).float()
    return F.linear(v, fn) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def enter(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: Config) -> tuple[Tensor, Mix]:
    """Eqs. 3-8. streams [..., n, D] -> the sub-layer's input [..., D] (un-normalised streams, mixed) and the maps for `leave`.

    fn float32 [(2 + n) n, n D], base [(2 + n) n], scale [3]; rows are n pre, n post, n x n comb (row-major).
    pre = sigmoid + eps, post = 2 sigmoid, comb = Sinkhorn.
    """
    n = config.hc_mult
    u = stream_logits(streams, fn, config.rms_norm_eps)
    pre = torch.sigmoid(u[..., :n] * scale[0] + base[:n]) + config.hc_eps
    post = 2 * torch.sigmoid(u[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = u[..., 2 * n :] * scale[2] + base[2 * n :]
    # Items last: every pass of the normalisation then runs over long contiguous rows.
    comb = sinkhorn(logits.flatten(0, -2).T.reshape(n, n, -1), config.hc_sinkhorn_iters, config.hc_eps)
    return _collapse(streams, pre), Mix(post, comb.permute(2, 0, 1).reshape(*post.shape, n))


def leave(streams: Tensor, output: Tensor, mix: Mix) -> Tensor:
    """Eq. 1: X'_k = post_k y + sum_j comb_jk X_j. The release sums over comb's *first* index (the report's B is its transpose)."""
    shape = streams.shape
    x = streams.flatten(0, -3).float()
    y = mix.post.flatten(0, -2).unsqueeze(-1) * output.flatten(0, -2).unsqueeze(-2).float()
    return torch.baddbmm(y, mix.comb.flatten(0, -3).mT, x).view(shape).to(streams.dtype)


def head_collapse(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: Config) -> Tensor:
    """The exit: sigmoid weights only. streams [..., n, D], fn [n, n D], base [n], scale [1] -> [..., D]."""
    u = stream_logits(streams, fn, config.rms_norm_eps)
    return _collapse(streams, torch.sigmoid(u * scale + base) + config.hc_eps)


def _collapse(streams: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(weight.unsqueeze(-2), streams.float()).squeeze(-2).to(streams.dtype)
