"""Linear layers and experts in C++: any number of rows, and a row's result never depends on the others.

One pass over the weights when there are few rows (decoding: the memory's bandwidth), blocks that stay in the caches
when there are many. For many rows torch's own product wins in bfloat16 with AVX-512 and in float32 without it, so
`usable` leaves those to it unless DSV4_EXACT asks for results that are the same to the bit in every batch.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels.cpu.library import call, levels, library
from dsv4.numerics import Packed

_MANY, _COPY = 48, 256
EXACT = os.environ.get("DSV4_EXACT", "0") not in ("", "0")


def plain(x: Tensor, *weights: Tensor) -> bool:
    """No gradient wanted, one dtype of float32 or bfloat16 on the CPU, contiguous weights and a compiled library."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or library(x.dtype) is None:
        return False
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    return not wanted and x.numel() > 0 and all(w.dtype == x.dtype and w.is_contiguous() for w in weights)


def usable(x: Tensor, weight: Tensor) -> bool:
    """`plain`, and faster than torch."""
    return plain(x, weight) and not many(x)


def many(x: Tensor) -> bool:
    """So many rows that torch's product is faster: in bfloat16 with AVX-512, in float32 without."""
    return x.numel() >= _MANY * x.shape[-1] and not EXACT and (x.dtype == torch.bfloat16) == _torch_multiplies()


@cache
def _torch_multiplies() -> bool:
    """Whether torch's bfloat16 product is worth waiting for: without AVX-512 it reaches a fifth of ours."""
    return platform.machine() not in ("x86_64", "AMD64") or "avx512" in levels()


def linear(x: Tensor, weight: Tensor | Packed, wide: bool = False) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; float32 when ``wide``."""
    return grouped_linear(x.unsqueeze(-2), weight, wide).squeeze(-2)


def grouped_linear(x: Tensor, weight: Tensor | Packed, wide: bool = False) -> Tensor:
    """x [..., G, in], weight [G * out, in] -> [..., G, out]. A packed weight here does not round x."""
    x = x.contiguous()
    groups, width, out = *x.shape[-2:], weight.shape[0] // x.shape[-2]
    wide = wide and x.dtype != torch.float32
    y = torch.empty(*x.shape[:-1], out, dtype=torch.float32 if wide else x.dtype)
    stored = (weight.elements, powers(weight)) if isinstance(weight, Packed) else (weight, None)
    sizes = (x.numel() // (groups * width), out, width, groups)
    call("linear_wide" if wide else "linear", x.dtype, x, _bits(weight), *stored, y, *sizes)
    return y


def routed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float
) -> Tensor:
    """See the reference of the same name; here a token adds its experts in the order of their numbers."""
    table = _places(w1, w2, w3, w1[:, :0], w2[:, :0], w3[:, :0])
    return _experts(x, experts, weights, table, _bits(w1), w1.shape[1], limit)


def _places(*stacks: Tensor) -> Tensor:
    """int64 [E, 6]: where every expert's part of these stacks [E, ..] begins."""
    starts = torch.tensor([t.data_ptr() for t in stacks])
    steps = torch.tensor([t.stride(0) * t.element_size() for t in stacks])
    return starts + steps * torch.arange(stacks[0].shape[0])[:, None]


def _kept(w1: Packed, w2: Packed, w3: Packed) -> Tensor:
    """`_places` of packed stacks, or of one expert's matrices, found once: elements and scales stay where they are."""
    stacks = [t for w in (w1, w2, w3) if (t := powers(w)) is not None]
    stacks = [w1.elements, w2.elements, w3.elements, *stacks]
    places = [t.data_ptr() for t in stacks]
    if w1.__dict__.get("places", (None,))[0] != places:
        stacks = [t if t.dim() == 3 else t[None] for t in stacks]
        w1.__dict__["places"] = places, _places(*stacks)
    table: Tensor = w1.__dict__["places"][1]
    return table


def packed_expert(x: Tensor, w1: Packed, w2: Packed, w3: Packed, limit: float) -> Tensor:
    """Every row x [N, D] through one expert with weight 1, as `packed_experts` does: float32 [N, D]."""
    owner, ones = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
    return _experts(x, owner, ones, _kept(w1, w2, w3), _bits(w1), w1.shape[0], limit)


def mixture(
    x: Tensor, experts: Tensor, weights: Tensor, routed: tuple[Packed, ...], shared: tuple[Packed, ...], limit: float
) -> Tensor:
    """`packed_experts` and `packed_expert` together: [N, D] in bf16."""
    x, experts, weights, out = x.contiguous(), experts.contiguous(), weights.contiguous(), torch.empty_like(x)
    sizes = (*experts.shape, len(routed[0].elements), x.shape[-1], routed[0].shape[1], shared[0].shape[0])
    tables = _kept(*routed), _kept(*shared)
    call("mixture", x.dtype, x, _bits(routed[0]), weights, experts, *tables, out, *sizes, limit)
    return out


def project(x: Tensor, values: Tensor, gates: Tensor, ape: Tensor, position: Tensor, dim: int) -> Tensor:
    """See `dsv4.kernels.project`."""
    x, position, (width, channels) = x.contiguous(), position.contiguous(), values.shape
    out, rows = torch.empty(*x.shape[:-1], 2 * width), position.numel()
    call("project", x.dtype, x, values, gates, ape, position, out, rows, width, channels, dim, len(ape))
    return out


def _experts(
    x: Tensor, experts: Tensor, weights: Tensor, table: Tensor, bits: int, inner: int, limit: float,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rows, choices = experts.shape
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    out = torch.zeros(rows, x.shape[-1]) if out is None else out
    sizes = (rows, choices, len(table), x.shape[-1], inner)
    call("experts", x.dtype, x, bits, weights, experts, table, out, *sizes, limit)
    return out


def packed_usable(x: Tensor, weight: Packed, *others: Packed) -> bool:
    """Rows of a multiple of 32 elements, scales that are powers of two, no gradient, a CPU and a compiled library."""
    kind = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    fits = all(w.shape[-1] % 32 == 0 and powers(w) is not None for w in (weight, *others))
    return kind and fits and not (torch.is_grad_enabled() and x.requires_grad) and library(torch.bfloat16) is not None


def powers(weight: Packed) -> Tensor | None:
    """The scales as biased exponents (uint8), or None where one is no power of two (a Base model's are float32)."""
    scale = weight.scale
    if scale.dtype == torch.uint8:
        return scale
    if "powers" not in weight.__dict__:
        words = scale.view(torch.int32)
        exact = not bool((words & 0x807FFFFF).any())
        weight.__dict__["powers"] = (words >> 23).to(torch.uint8) if exact else None
    found: Tensor | None = weight.__dict__["powers"]
    return found


def _bits(weight: Tensor | Packed) -> int:
    """Bits of an element: how the C++ tells kinds of weights apart."""
    return 8 // weight.form.per_byte if isinstance(weight, Packed) else 8 * weight.element_size()


def rounded(x: Tensor) -> Tensor:
    """x [..., in] in E4M3 blocks of 128 channels, as bf16 (exact): `numerics.rounded(x, ACTIVATION)`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    call("round_rows", x.dtype, x, out, x.numel() // x.shape[-1], x.shape[-1])
    return out.bfloat16()


def packed_linear(x: Tensor, weight: Packed) -> Tensor:
    """See `numerics.packed_linear`: the weight is read as it is stored. For many rows it is worth a copy in bf16."""
    (out, width), rows = weight.shape, x.numel() // x.shape[-1]
    if worth_a_copy(x):
        return F.linear(rounded(x), expanded(weight))
    if x.dtype == torch.float32:
        return linear(rounded(x), weight, wide=True)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], out)
    call("rounded_linear", x.dtype, x, _bits(weight), weight.elements, powers(weight), y, rows, out, width)
    return y


def worth_a_copy(x: Tensor) -> bool:
    """So many rows that torch's product and an expanded weight are faster."""
    return x.dtype == torch.bfloat16 and x.numel() >= _COPY * x.shape[-1] and not EXACT and _torch_multiplies()


def expanded(weight: Packed) -> Tensor:
    """The exact values of a matrix in bf16 [out, in]."""
    values = torch.empty(weight.shape, dtype=torch.bfloat16)
    call("expand", values.dtype, _bits(weight), weight.elements, powers(weight), values, *weight.shape)
    return values


def packed_experts(x: Tensor, experts: Tensor, weights: Tensor, w1: Any, w2: Any, w3: Any, limit: float) -> Tensor:
    """See `numerics.packed_experts`. A streamed stack is asked for the chosen experts alone, at most ``w1.room`` at a
    time, half of them being read while the others work; in rising order, so that the sums are those of one call."""
    if isinstance(w1, Packed):
        return _experts(x, experts, weights, _kept(w1, w2, w3), _bits(w1), w1.shape[1], limit)
    out = torch.zeros(*x.shape)
    used = experts.unique().tolist()
    size = len(used) if len(used) <= w1.room else max(w1.room // 2, 1)
    turns = [used[start : start + size] for start in range(0, len(used), size)]
    w1.ask(turns[0])
    for turn, following in zip(turns, [*turns[1:], []]):
        table, held = torch.zeros(w1.shape[0], 6, dtype=torch.int64), []
        for e in turn:
            one = [w[e] for w in (w1, w2, w3)]
            held.append([*(w.elements for w in one), *(p for w in one if (p := powers(w)) is not None)])
            table[e] = torch.tensor([t.data_ptr() for t in held[-1]])
        w1.ask(following)
        _experts(x, experts, weights, table, _bits(one[0]), w1.shape[1], limit, out)
    return out
