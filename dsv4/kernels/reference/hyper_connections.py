"""The maps and mixes of a hyper-connection site (report 2.2, eqs. 1-8). n = streams, D = hidden size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.sinkhorn import sinkhorn, sinkhorn_four


def stream_logits(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """streams [..., n, D], fn float32 [m, n * D] -> float32 [..., m]: fn times the unweighted RMS norm of all n * D
    values."""
    v = streams.flatten(-2).float()
    return linear(v, fn.float()) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def collapse(streams: Tensor, weight: Tensor) -> Tensor:
    """sum_j weight_j X_j: streams [..., n, D], weight float32 [..., n] -> [..., D]."""
    return torch.matmul(weight.unsqueeze(-2), streams.float()).squeeze(-2).to(streams.dtype)


def _enter_one(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_enter` of one token's four streams (decoding): its few numbers cost less in Python's floats than as a hundred
    calls of torch."""
    n, v = 4, streams.float().reshape(-1)
    norm = (float(v.dot(v)) / len(v) + rms_eps) ** -0.5
    a, b, c = (norm * s for s in scale.tolist())
    slopes = [a] * n + [b] * n + [c] * (n * n)
    logits = [u * s + z for u, s, z in zip(torch.mv(fn.float(), v).tolist(), slopes, base.tolist())]
    pre, post = ([1 + math.tanh(0.5 * x) for x in part] for part in (logits[:n], logits[n : 2 * n]))  # twice a sigmoid
    matrix = []
    for row in range(2 * n, len(logits), n):
        top = max(logits[row : row + n])
        powers = [math.exp(x - top) for x in logits[row : row + n]]
        total = sum(powers)
        matrix.append([p / total + eps for p in powers])
    comb = sinkhorn_four(matrix, iterations, eps)
    maps = torch.tensor([x for row in comb for x in row] + post + [0.5 * g + eps for g in pre])
    x = torch.mv(v.view(n, -1).T, maps[-n:]).to(streams.dtype).view(*streams.shape[:-2], -1)
    return x, maps[n * n : -n].view(streams.shape[:-1]), maps[: n * n].view(*streams.shape[:-1], n)


def _one(streams: Tensor) -> bool:
    """Whether these are the streams of one token on a CPU, without gradients."""
    single = streams.numel() == streams.shape[-2] * streams.shape[-1]
    return single and streams.device.type == "cpu" and not torch.is_grad_enabled()


def hc_enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. 3-8. streams [..., n, D] -> the sub-layer's input [..., D] (mixed from un-normalised streams), and float32
    maps post [..., n] and comb [..., n, n] for `hc_leave`.

    fn float32 [(2 + n) n, n D], base [(2 + n) n], scale [3]; rows are n pre, n post, n x n comb (row-major).
    pre = sigmoid + eps, post = 2 sigmoid, comb = Sinkhorn.
    """
    n = streams.shape[-2]
    if n == 4 and _one(streams):
        return _enter_one(streams, fn, base, scale, iterations, rms_eps, eps)
    u = stream_logits(streams, fn, rms_eps)
    logits = u * scale.repeat_interleave(torch.tensor([n, n, n * n], device=scale.device)) + base
    gates = torch.sigmoid(logits[..., : 2 * n])
    pre, post = gates[..., :n] + eps, 2 * gates[..., n:]
    # Items last: every pass of the normalisation then runs over long contiguous rows.
    comb = sinkhorn(logits[..., 2 * n :].flatten(0, -2).T.contiguous().view(n, n, -1), iterations, eps)
    return collapse(streams, pre), post, comb.permute(2, 0, 1).reshape(*post.shape, n)


def hc_leave(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Eq. 1: X'_k = post_k y + sum_j comb_jk X_j. The release sums over comb's *first* index (the report's B is its
    transpose). Stream by stream: a batched product of n x n matrices would be one call of the library per token."""
    x = streams.float()
    if _one(streams):
        n = post.numel()
        mixed = torch.mm(comb.view(n, n).mT, x.reshape(n, -1))
        return mixed.addr_(post.view(-1), y.float().view(-1)).to(streams.dtype).view(streams.shape)
    out = post.unsqueeze(-1) * y.unsqueeze(-2).float()
    add = torch.addcmul if torch.is_grad_enabled() else torch.Tensor.addcmul_
    for j in range(x.shape[-2]):
        out = add(out, comb[..., j, :, None], x[..., j : j + 1, :])
    return out.to(streams.dtype)
