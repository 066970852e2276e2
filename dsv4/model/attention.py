"""Hybrid attention (report 2.3): a 128-token window in every layer, joined under one softmax by compressed entries,
either all of them (HCA) or the indexer's choice (CSA).

B rows, T tokens, H heads, d = head_dim, E entries, K = index_topk, W = window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.config import Config, Layer
from dsv4.kernels import (
    attend,
    attention_inputs,
    attention_output,
    choose,
    grouped_linear,
    joint_attention,
    rms_norm,
    rotate,
    top_mask,
)
from dsv4.model.compressor import Compressor
from dsv4.model.indexer import Indexer, index_loss
from dsv4.model.layers import Linear, Norm, unrounded
from dsv4.model.plan import Plan
from dsv4.model.state import LayerState


@dataclass
class Trace:
    """What training collects on the way through. ``indexer``: "off" attends to every visible entry, "warmup" also, and
    trains only the indexer; "sparse" attends to the top-k and trains the indexer on them."""

    indexer: str
    index_losses: list[Tensor] = field(default_factory=list)
    balance_losses: list[Tensor] = field(default_factory=list)
    load: list[Tensor] = field(default_factory=list)


def differentiable(trace: Trace | None) -> bool:
    """Whether the attention must keep what gradients need (`Attention._attend`), or may only read (`_read`)."""
    return trace is not None or torch.is_grad_enabled()


class Attention(nn.Module):
    """Parameters carry the checkpoint's names. wo_a is [o_groups * o_lora_rank, H / o_groups * d]."""

    def __init__(self, config: Config, layer: Layer) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.round: Callable[[Tensor], Tensor] = unrounded  # of KV rows
        heads, d, rank, eps = config.num_attention_heads, config.head_dim, config.q_lora_rank, config.rms_norm_eps
        self.wq_a = Linear(config.hidden_size, rank)
        self.q_norm = Norm(rank, eps)
        self.wq_b = Linear(rank, heads * d)
        self.wkv = Linear(config.hidden_size, d)
        self.kv_norm = Norm(d, eps)
        self.attn_sink = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.wo_a = Linear(heads // config.o_groups * d, config.o_groups * config.o_lora_rank)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, config.hidden_size)
        if layer.compress_ratio:
            self.compressor = Compressor(config, layer, d)
        if layer.indexer:
            self.indexer = Indexer(config, layer)

    def forward(self, h: Tensor, plan: Plan, memory: LayerState | None, trace: Trace | None) -> Tensor:
        """h [B, T, D] (normed) -> [B, T, D]."""
        angles = plan.angles[self.layer.rope]
        matrices = self.wq_a.weight, self.q_norm.weight, self.wq_b.weight, self.wkv.weight, self.kv_norm.weight
        inputs = attention_inputs(h, *matrices, angles, self.config.rms_norm_eps)
        if inputs is None:
            latent = self.q_norm(self.wq_a(h))
            q = self.wq_b(latent).unflatten(-1, (-1, self.config.head_dim))
            q = rotate(rms_norm(q, None, self.config.rms_norm_eps), angles.unsqueeze(-2))
            inputs = latent, q, rotate(self.kv_norm(self.wkv(h)), angles)
        latent, q, kv = inputs
        kv = self.round(kv)  # one head: keys and values are the same rows
        if not differentiable(trace):
            o = self._read(q, kv, h, latent, plan, memory)
        else:
            o = self._attend(q, kv, h, latent, plan, memory, trace)
        out = attention_output(o, self.wo_a.weight, self.wo_b.weight, angles, self.config.o_groups)
        return self._project(rotate(o, angles.conj().unsqueeze(-2))) if out is None else out

    def _project(self, o: Tensor) -> Tensor:
        """Grouped output projection (report 2.3.1): consecutive heads form a group. [B, T, H, d] -> [B, T, D]."""
        low = grouped_linear(o.reshape(*o.shape[:2], self.config.o_groups, -1), self.wo_a.weight)
        return self.wo_b(low.flatten(-2))

    def _read(self, q: Tensor, kv: Tensor, h: Tensor, latent: Tensor, plan: Plan, memory: LayerState | None) -> Tensor:
        """The core of inference: every query reads its own rows, and no array grows with tokens x entries."""
        layer, far, low, high, picked = self.layer, None, None, None, None
        if layer.compress_ratio:
            entries = plan.entries[layer.compress_ratio]
            far, low, high = self.compressor(h, plan, memory.kv if memory else None), entries.low, entries.high
            if layer.indexer:
                keys = self.indexer.keys(h, plan, memory.index if memory else None)
                if entries.count > self.config.index_topk:  # otherwise every visible entry is read
                    queries = self.indexer.queries(h, latent, plan.angles[layer.rope])
                    picked = choose(*queries, keys, low, high, self.config.index_topk)
        ring = memory is not None and q.shape[1] == 1 and plan.valid is None  # decoding: the ring is read where it lies
        near, scale = self._window(kv, plan, memory, ring), q.shape[-1] ** -0.5
        span = plan.ring_span if ring else plan.span
        out = attend(q, near, *span, far, low, high, picked, self.attn_sink, scale)
        if memory is not None and not ring:
            memory.window.write(kv, plan)
        return out

    def _attend(
        self,
        q: Tensor,
        kv: Tensor,
        h: Tensor,
        latent: Tensor,
        plan: Plan,
        memory: LayerState | None,
        trace: Trace | None,
    ) -> Tensor:
        """The core with gradients: every query against every row in reach, under masks."""
        layer = self.layer
        far = far_mask = scores = None
        if layer.compress_ratio:
            entries = self.compressor(h, plan, memory.kv if memory else None)
            if entries.shape[1]:
                far, far_mask = entries, plan.entries[layer.compress_ratio].visible()
        learn = trace is not None and trace.indexer != "off" and (torch.is_grad_enabled() or trace.indexer == "warmup")
        if layer.indexer and (trace is None or trace.indexer != "off"):
            with torch.set_grad_enabled(learn):
                # Detached inputs: the indexer learns from its own loss alone, the model from the language loss alone.
                h, latent = h.detach(), latent.detach()
                keys = self.indexer.keys(h, plan, memory.index if memory else None)
                if far is not None and (trace is not None or far.shape[1] > self.config.index_topk):
                    scores = Indexer.score(*self.indexer.queries(h, latent, plan.angles[layer.rope]), keys)
        sparse = trace is None or trace.indexer == "sparse"
        if sparse and far is not None and far_mask is not None and scores is not None:
            far, far_mask, scores = self._select(far, far_mask, scores)
        near, near_mask = self._blocks(self._window(kv, plan, memory, False), plan)
        out, p_far = joint_attention(q, near, near_mask, far, far_mask, self.attn_sink, q.shape[-1] ** -0.5)
        if trace is not None and learn and scores is not None and p_far is not None and far_mask is not None:
            with torch.enable_grad():
                total, count = index_loss(scores, p_far.float().sum(2), far_mask)
                trace.index_losses.append(total / count.clamp(min=1))
        if memory is not None:
            memory.window.write(kv, plan)
        return out

    def _blocks(self, window: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Window rows [B, W + T, d] -> the rows that each block of queries can reach [B * T / block, W + block, d], and
        which of them each query may see, bool [B or 1, T, W + block]. A block: the largest divisor of T up to W / 2."""
        size, tokens = self.layer.window, plan.reach.shape[1]
        block = next(b for b in range(max(size // 2, 1), 0, -1) if tokens % b == 0)
        near = window.unfold(1, size + block, block).mT.reshape(-1, size + block, window.shape[-1])
        i = torch.arange(tokens, device=window.device) % block
        back = i[:, None] + size - torch.arange(size + block, device=window.device)
        return near, (back >= 0) & (back <= plan.reach[..., None])

    def _select(self, far: Tensor, visible: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top-k (eq. 17). Up to twice K entries a mask is cheaper than moving rows; beyond that each query's K rows are
        gathered, so the cost follows the window and K, not the context. Returns keys, mask and scores alike in
        shape."""
        batch, count, k = *far.shape[:2], self.config.index_topk
        top = top_mask(scores.detach().masked_fill(~visible, -torch.inf), k)
        if count <= 2 * k:
            return far, top & visible, scores
        index = top.nonzero()[:, -1].view(*top.shape[:2], k)
        row = torch.arange(batch, device=far.device)[:, None, None] * count
        gathered = F.embedding(row + index, far.flatten(0, 1)).flatten(0, 1)  # [B * T, K, d]
        return gathered, visible.gather(-1, index), scores.gather(-1, index)

    def _window(self, kv: Tensor, plan: Plan, memory: LayerState | None, ring: bool) -> Tensor:
        """Window rows in front of the new ones [B, W + T, d]; for one token of decoding the ring itself [B, W, d]."""
        if memory is None:
            return F.pad(kv, (0, 0, self.layer.window, 0))
        if ring:
            memory.window.write_one(kv, plan)
            return memory.window.rows
        return torch.cat((memory.window.ordered(plan.before), kv), 1)
