"""Multi-token prediction (report 2.1, as V3): one whole block over the streams, guessing one token further."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.config import Config, Layer
from dsv4.model.attention import Trace
from dsv4.model.block import Block
from dsv4.model.layers import Linear, Norm
from dsv4.model.plan import Plan
from dsv4.model.state import LayerState


class MTP(Block):
    """Input at slot t: the trunk's streams before their collapse, and the embedding of token t + 1. Embedding and head
    are the trunk's; projections, stream head and final norm are its own."""

    def __init__(self, config: Config, layer: Layer) -> None:
        super().__init__(config, layer)
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj = Linear(dim, dim)
        self.h_proj = Linear(dim, dim)
        self.enorm, self.hnorm, self.norm = Norm(dim, eps), Norm(dim, eps), Norm(dim, eps)
        self.add_site("head", config.hc_mult, 1)

    def predict(
        self,
        streams: Tensor,
        next_embedding: Tensor,
        next_ids: Tensor,
        plan: Plan,
        memory: LayerState | None,
        trace: Trace | None,
    ) -> tuple[Tensor, Tensor]:
        """streams [B, T, n, D], next_embedding [B, T, D], next_ids int64 [B, T] -> hidden [B, T, D] for the head (it
        predicts token t + 2), and the block's own streams (for drafting further)."""
        z = self.e_proj(self.enorm(next_embedding)).unsqueeze(-2) + self.h_proj(self.hnorm(streams))
        out = super().forward(z, next_ids, plan, memory, trace)
        return self.norm(self.exit(out)), out


def shifted(ids: Tensor) -> Tensor:
    """ids int64 [B, T] -> token t + 1 at slot t; the last slot repeats its own id and must not be scored."""
    return torch.cat((ids[:, 1:], ids[:, -1:]), 1)
