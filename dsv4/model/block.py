"""One block: attention, then experts, each inside its own hyper-connection (report 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.config import Config, Layer
from dsv4.model import hyper_connections as hc
from dsv4.model.attention import Attention, Trace
from dsv4.model.compressor import Norm
from dsv4.model.moe import MoE
from dsv4.model.plan import Plan
from dsv4.model.state import LayerState


class Site(nn.Module):
    """Namespace of functions shared by block, head and MTP: parameters ``hc_<name>_{fn,base,scale}``, float32."""

    def add_site(self, name: str, config: Config, maps: int, scales: int) -> None:
        width = config.hc_mult * config.hidden_size
        self.register_parameter(f"hc_{name}_fn", nn.Parameter(torch.zeros(maps, width, dtype=torch.float32)))
        self.register_parameter(f"hc_{name}_base", nn.Parameter(torch.zeros(maps, dtype=torch.float32)))
        self.register_parameter(f"hc_{name}_scale", nn.Parameter(torch.zeros(scales, dtype=torch.float32)))

    def site(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        fn, base, scale = (self.get_parameter(f"hc_{name}_{part}") for part in ("fn", "base", "scale"))
        return fn, base, scale


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
        self.add_site("attn", config, maps, 3)
        self.add_site("ffn", config, maps, 3)

    def forward(self, streams: Tensor, ids: Tensor, plan: Plan, memory: LayerState | None, trace: Trace | None) -> Tensor:
        x, mix = hc.enter(streams, *self.site("attn"), self.config)
        streams = hc.leave(streams, self.attn(self.attn_norm(x), plan, memory, trace), mix)
        x, mix = hc.enter(streams, *self.site("ffn"), self.config)
        return hc.leave(streams, self.ffn(self.ffn_norm(x), ids, trace), mix)
