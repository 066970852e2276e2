"""Weights kept as stored, and the arithmetic of the release on them: the specification of the fast kernels."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4.numerics.blocks import check, dequantise, rounded
from dsv4.numerics.formats import ACTIVATION, Format


class Packed(nn.Module):
    """A quantised matrix [out, in], or E stacked ones [E, out, in]: raw bytes ``elements`` and their ``scale``s."""

    elements: Tensor
    scale: Tensor

    def __init__(self, elements: Tensor, scale: Tensor, form: Format) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("elements", elements.view(torch.uint8))
        self.register_buffer("scale", scale if scale.dtype == torch.float32 else scale.view(torch.uint8))

    @staticmethod
    def empty(shape: tuple[int, ...], form: Format, device: torch.device | str = "cpu") -> Packed:
        """Room for a matrix of ``shape``."""
        kind = torch.float32 if form.scale == "F32" else torch.uint8
        scale = torch.empty(form.scales(shape), dtype=kind, device=device)
        return Packed(torch.empty(form.packed(shape), dtype=torch.uint8, device=device), scale, form)

    @property
    def shape(self) -> torch.Size:
        *rows, last = self.elements.shape
        return torch.Size((*rows, last * self.form.per_byte))

    def __getitem__(self, expert: int) -> Packed:
        return Packed(self.elements[expert], self.scale[expert], self.form)

    def check(self) -> Packed:
        """ValueError for NaN scales, NaN elements or scales of the wrong shape."""
        check(self.elements, self.scale, self.form)
        return self

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The exact values [.., out, in]."""
        return dequantise(self.elements, self.scale, self.form, dtype)


class Stack(Protocol):
    """E matrices of one shape, one at a time: a stacked `Packed`, or experts streamed from disk."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, expert: int) -> Packed: ...


def packed_linear(x: Tensor, weight: Packed) -> Tensor:
    """x [..., in] -> x W^T [..., out] in x's dtype: inputs rounded to E4M3 in blocks of 128 channels (power-of-two
    scales), products added up in float32 (model card B.8)."""
    return F.linear(rounded(x.float(), ACTIVATION), weight.dequantise()).to(x.dtype)


def packed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Stack, w2: Stack, w3: Stack, limit: float
) -> Tensor:
    """`dsv4.kernels.reference.routed_experts` on packed stacks: x [N, D], experts int64 [N, K], weights float32 [N, K]
    -> float32 [N, D]. Both multiplications round their inputs as `packed_linear` does; the routing weight multiplies
    the hidden vector before W2. Only the experts that are asked for are touched, in rising order."""
    out = x.new_zeros(*experts.shape, x.shape[1])
    for e in experts.unique().tolist():
        token, slot = (experts == e).nonzero(as_tuple=True)
        rows = x[token]
        gate, up = (packed_linear(rows, w[e]).float() for w in (w1, w3))
        hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weights[token, slot, None]
        out[token, slot] = packed_linear(hidden.to(x.dtype), w2[e])
    return out.float().sum(1)
