"""One decoded token on a CPU, in as few calls as torch allows: in the middle of a decoding step, with the weights
streaming through the caches, every call costs about ten microseconds.

C: the length of a vector, which goes from product to product as the n columns of a right-hand factor [C, n]: two equal
ones in float32 (see `linear.columns`), one in other dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels.reference.experts import swiglu
from dsv4.kernels.reference.rope import rms_norm


def alone(x: Tensor, *weights: object) -> bool:
    """Whether x is the row of one token on a CPU, without gradients, and all weights are plain and of its dtype."""
    single = x.numel() == x.shape[-1] and not torch.is_grad_enabled() and x.device.type == "cpu"
    return single and all(isinstance(w, Tensor) and w.dtype == x.dtype for w in weights)


def _columns(x: Tensor) -> Tensor:
    """[..., C] -> [..., C, n]; a column's values lie together (side by side, the product takes twice as long)."""
    return torch.stack((x,) * (2 if x.dtype == torch.float32 else 1), -2).mT


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """[out, C] and [C, n] -> [out, n]."""
    return torch.mm(weight, x) if x.dtype == torch.float32 else F.linear(x.mT, weight).mT


def attention_inputs(
    h: Tensor, wq_a: Tensor, q_norm: Tensor, wq_b: Tensor, wkv: Tensor, kv_norm: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dsv4.kernels.attention_inputs`; the KV row is normed and turned as one head more."""
    x, dim = _columns(h.view(-1)), len(wkv)
    latent = rms_norm(_product(wq_a, x)[:, 0], q_norm, eps)
    q, kv = _product(wq_b, _columns(latent)), _product(wkv, x)
    rows = torch.cat((q[:, 0].view(-1, dim), kv[:, 0].view(1, dim))).float()
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows.mul_(torch.addcmul(torch.full((), eps), norm, norm, value=1 / dim).rsqrt_())
    rows[-1].mul_(kv_norm)
    if h.dtype != torch.float32:
        rows = rows.to(h.dtype).float()
    _turn(rows, angles.view(-1))
    rows = rows.to(h.dtype)
    return latent.view(1, 1, -1), rows[:-1].view(1, 1, -1, dim), rows[-1].view(1, 1, dim)


def _turn(rows: Tensor, angles: Tensor) -> None:
    """Rotates float32 rows [..., d], d even, in place by complex angles [R]."""
    rows.view(torch.complex64)[..., -len(angles) :].mul_(angles)


def attention_output(o: Tensor, wo_a: Tensor, wo_b: Tensor, angles: Tensor, groups: int) -> Tensor:
    """See `dsv4.kernels.attention_output`."""
    n = 2 if o.dtype == torch.float32 else 1
    copies = torch.stack((o.view(groups, -1, o.shape[-1]),) * n, 1).float()  # [G, n, H / G, d]
    _turn(copies, angles.view(-1).conj())
    rows = copies.to(o.dtype).flatten(2)
    low = torch.bmm(wo_a.view(groups, -1, rows.shape[-1]), rows.mT)  # [G, rank, n]
    return _product(wo_b, _columns(low[..., 0].flatten()))[:, 0].view(1, 1, -1)


def index_queries(
    h: Tensor, latent: Tensor, wq_b: Tensor, proj: Tensor, angles: Tensor, size: float
) -> tuple[Tensor, Tensor]:
    """See `dsv4.kernels.index_queries`."""
    q = _product(wq_b, _columns(latent.view(-1)))[:, 0].float().contiguous().view(1, 1, len(proj), -1)
    _turn(q, angles.view(-1))
    return q.to(h.dtype), F.linear(h, proj).float() * size


def mixture(
    x: Tensor, chosen: list[int], weights: Tensor, routed: tuple[Tensor, ...], shared: tuple[Tensor, ...], limit: float
) -> Tensor:
    """See `dsv4.kernels.mixture`: the shared expert is one more of those chosen, with weight 1."""
    (w1, w2, w3), right = routed, _columns(x[0])
    experts = [(w1[e], w2[e], w3[e]) for e in chosen] + [shared]
    gate = torch.stack([_product(first, right) for first, _, _ in experts])[..., 0].float()
    up = torch.stack([_product(third, right) for _, _, third in experts])[..., 0].float()
    hidden = _columns(swiglu(gate, up, limit).mul_(F.pad(weights.T, (0, 0, 0, 1), value=1.0)).to(x.dtype))
    out = torch.stack([_product(second, column) for (_, second, _), column in zip(experts, hidden)])
    return out[..., 0].float().sum(0, keepdim=True).to(x.dtype)


def project(x: Tensor, values: Tensor, gates: Tensor, ape: Tensor, position: Tensor, dim: int) -> Tensor:
    """See `dsv4.kernels.project`, in float32."""
    right = _columns(x.view(-1))
    gate = _product(gates, right)[:, 0] + ape[int(position) % len(ape)]
    both = torch.stack((_product(values, right)[:, 0].view(-1, dim), gate.view(-1, dim)), 1)
    return both.view(1, 1, -1)
