"""The lightning indexer (report eqs. 13-17): which compressed entries a query reads. Selection only; its scores never
enter the attention, so it learns from its own loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv4.config import Config, Layer
from dsv4.kernels import index_queries, rotate
from dsv4.model.compressor import Compressor
from dsv4.model.layers import Linear, unrounded
from dsv4.model.plan import Plan
from dsv4.model.state import Compression


class Indexer(nn.Module):
    """Scores I[t, e] = sum_h w[t, h] ReLU(q[t, h] . k[e])."""

    def __init__(self, config: Config, layer: Layer) -> None:
        super().__init__()
        self.round: Callable[[Tensor], Tensor] = unrounded
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, layer, self.dim)

    def keys(self, h: Tensor, plan: Plan, memory: Compression | None) -> Tensor:
        """h [B, T, D] -> index keys of all entries so far [B, E, dim]."""
        return self.compressor(h, plan, memory)

    def queries(self, h: Tensor, latent: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, T, D], latent [B, T, q_lora_rank] (the attention's own) -> queries [B, T, heads, dim], weights
        float32 [B, T, heads]."""
        size = self.dim**-0.5 * self.heads**-0.5
        found = index_queries(h, latent, self.wq_b.weight, self.weights_proj.weight, angles, size)
        if found is None:
            q = self.wq_b(latent).unflatten(-1, (self.heads, self.dim))
            found = rotate(q, angles.unsqueeze(-2)), self.weights_proj(h).float() * size  # raw: may be negative
        return self.round(found[0]), found[1]

    @staticmethod
    def score(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        """[B, T, heads, dim], [B, T, heads], [B, E, dim] -> float32 [B, T, E]."""
        batch, tokens, heads, _ = q.shape
        dots = torch.bmm(q.flatten(1, 2), keys.mT).float().relu_().view(batch * tokens, heads, -1)
        return torch.bmm(weights.reshape(batch * tokens, 1, heads), dots).view(batch, tokens, -1)


def index_loss(scores: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || softmax(scores)) over the entries in ``mask``: the sum over queries that see any, and their number.

    scores float32 [B, T, E]; teacher float32 [B, T, E], the joint softmax (window, entries and sink) summed over heads,
    here normalised over ``mask`` bool [B, T, E].
    """
    teacher = teacher.masked_fill(~mask, 0)
    target = teacher / teacher.sum(-1, keepdim=True).clamp(min=1e-20)
    log_q = torch.log_softmax(scores.masked_fill(~mask, -1e30), -1)
    per_query = (torch.special.xlogy(target, target) - target * log_q).sum(-1)
    seen = mask.any(-1)
    return (per_query * seen).sum(), seen.sum()
