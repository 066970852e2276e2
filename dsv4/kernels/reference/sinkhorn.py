"""Sinkhorn-Knopp on many tiny matrices (report eq. 8)."""

from __future__ import annotations

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


def sinkhorn_four(matrix: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    """`sinkhorn` of one 4 x 4 matrix (V4's four streams), after its softmax: the 39 passes are 117 calls of torch, or a
    tenth of their time in Python's own floats.

    The result is matrix[i][j] / (row i's divisor * column j's), and a pass renews one of the two: x / (sum(x) + eps)
    makes of a column's divisor c_j sum_i matrix[i][j] / r_i + eps c_j. u = 1 / r, v = 1 / c."""
    (a, b, c, d), (e, f, g, h), (i, j, k, l), (m, n, o, p) = matrix
    r1 = r2 = r3 = r4 = u1 = u2 = u3 = u4 = c1 = c2 = c3 = c4 = 1.0
    for step in range(iterations):
        if step:
            v1, v2, v3, v4 = 1 / c1, 1 / c2, 1 / c3, 1 / c4
            r1 = a * v1 + b * v2 + c * v3 + d * v4 + eps * r1
            r2 = e * v1 + f * v2 + g * v3 + h * v4 + eps * r2
            r3 = i * v1 + j * v2 + k * v3 + l * v4 + eps * r3
            r4 = m * v1 + n * v2 + o * v3 + p * v4 + eps * r4
            u1, u2, u3, u4 = 1 / r1, 1 / r2, 1 / r3, 1 / r4
        c1 = a * u1 + e * u2 + i * u3 + m * u4 + eps * c1
        c2 = b * u1 + f * u2 + j * u3 + n * u4 + eps * c2
        c3 = c * u1 + g * u2 + k * u3 + o * u4 + eps * c3
        c4 = d * u1 + h * u2 + l * u3 + p * u4 + eps * c4
    return [[x * u / w for x, w in zip(line, (c1, c2, c3, c4))] for line, u in zip(matrix, (u1, u2, u3, u4))]


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """logits float32 [n, n, N] (row, column, item) -> nearly doubly stochastic [n, n, N].

    Row softmax + eps, then ``iterations`` column passes with a row pass between each two; it ends on a column
    pass, and every division adds eps (release code; the report starts from exp).
    """
    return _Sinkhorn.apply(torch.softmax(logits, 1) + eps, iterations, eps)
