"""Loss components of a training step. The trainer adds weighted components and knows nothing of where they come from.

N rows, D hidden, V vocabulary. A row's weight says how much its target counts: 0 for prompts, padding and the first
token of a sample. All sums are divided by the weight of the whole step, whatever it is split into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dsv4.model import Transformer

_CHUNK = {"cpu": 512, "cuda": 1 << 14}  # rows whose logits exist at one time: on a CPU they stay in the cache


@dataclass(frozen=True)
class Batch:
    """Packed samples. ids, documents int64 [B, T]; equal neighbours in `documents` are one sample. weights float32
    [B, T]: how much ids[b, t] counts as the successor of ids[b, t - 1]."""

    ids: Tensor
    documents: Tensor
    weights: Tensor

    def targets(self, ahead: int) -> tuple[Tensor, Tensor]:
        """Target ids int64 and weights float32 [B, T] for slots that predict the token `ahead` further on."""
        ids, weights = torch.zeros_like(self.ids), torch.zeros_like(self.weights)
        same = self.documents[:, ahead:] == self.documents[:, :-ahead]
        ids[:, :-ahead], weights[:, :-ahead] = self.ids[:, ahead:], self.weights[:, ahead:] * same
        return ids, weights

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(self.ids.to(device), self.documents.to(device), self.weights.to(device))


class _CrossEntropy(torch.autograd.Function):
    """sum_i weight_i * -log softmax(hidden_i head^T)[target_i]. The gradients are made in the forward pass, chunk by
    chunk, so that neither the logits nor their gradient of all rows exist at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        grads = hidden.requires_grad or head.requires_grad
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        size = _CHUNK[hidden.device.type]
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits, target = hidden[part] @ head.T, targets[part, None]
            p = logits.softmax(-1, dtype=torch.float32)
            log_z = logits.amax(-1).float() - p.amax(-1).log()  # the largest p is 1 / sum exp(logit - largest logit)
            total += ((log_z - logits.gather(1, target)[:, 0].float()) * weights[part]).sum()
            if grads:
                p.scatter_add_(1, target, torch.full_like(log_z[:, None], -1))
                slope = p.mul_(weights[part, None]).to(head.dtype)
                d_hidden[part] = slope @ head
                d_head += slope.T @ hidden[part]
        ctx.save_for_backward(d_hidden, d_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_head * grad.to(d_head.dtype), None, None


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum of the next-token losses in nats, float32 scalar. hidden [..., D], head [V, D], targets and weights
    [...]. The head multiplies in `dtype`; softmax and sums are float32. Rows of weight 0 cost nothing."""
    keep = weights.flatten().nonzero()[:, 0]
    rows = hidden.flatten(0, -2)[keep].to(dtype)
    targets, weights = targets.flatten()[keep], weights.flatten()[keep].float()
    return cast(Tensor, _CrossEntropy.apply(rows, head.to(dtype), targets, weights))


def components(model: Transformer, batch: Batch, indexer: str, mtp: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One forward pass -> components "lm", "mtp" (sums over tokens, nats), "balance", "indexer" (sums over layers of
    means), and the expert loads int64 [E] of every learned router.

    `indexer` is "off", "warmup" (only "indexer" is there) or "sparse"; `mtp` whether the MTP block is trained.
    """
    out = model.train_forward(batch.ids, batch.documents, indexer=indexer, mtp=mtp and indexer != "warmup")
    if indexer == "warmup":
        return {"indexer": out.indexer_loss}, []
    lm = cross_entropy(out.hidden, model.head.weight, *batch.targets(1), model.dtype)
    losses = {"lm": lm, "balance": out.balance_loss}
    if out.mtp_hidden is not None:
        losses["mtp"] = cross_entropy(out.mtp_hidden, model.head.weight, *batch.targets(2), model.dtype)
    if indexer == "sparse":
        losses["indexer"] = out.indexer_loss
    return losses, out.load
