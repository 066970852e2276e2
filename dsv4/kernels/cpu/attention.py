"""Joint attention on the CPU: matrix products by torch, everything between them in one pass of ``softmax.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library, parallel, parts_of, run


def usable(q: Tensor) -> bool:
    """float32 or bfloat16 on the CPU, and a compiled library."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and library(q.dtype) is not None


def _products(q: Tensor, keys: Tensor | None) -> Tensor:
    """q [B, T, H, d], keys [G, n, d] -> [B * T * H, n]; an empty set of keys has n = 0."""
    if keys is None:
        return q.new_empty(q.numel() // q.shape[-1], 0)
    return torch.bmm(q.reshape(keys.shape[0], -1, q.shape[-1]), keys.mT).view(-1, keys.shape[1])


def _apply(p: Tensor, keys: Tensor, shape: torch.Size) -> Tensor:
    return torch.bmm(p.view(keys.shape[0], -1, keys.shape[1]), keys).view(shape)


class _Joint(torch.autograd.Function):
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
        batch, tokens, heads, _ = q.shape
        p_near, p_far = _products(q, near), _products(q, far)
        p_sink = sink.new_empty(p_near.shape[0])
        near_mask = near_mask.contiguous()
        far_mask = near_mask if far_mask is None else far_mask.contiguous()
        widths = (
            heads,
            near.shape[1],
            p_far.shape[1],
            near_mask.numel() // near_mask.shape[-1],
            far_mask.numel() // far_mask.shape[-1],
        )

        def work(part: int, begin: int, end: int) -> None:
            buffer = sink.new_empty(widths[1] + widths[2])
            call(
                "softmax_forward",
                q.dtype,
                p_near,
                p_far,
                near_mask,
                far_mask,
                sink,
                p_sink,
                buffer,
                begin,
                end,
                *widths,
                scale,
            )

        parallel(p_near.shape[0], work)
        out = _apply(p_near, near, q.shape)
        ctx.save_for_backward(q, near, far, p_near, p_far, p_sink)
        ctx.scale = scale
        if far is None:
            return out, None
        seen = p_far.view(batch, tokens, heads, -1)
        ctx.mark_non_differentiable(seen)
        return out + _apply(p_far, far, q.shape), seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, near, far, p_near, p_far, p_sink = ctx.saved_tensors
        d_out = grads[0].contiguous()
        d_near, d_far = _products(d_out, near), _products(d_out, far)
        heads, rows = q.shape[2], p_near.shape[0]
        d_sink = p_sink.new_zeros(parts_of(rows), heads)

        def work(part: int, begin: int, end: int) -> None:
            widths = (heads, p_near.shape[1], p_far.shape[1])
            call(
                "softmax_backward",
                q.dtype,
                p_near,
                p_far,
                d_near,
                d_far,
                p_sink,
                d_sink[part],
                begin,
                end,
                *widths,
                ctx.scale,
            )

        parallel(rows, work)

        def side(keys: Tensor, p: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
            group = (keys.shape[0], -1, keys.shape[1])
            q_rows, d_rows = (x.reshape(keys.shape[0], -1, x.shape[-1]) for x in (q, d_out))
            d_keys = torch.bmm(dz.view(group).mT, q_rows).baddbmm_(p.view(group).mT, d_rows)
            return _apply(dz, keys, q.shape), d_keys

        dq, dk_near = side(near, p_near, d_near)
        dk_far = None
        if far is not None:
            dq_far, dk_far = side(far, p_far, d_far)
            dq = dq + dq_far
        return dq, dk_near, None, dk_far, None, d_sink.sum(0), None


def joint_attention(
    q: Tensor, near: Tensor, near_mask: Tensor, far: Tensor | None, far_mask: Tensor | None, sink: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """See the reference of the same name; the returned probabilities have q's dtype."""
    return run(_Joint, q.contiguous(), near, near_mask, far, far_mask, sink.float(), scale)
