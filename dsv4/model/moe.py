"""Mixture of experts (report 2.1): sqrt-softplus affinities, selection bias, hash-routed first layers, one shared
expert.

N tokens, E routed experts, K = num_experts_per_tok, I = moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.config import Config, Layer
from dsv4.kernels import expert, linear, mixture, route, routed_experts
from dsv4.model.attention import Trace
from dsv4.model.layers import Linear, unrounded


class Gate(nn.Module):
    """The router. Learned layers select by score + ``bias`` (balancing only: it never enters a weight); hash layers
    read their experts from ``tid2eid`` by token id. Weights come from the scores in both."""

    def __init__(self, config: Config, layer: Layer) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.bias: Tensor
        self.tid2eid: Tensor
        if layer.router == "hash":
            self.register_buffer(
                "tid2eid", torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
            )
        else:
            self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D], ids int64 [N] -> experts int64 [N, K], weights float32 [N, K], scores float32 [N, E]."""
        logits = linear(x, self.weight, wide=True)
        hashed = self.layer.router == "hash"
        bias, fixed = (None, self.tid2eid[ids]) if hashed else (self.bias, None)
        return route(logits, bias, fixed, self.config.num_experts_per_tok, self.config.routed_scaling_factor)


class Expert(nn.Module):
    """W2(swiglu(W1 x, W3 x)): the shared expert, always on with weight 1, clamped like the routed ones."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = Linear(config.hidden_size, config.moe_intermediate_size)
        self.w2 = Linear(config.moe_intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return expert(x, self.w1.weight, self.w2.weight, self.w3.weight, self.limit)


class Experts(nn.Module):
    """All routed experts of a layer, stacked: w1, w3 [E, I, D]; w2 [E, D, I]. Checkpoints store them one by one."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        experts, inner, dim = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.w1 = nn.Parameter(torch.zeros(experts, inner, dim))
        self.w2 = nn.Parameter(torch.zeros(experts, dim, inner))
        self.w3 = nn.Parameter(torch.zeros(experts, inner, dim))


class MoE(nn.Module):
    """y = sum_k w_k E_k(x) + E_shared(x)."""

    def __init__(self, config: Config, layer: Layer) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.round: Callable[[Tensor], Tensor] = unrounded  # of expert weights, in quantisation-aware training
        self.gate = Gate(config, layer)
        self.experts = Experts(config)
        self.shared_experts = Expert(config)

    def forward(self, h: Tensor, ids: Tensor, trace: Trace | None) -> Tensor:
        """h [B, T, D], ids int64 [B, T] -> [B, T, D]."""
        x = h.flatten(0, 1)
        experts, weights, scores = self.gate(x, ids.flatten())
        w1, w2, w3 = (self.round(w) for w in (self.experts.w1, self.experts.w2, self.experts.w3))
        if trace is None:
            shared = (self.shared_experts.w1.weight, self.shared_experts.w2.weight, self.shared_experts.w3.weight)
            both = mixture(x, experts, weights, (w1, w2, w3), shared, self.config.swiglu_limit)
            if both is not None:
                return both.view_as(h)
        routed = routed_experts(x, experts, weights, w1, w2, w3, self.config.swiglu_limit)
        if trace is not None and self.layer.router == "learned":
            trace.load.append(torch.bincount(experts.flatten(), minlength=self.config.n_routed_experts))
            trace.balance_losses.append(self._balance(scores, experts, h.shape[0]))
        return (routed + self.shared_experts(x)).to(h.dtype).view_as(h)

    def _balance(self, scores: Tensor, experts: Tensor, batch: int) -> Tensor:
        """Sequence-wise balance loss: sum_i f_i P_i, mean over rows (1 when balanced; weighted 1e-4 by the trainer)."""
        config = self.config
        chosen = F.one_hot(experts, config.n_routed_experts).sum(1).view(batch, -1, config.n_routed_experts)
        f = chosen.float().mean(1) * (config.n_routed_experts / config.num_experts_per_tok)
        p = (scores / scores.sum(-1, keepdim=True)).view(batch, -1, config.n_routed_experts).mean(1)
        return (f * p).sum(-1).mean()
