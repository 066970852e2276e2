"""Manifold-constrained hyper-connections (report 2.2): n residual streams, read and written by every sub-layer through
maps that are computed from the streams themselves. The arithmetic is in `dsv4.kernels` (`hc_enter`, `hc_leave`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.config import Config
from dsv4.kernels import collapse, hc_enter, hc_leave, stream_logits


class Site(nn.Module):
    """A module with hyper-connection sites: parameters ``hc_<site>_{fn,base,scale}``, float32, the checkpoint's
    names."""

    config: Config

    def add_site(self, name: str, maps: int, scales: int) -> None:
        """fn [maps, n D], base [maps], scale [scales]."""
        width = self.config.hc_mult * self.config.hidden_size
        for part, shape in (("fn", (maps, width)), ("base", (maps,)), ("scale", (scales,))):
            self.register_parameter(f"hc_{name}_{part}", nn.Parameter(torch.zeros(*shape, dtype=torch.float32)))

    def site(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """fn, base, scale."""
        return getattr(self, f"hc_{name}_fn"), getattr(self, f"hc_{name}_base"), getattr(self, f"hc_{name}_scale")

    def through(self, name: str, sublayer: nn.Module, norm: nn.Module, streams: Tensor, *inputs: object) -> Tensor:
        """One sub-layer inside its site: streams [..., n, D] -> [..., n, D]."""
        config = self.config
        x, post, comb = hc_enter(
            streams, *self.site(name), config.hc_sinkhorn_iters, config.rms_norm_eps, config.hc_eps
        )
        return hc_leave(streams, sublayer(norm(x), *inputs), post, comb)

    def exit(self, streams: Tensor) -> Tensor:
        """The head's collapse, sigmoid weights only: streams [..., n, D] -> [..., D]."""
        fn, base, scale = self.site("head")
        u = stream_logits(streams, fn, self.config.rms_norm_eps)
        weights = torch.sigmoid((u * scale + base).double()).float()  # as float32, its last bit depends on the batch
        return collapse(streams, weights + self.config.hc_eps)
