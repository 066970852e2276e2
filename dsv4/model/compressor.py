"""Token-level compression (report eqs. 9-12 and 20-23): m tokens become one entry, per channel by a learned softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.config import Config, Layer
from dsv4.kernels import pool, project, rotate
from dsv4.model.layers import Linear, Norm, unrounded
from dsv4.model.plan import Plan
from dsv4.model.state import Compression


class Compressor(nn.Module):
    """Entries of width ``dim``. With overlap (CSA) each projection has two halves and an entry pools 2 m slots: the
    first half of the previous window's tokens and the second half of the current window's."""

    def __init__(self, config: Config, layer: Layer, dim: int) -> None:
        super().__init__()
        self.ratio, self.overlap, self.dim = layer.compress_ratio, layer.overlap, dim
        self.round: Callable[[Tensor], Tensor] = unrounded
        width = 2 * dim if layer.overlap else dim
        self.wkv = Linear(config.hidden_size, width)
        self.wgate = Linear(config.hidden_size, width)
        self.ape = nn.Parameter(torch.zeros(self.ratio, width, dtype=torch.float32))
        self.norm = Norm(dim, config.rms_norm_eps)

    def forward(self, h: Tensor, plan: Plan, memory: Compression | None) -> Tensor:
        """h [B, T, D] -> every entry of the sequences so far [B, count, dim], rotated to each entry's first token."""
        entries = plan.entries[self.ratio]
        new = project(h, self.wkv.weight, self.wgate.weight, self.ape, plan.position, self.dim)
        if memory is None:
            return self._entries(new, entries.last, h.dtype, plan)
        size = memory.tail.rows.shape[1]
        if h.shape[1] == 1 and plan.valid is None:  # decoding: the ring holds whatever an entry completed now needs
            memory.tail.write_one(new, plan)
            if not entries.last.shape[1]:
                return memory.history.rows[:, : entries.count]
            rows, last = memory.tail.ordered(plan.before + 1), entries.last + size - 1
        else:
            rows, last = torch.cat((memory.tail.ordered(plan.before), new), 1), entries.last + size
            memory.tail.write(new, plan)
        return memory.history.append(self._entries(rows, last, h.dtype, plan), entries)

    def _entries(self, rows: Tensor, last: Tensor, dtype: torch.dtype, plan: Plan) -> Tensor:
        """rows float32 [B, S, :] projected tokens; last int64 [B, n] where each entry's last token stands in them ->
        [B, n, dim]."""
        m, dim, entries = self.ratio, self.dim, plan.entries[self.ratio]
        row = torch.arange(last.shape[0], device=last.device)[:, None, None] * rows.shape[1]
        window = last[..., None] - torch.arange(m - 1, -1, -1, device=last.device)

        def take(index: Tensor, part: Tensor) -> Tensor:
            # As an embedding: its backward adds whole rows, an advanced index's goes element by element.
            return F.embedding(
                row + index.clamp(min=0), part.flatten(0, 1)
            )  # rows with fewer entries are padded: token 0

        kv, gate = take(window, rows[..., -2 * dim :]).split(dim, -1)  # [B, n, m, dim]
        if self.overlap:
            old_kv, old_gate = take(window - m, rows[..., : 2 * dim]).split(dim, -1)
            # A sequence's first entry has no previous window: value 0, gate -inf.
            early = (plan.position.gather(1, entries.last) < 2 * m - 1)[..., None, None]
            kv = torch.cat((old_kv.masked_fill(early, 0), kv), 2)
            gate = torch.cat((old_gate.masked_fill(early, -torch.inf), gate), 2)
        return self.round(rotate(self.norm(pool(kv, gate).to(dtype)), entries.angles))
