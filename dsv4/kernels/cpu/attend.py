"""Inference attention and the indexer's choice through ``attend.cpp``: no array of size tokens x entries is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels.cpu.library import call, library

_HEADS = 8


def usable(q: Tensor) -> bool:
    """No gradient wanted, float32 or bfloat16 on the CPU, even head dimension, and a compiled library."""
    kind = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] % 2 == 0
    return kind and not torch.is_grad_enabled() and library(q.dtype) is not None


def choose(q: Tensor, weights: Tensor, keys: Tensor, low: Tensor, high: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `dsv4.kernels.choose`."""
    batch, tokens, heads, dim = q.shape
    if spare := -heads % _HEADS:
        q, weights = F.pad(q, (0, 0, 0, spare)), F.pad(weights, (0, spare))
    q, weights, low, high = q.contiguous(), weights.contiguous(), low.contiguous(), high.contiguous()
    keys = keys if keys.stride()[1:] == (dim, 1) else keys.contiguous()
    count = keys.shape[1]
    wide = (count + 31) // 32 * 32
    chosen = torch.empty(batch, tokens, k, dtype=torch.int32)
    found = torch.empty(batch, tokens, dtype=torch.int32)
    few = batch * tokens < 8  # then the keys are turned block by block
    turned, scores = keys.new_empty(0 if few else wide * dim), torch.empty(min(tokens, 8) * wide)
    sizes = (batch, tokens, count, keys.stride(0), heads + spare, dim, k)
    call("choose", q.dtype, q, weights, keys, low, high, chosen, found, *sizes, turned, scores)
    return chosen, found


def attend(
    q: Tensor, near: Tensor, near_from: Tensor, near_to: Tensor, far: Tensor | None,
    low: Tensor | None, high: Tensor | None, picked: tuple[Tensor, Tensor] | None, sink: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `dsv4.kernels.attend`."""
    batch, tokens, heads, dim = q.shape
    spare, sink = -heads % _HEADS, sink.float()
    if spare:
        q, sink = F.pad(q, (0, 0, 0, spare)), F.pad(sink, (0, spare))
    q, near, near_from, near_to = (t.contiguous() for t in (q, near, near_from, near_to))
    out = torch.empty_like(q)
    if far is None or low is None or high is None:
        rows: tuple[Tensor | int, ...] = (0, 0, 0, 0, 0)
        stride = k = 0
    else:
        far = far if far.stride()[1:] == (dim, 1) else far.contiguous()
        chosen, count = picked or (0, 0)
        rows, stride = (far, chosen, count, low.contiguous(), high.contiguous()), far.stride(0)
        k = 0 if picked is None else picked[0].shape[-1]
    sizes = (batch, tokens, heads + spare, dim, near.shape[1], stride, k)
    call("attend", q.dtype, q, near, near_from, near_to, *rows, sink, out, *sizes, scale)
    return out[:, :, :heads]
