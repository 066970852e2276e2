"""Muon as V4 uses it (report 2.4, algorithm 1): momentum, Nesterov look-ahead, hybrid Newton-Schulz, update RMS 0.18.

The unit is the logically independent matrix. Matrices of one shape, whatever layer or expert they come from, are kept
as one stack [B, n, m] with n <= m (taller ones transposed), so that a step is a handful of batched products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]
HYBRID: Coefficients = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""Eight fast steps bring every singular value near 1, two stabilising ones bring it to 1 (within 1e-3 in float32)."""
UPDATE_RMS = 0.18


def newton_schulz(x_BNM: Tensor, coefficients: Coefficients = HYBRID, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrix of each x [B, n, m] (n <= m): its singular values go to 1, zero ones stay 0.
    Products are done in `dtype`, which is also the result's."""
    assert x_BNM.shape[-2] <= x_BNM.shape[-1], f"work on the transpose of {tuple(x_BNM.shape)}"
    norm = torch.linalg.matrix_norm(x_BNM.float(), keepdim=True).clamp_min(1e-30)
    x = (x_BNM / norm).to(dtype)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonStack:
    """All logical matrices of one shape: float32 `master`, `momentum` and accumulated `grad`, each [B, n, m].

    `blocks` are 2-D views of the parameters, one logical matrix each, of any dtype.
    """

    def __init__(self, blocks: Sequence[Tensor], momentum: float, weight_decay: float, dtype: torch.dtype) -> None:
        self.blocks, self.mu, self.weight_decay, self.dtype = list(blocks), momentum, weight_decay, dtype
        self.tall = blocks[0].shape[0] > blocks[0].shape[1]
        self.master = torch.stack([self._lie(block) for block in blocks]).float()
        self.momentum = torch.zeros_like(self.master)
        self.grad = torch.zeros_like(self.master)

    def _lie(self, block: Tensor) -> Tensor:
        return block.mT if self.tall else block

    def add_grad(self, index: int, grad: Tensor) -> None:
        """Adds the gradient [n, m] or [m, n] of block `index`, in float32 whatever its dtype."""
        self.grad[index] += self._lie(grad)

    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update with the accumulated gradients times `scale`; writes the parameters, clears the gradients."""
        self.grad.mul_(scale)
        self.momentum.mul_(self.mu).add_(self.grad)  # no (1 - mu) factor
        update = newton_schulz(self.grad.add_(self.momentum, alpha=self.mu), dtype=self.dtype)
        rms = UPDATE_RMS * max(self.master.shape[1:]) ** 0.5
        self.master.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * rms)
        torch._foreach_copy_([self._lie(block) for block in self.blocks], list(self.master))
        self.grad.zero_()
