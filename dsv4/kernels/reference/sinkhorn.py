"""Sinkhorn-Knopp on many tiny matrices (report eq. 8)."""

from __future__ import annotations

from operator import truediv
from typing import Any

import torch
from torch import Tensor


class _Sinkhorn(torch.autograd.Function):
    """Alternating normalisation with a hand-written gradient: for y = x / (sum(x) + eps) the gradient is
    (dy - sum(dy * y)) / (sum + eps), so only the sums are kept and each x is rebuilt from its y."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, iterations: int, eps: float) -> Tensor:
        sums: list[Tensor] = []
        small = torch.full((), eps, dtype=c.dtype, device=c.device)  # a Python number is converted in every pass
        c = c.clone()
        for step in range(2 * iterations - 1):  # columns first: the rows were normalised by the softmax
            total = c.sum(step % 2, keepdim=True).add_(small)
            c.div_(total)
            sums.append(total)
        ctx.save_for_backward(c, *sums)
        return c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        y, *sums = ctx.saved_tensors
        y, grad = y.clone(), grads[0].clone()
        for step in range(len(sums) - 1, -1, -1):
            grad.sub_((grad * y).sum(step % 2, keepdim=True)).div_(sums[step])
            y.mul_(sums[step])
        return grad, None, None


def sinkhorn_one(matrix: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    """`sinkhorn` of one matrix, after its softmax: its 39 passes are 117 calls of torch, or a third of their time in
    Python's own floats.

    The result is matrix[i][j] / (row[i] column[j]), and a pass renews one of the two: x / (sum(x) + eps) makes of
    column[j] sum_i matrix[i][j] / row[i] + eps column[j]."""
    transposed = list(zip(*matrix))
    row = column = [1.0] * len(matrix)
    for step in range(2 * iterations - 1):
        if step % 2 == 0:
            column = [sum(map(truediv, line, row)) + eps * old for line, old in zip(transposed, column)]
        else:
            row = [sum(map(truediv, line, column)) + eps * old for line, old in zip(matrix, row)]
    return [[x / (a * b) for x, b in zip(line, column)] for line, a in zip(matrix, row)]


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """logits float32 [n, n, N] (row, column, item) -> nearly doubly stochastic [n, n, N].

    Row softmax + eps, then ``iterations`` column passes with a row pass between each two; it ends on a column
    pass, and every division adds eps (release code; the report starts from exp).
    """
    return _Sinkhorn.apply(torch.softmax(logits, 1) + eps, iterations, eps)
