"""One block: attention, then experts, each inside its own hyper-connection (report 2.2)."""

from __future__ import annotations

from torch import Tensor

from dsv4.config import Config, Layer
from dsv4.model.attention import Attention, Trace
from dsv4.model.hyper_connections import Site
from dsv4.model.layers import Norm
from dsv4.model.moe import MoE
from dsv4.model.plan import Plan
from dsv4.model.state import LayerState


class Block(Site):
    """streams [B, T, n, D] -> [B, T, n, D]."""

    def __init__(self, config: Config, layer: Layer) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.attn = Attention(config, layer)
        self.ffn = MoE(config, layer)
        self.attn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        maps = (2 + config.hc_mult) * config.hc_mult
        self.add_site("attn", maps, 3)
        self.add_site("ffn", maps, 3)

    def forward(
        self, streams: Tensor, ids: Tensor, plan: Plan, memory: LayerState | None, trace: Trace | None
    ) -> Tensor:
        streams = self.through("attn", self.attn, self.attn_norm, streams, plan, memory, trace)
        return self.through("ffn", self.ffn, self.ffn_norm, streams, ids, trace)
