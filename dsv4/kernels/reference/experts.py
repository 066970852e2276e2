"""The routed experts of one layer over tokens sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU (report 4.2.3): the gate is capped from above only, the linear branch on both sides."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _forward(
    x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts: list[int], limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and both branches before the activation."""
    out, gate, up = torch.empty_like(x), x.new_empty(len(x), w1.shape[1]), x.new_empty(len(x), w1.shape[1])
    parts = [(e, rows) for e, rows in enumerate(zip(*(t.split(counts) for t in (x, gate, up, out)))) if counts[e]]
    for e, (x_rows, gate_rows, up_rows, _) in parts:
        torch.mm(x_rows, w1[e].T, out=gate_rows)
        torch.mm(x_rows, w3[e].T, out=up_rows)
    hidden = swiglu(gate.float(), up.float(), limit).mul_(weight[:, None]).to(x.dtype).split(counts)
    for e, (_, _, _, out_rows) in parts:
        torch.mm(hidden[e], w2[e].T, out=out_rows)
    return out, gate, up


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts: list[int], limit: float
    ) -> Tensor:
        out, gate, up = _forward(x, weight, w1, w2, w3, counts, limit)
        ctx.save_for_backward(x, weight, w1, w2, w3, gate, up)
        ctx.counts, ctx.limit = counts, limit
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, w1, w2, w3, gate_all, up_all = ctx.saved_tensors
        d_out, limit = grads[0], ctx.limit
        dx, d_weight = torch.empty_like(x), torch.empty_like(weight)
        dw1, dw2, dw3 = torch.zeros_like(w1), torch.zeros_like(w2), torch.zeros_like(w3)
        start = 0
        for e, n in enumerate(ctx.counts):
            if not n:
                continue
            rows = slice(start, start + n)
            start += n
            gate, up, w = gate_all[rows].float(), up_all[rows].float(), weight[rows, None]
            capped, linear = gate.clamp(max=limit), up.clamp(-limit, limit)
            sigmoid = torch.sigmoid(capped)
            silu = capped * sigmoid
            plain = silu * linear
            dh = (d_out[rows] @ w2[e]).float()
            torch.mm(d_out[rows].T, (plain * w).to(x.dtype), out=dw2[e])
            d_weight[rows] = (dh * plain).sum(-1)
            dh *= w
            du = (dh * silu).masked_fill_(up.abs() > limit, 0).to(x.dtype)
            dg = (dh * linear).mul_(sigmoid + silu * (1 - sigmoid)).masked_fill_(gate > limit, 0).to(x.dtype)
            torch.mm(dg.T, x[rows], out=dw1[e])
            torch.mm(du.T, x[rows], out=dw3[e])
            torch.mm(dg, w1[e], out=dx[rows])
            dx[rows].addmm_(du, w3[e])
        return dx, d_weight, dw1, dw2, dw3, None, None


def grouped_experts(
    x: Tensor, weight: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts: list[int], limit: float
) -> Tensor:
    """weight * W2(swiglu(W1 x, W3 x)) with each row's own expert.

    x [N, D], rows sorted by expert; weight float32 [N]; w1, w3 [E, I, D]; w2 [E, D, I]; counts: rows per expert
    (sum N). The routing weight multiplies the hidden vector before W2, in float32, as the release does.
    """
    if not torch.is_grad_enabled():
        return _forward(x, weight, w1, w2, w3, counts, limit)[0]
    return _Grouped.apply(x, weight, w1, w2, w3, counts, limit)


def routed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float
) -> Tensor:
    """sum_k weights[:, k] E_{experts[:, k]}(x), float32 [N, D]. x [N, D], experts int64 [N, K], weights float32 [N, K].

    Rows are sorted by expert, each expert multiplies its own, and every token's K results are added in a fixed order.
    Gathers go as embeddings when gradients flow: their backward adds whole rows.
    """
    take = F.embedding if torch.is_grad_enabled() else lambda index, rows: rows[index]
    owner = experts.flatten()
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=w1.shape[0]).tolist()
    out = grouped_experts(take(order // experts.shape[1], x), weights.flatten()[order], w1, w2, w3, counts, limit)
    return take(order.argsort(), out).view(*experts.shape, -1).float().sum(1)
