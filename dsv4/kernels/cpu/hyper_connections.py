"""Hyper-connections of 4 streams through the C++ of ``mhc.cpp``; the same results as the reference up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.cpu.library import call, library, parallel, parts_of, run


def usable(streams: Tensor) -> bool:
    """4 streams of float32 or bfloat16 on the CPU, and a compiled library."""
    fits = streams.device.type == "cpu" and streams.shape[-2] == 4 and streams.dtype in (torch.float32, torch.bfloat16)
    return fits and library(streams.dtype) is not None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        streams = streams.contiguous()
        *lead, n, dim = streams.shape
        rows = streams.numel() // (n * dim)
        x = streams.new_empty(*lead, dim)
        pre, post, comb, u, r = (base.new_empty(*lead, *tail) for tail in ((n,), (n,), (n, n), (2 * n + n * n,), ()))

        def work(part: int, begin: int, end: int) -> None:
            call(
                "enter_forward",
                streams.dtype,
                streams,
                fn,
                base,
                scale,
                x,
                pre,
                post,
                comb,
                u,
                r,
                begin,
                end,
                dim,
                iterations,
                rms_eps,
                eps,
            )

        parallel(rows, work)
        ctx.save_for_backward(streams, fn, base, scale, pre, post, u, r)
        ctx.iterations, ctx.eps = iterations, eps
        return x, post, comb

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, pre, post, u, r = ctx.saved_tensors
        dx, d_post, d_comb = (grad.contiguous() for grad in grads)
        dim = streams.shape[-1]
        rows = streams.numel() // (4 * dim)
        d_streams, parts = torch.empty_like(streams), parts_of(rows)
        d_fn, d_base, d_scale = (like.new_zeros(parts, *like.shape) for like in (fn, base, scale))

        def work(part: int, begin: int, end: int) -> None:
            call(
                "enter_backward",
                streams.dtype,
                dx,
                d_post,
                d_comb,
                streams,
                fn,
                base,
                scale,
                pre,
                post,
                u,
                r,
                d_streams,
                d_fn[part],
                d_base[part],
                d_scale[part],
                begin,
                end,
                dim,
                ctx.iterations,
                ctx.eps,
            )

        parallel(rows, work)
        return d_streams, d_fn.sum(0), d_base.sum(0), d_scale.sum(0), None, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        streams, y, post, comb = (t.contiguous() for t in (streams, y, post, comb))
        dim, out = streams.shape[-1], torch.empty_like(streams)
        rows = y.numel() // dim
        parallel(
            rows,
            lambda _, begin, end: call("leave_forward", streams.dtype, streams, y, post, comb, out, begin, end, dim),
        )
        ctx.save_for_backward(streams, y, post, comb)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        streams, y, post, comb = ctx.saved_tensors
        d_out, dim = grads[0].contiguous(), streams.shape[-1]
        d_streams, dy, d_post, d_comb = (torch.empty_like(t) for t in (streams, y, post, comb))

        def work(part: int, begin: int, end: int) -> None:
            call(
                "leave_backward",
                streams.dtype,
                d_out,
                streams,
                y,
                post,
                comb,
                d_streams,
                dy,
                d_post,
                d_comb,
                begin,
                end,
                dim,
            )

        parallel(y.numel() // dim, work)
        return d_streams, dy, d_post, d_comb


def hc_enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference of the same name."""
    fn, base, scale = (t.float().contiguous() for t in (fn, base, scale))  # a model may have been cast as a whole
    return run(_Enter, streams, fn, base, scale, iterations, rms_eps, eps)


def hc_leave(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See the reference of the same name."""
    return run(_Leave, streams, y.to(streams.dtype), post, comb)
