"""The whole network, in the order of the data: embedding, streams, blocks, collapse, head (report 2; model card
B.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv4.config import Config
from dsv4.kernels import linear
from dsv4.model.attention import Trace
from dsv4.model.block import Block
from dsv4.model.dtypes import dtype_of
from dsv4.model.hyper_connections import Site
from dsv4.model.layers import Embedding, Linear, Norm
from dsv4.model.mtp import MTP, shifted
from dsv4.model.plan import Plan
from dsv4.model.rope import frequencies
from dsv4.model.state import State


@dataclass
class TrainOutput:
    """What a training step needs. hidden and mtp_hidden [B, T, D] go through `Transformer.logits`; slot t predicts
    token t + 1, and t + 2 for MTP. load: int64 [E] per learned router. The losses are unweighted means over layers'
    queries or rows, summed over layers."""

    hidden: Tensor
    mtp_hidden: Tensor | None
    load: list[Tensor]
    balance_loss: Tensor
    indexer_loss: Tensor


class Transformer(Site):
    """DeepSeek-V4. Parameter names are the checkpoint's, routed experts stacked."""

    def __init__(
        self, config: Config, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            self.embed = Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(Block(config, layer) for layer in config.layers)
            self.mtp = nn.ModuleList(MTP(config, layer) for layer in config.mtp_layers)
            self.norm = Norm(config.hidden_size, config.rms_norm_eps)
            self.head = Linear(config.hidden_size, config.vocab_size)
            self.add_site("head", config.hc_mult, 1)
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(dtype_of(name, dtype))
        self._frequencies: dict[str, Tensor] = frequencies(config)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(self, ids: Tensor, state: State | None = None, lengths: Tensor | list[int] | None = None) -> Tensor:
        """ids int64 [B, T] -> logits float32 [B, T, vocab_size].

        With a ``state`` the tokens are appended to it; any chunking gives the same logits. ``lengths`` int64 [B]: row b
        has that many real tokens, the rest is padding on the right (its logits mean nothing and it leaves no trace).
        """
        streams, _ = self._trunk(ids, state, lengths, None, None)
        return self.logits(self._final(streams))

    def last_logits(self, ids: Tensor, state: State, lengths: Tensor | list[int] | None = None) -> Tensor:
        """Like `forward`, but only each row's last real token goes through the head: float32 [B, vocab_size]."""
        streams, plan = self._trunk(ids, state, lengths, None, None)
        last = (plan.after - plan.before - 1).clamp(min=0)
        return self.logits(self._final(streams[torch.arange(len(last), device=last.device), last]))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> float32 [..., vocab_size]; the head multiplies in float32 (model card B.9)."""
        return linear(hidden, self.head.weight, wide=True)

    def new_state(self, batch: int = 1) -> State:
        """The empty memory of ``batch`` sequences."""
        return State.empty(self.config, self.config.layers, batch, self.dtype, self.device)

    def train_forward(self, ids: Tensor, documents: Tensor, indexer: str = "sparse", mtp: bool = True) -> TrainOutput:
        """Packed samples. ids, documents int64 [B, T]: equal neighbours in ``documents`` are one sample, and samples
        never see each other. ``indexer``: "off" (dense), "warmup" (dense; only the indexer gets gradients) or
        "sparse"."""
        if indexer not in ("off", "warmup", "sparse"):
            raise ValueError(f"indexer must be off, warmup or sparse, got {indexer!r}")
        trace = Trace(indexer)
        with torch.set_grad_enabled(torch.is_grad_enabled() and indexer != "warmup"):
            streams, plan = self._trunk(ids, None, None, documents, trace)
            hidden, guess = self._final(streams), None
            if mtp and self.mtp:
                following, block = shifted(ids), self.mtp[0]
                assert isinstance(block, MTP)
                guess, _ = block.predict(streams, self.embed(following), following, plan, None, trace)
        zero = torch.zeros((), device=ids.device)
        balance = torch.stack(trace.balance_losses).sum() if trace.balance_losses else zero
        index = torch.stack(trace.index_losses).sum() if trace.index_losses else zero
        return TrainOutput(hidden, guess, trace.load, balance, index)

    @torch.no_grad()
    def update_bias(self, loads: list[Tensor], gamma: float) -> None:
        """Aux-loss-free balancing (report 2.1, V3): b_i += gamma sign(mean load - load_i), one load per learned
        router."""
        gates = [block.ffn.gate for block in (*self.layers, *self.mtp) if block.layer.router == "learned"]
        for gate, load in zip(gates, loads):  # loads of a step without MTP are shorter by its one
            load = load.float()
            gate.bias += gamma * torch.sign(load.mean() - load)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Transformer:
        """Normal(0, initializer_range) matrices; norms 1; mHC gates 0.01 and static maps that start at the plain
        residual (pre = 1/n, post = 1, comb close to the identity); hash tables spread every id over K distinct
        experts."""
        config, generator = self.config, torch.Generator().manual_seed(seed)
        n = config.hc_mult
        for name, p in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf.endswith("_scale"):
                p.fill_(0.01)
            elif leaf.endswith("_base"):
                p.zero_()
                p[:n] = -math.log(n - 1) if n > 1 else 0.0
                if len(p) > n:
                    p[2 * n :] = 4 * torch.eye(n).flatten()
            elif p.dim() > 1 and leaf != "ape":
                p.copy_(
                    torch.empty(p.shape, dtype=torch.float32).normal_(0, config.initializer_range, generator=generator)
                )
        for block in (*self.layers, *self.mtp):
            gate = block.ffn.gate
            if block.layer.router == "hash":
                order = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(1)
                gate.tid2eid.copy_(order[:, : config.num_experts_per_tok])
        return self

    def _trunk(
        self,
        ids: Tensor,
        state: State | None,
        lengths: Tensor | list[int] | None,
        documents: Tensor | None,
        trace: Trace | None,
    ) -> tuple[Tensor, Plan]:
        if ids.dim() != 2 or not ids.shape[1]:
            raise ValueError(f"ids must be [batch, tokens] with at least one token, got {tuple(ids.shape)}")
        before = state.length if state is not None else ids.new_zeros(ids.shape[0])
        if len(before) != len(ids):
            raise ValueError(f"ids has {len(ids)} rows, the state has {len(before)}")
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=ids.device)
            if int(lengths.max()) > ids.shape[1] or int(lengths.min()) < 0 or len(lengths) != len(ids):
                raise ValueError(f"lengths {lengths.tolist()} do not fit ids of shape {tuple(ids.shape)}")
        turns = {kind: f.to(ids.device) for kind, f in self._frequencies.items()}
        plan = Plan.build(self.config, (ids.shape[0], ids.shape[1]), turns, before, lengths, documents)
        streams = self.embed(ids).unsqueeze(-2).expand(-1, -1, self.config.hc_mult, -1)
        for i, block in enumerate(self.layers):
            streams = block(streams, ids, plan, state and state.layers[i], trace)
        if state is not None:
            state.length = plan.after
        return streams, plan

    def _final(self, streams: Tensor) -> Tensor:
        return self.norm(self.exit(streams))
