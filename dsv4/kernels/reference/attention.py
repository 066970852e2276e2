"""One softmax over two sets of keys and a sink (report 2.3.3, eq. 27), forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Joint(torch.autograd.Function):
    """Keys are values (shared-KV MQA), so a key's gradient has two terms. Probabilities are kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        near: Tensor,
        near_mask: Tensor,
        far: Tensor | None,
        far_mask: Tensor | None,
        sink: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        batch, tokens, heads, dim = q.shape
        shape = (batch, tokens, heads, -1)
        q_near = q.reshape(near.shape[0], -1, dim)
        p_near = torch.bmm(q_near, near.mT).float().mul_(scale).view(shape)
        p_near.masked_fill_(~near_mask.unsqueeze(2), -torch.inf)
        top = torch.maximum(p_near.amax(-1, keepdim=True), sink.view(1, 1, -1, 1))
        p_far = None
        if far is not None and far_mask is not None:
            q_far = q.reshape(far.shape[0], -1, dim)
            p_far = torch.bmm(q_far, far.mT).float().mul_(scale).view(shape)
            p_far.masked_fill_(~far_mask.unsqueeze(2), -torch.inf)
            top = torch.maximum(top, p_far.amax(-1, keepdim=True))
            p_far.sub_(top).exp_()
        p_near.sub_(top).exp_()
        p_sink = (sink.view(1, 1, -1, 1) - top).exp_()
        total = p_near.sum(-1, keepdim=True) + p_sink
        if p_far is not None:
            total += p_far.sum(-1, keepdim=True)
            p_far.div_(total)
        p_near.div_(total)
        p_sink.div_(total)
        out = torch.bmm(p_near.to(q.dtype).view(*q_near.shape[:2], -1), near).view(q.shape)
        if far is not None and p_far is not None:
            out = out + torch.bmm(p_far.to(q.dtype).view(*q_far.shape[:2], -1), far).view(q.shape)
            ctx.mark_non_differentiable(p_far)
        ctx.save_for_backward(q, near, far, p_near, p_far, p_sink, out)
        ctx.scale = scale
        return out, p_far

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, near, far, p_near, p_far, p_sink, out = ctx.saved_tensors
        d_out = grads[0].contiguous()
        inner = (d_out.float() * out.float()).sum(
            -1, keepdim=True
        )  # = sum_j p_j dp_j, as in flash attention's backward

        def side(keys: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
            q_rows, d_rows = (x.reshape(keys.shape[0], -1, x.shape[-1]) for x in (q, d_out))
            dz = torch.bmm(d_rows, keys.mT).float().view(p.shape).sub_(inner).mul_(p).mul_(ctx.scale).to(q.dtype)
            dz_rows = dz.view(*q_rows.shape[:2], -1)
            d_keys = torch.bmm(dz_rows.mT, q_rows)
            d_keys.baddbmm_(p.to(q.dtype).view_as(dz_rows).mT, d_rows)
            return torch.bmm(dz_rows, keys).view(q.shape), d_keys

        dq, d_near = side(near, p_near)
        d_far = None
        if far is not None:
            dq_far, d_far = side(far, p_far)
            dq = dq + dq_far
        d_sink = -(p_sink * inner).sum((0, 1, 3))
        return dq, d_near, None, d_far, None, d_sink, None


def joint_attention(
    q: Tensor, near: Tensor, near_mask: Tensor, far: Tensor | None, far_mask: Tensor | None, sink: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Shared-KV attention over window rows and compressed rows under one softmax with a per-head sink.

    q [B, T, H, d]. ``near`` [G, n, d] serves G equal runs of consecutive (batch, token) queries: G = B x blocks for
    window blocks. ``far`` likewise: G = B for entries that all queries share, G = B x T for gathered ones; None = none.
    Masks are bool [B or 1, T, n], True = visible. sink float32 [H]: one logit more in the denominator, no value.
    Returns the output [B, T, H, d] and the probabilities on ``far`` float32 [B, T, H, n] (no gradient), for the
    indexer's teacher.
    """
    return _Joint.apply(q, near, near_mask, far, far_mask, sink, scale)
