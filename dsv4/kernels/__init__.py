"""The hot operations, one name each. This file is the only place that chooses a backend.

`reference` is plain torch: the specification of every operation, and what runs when nothing faster is there.
`cpu` is C++ compiled at first use, for what plain torch does badly. `triton` is for inference on one CUDA device, where
triton is installed. DSV4_KERNELS=reference switches both off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4 import numerics
from dsv4.kernels import reference
from dsv4.kernels import triton as _triton
from dsv4.kernels.cpu import attend as _cpu_attend
from dsv4.kernels.cpu import attention as _cpu_attention
from dsv4.kernels.cpu import compress as _cpu_compress
from dsv4.kernels.cpu import decode as _cpu_decode
from dsv4.kernels.cpu import hyper_connections as _cpu_hc
from dsv4.kernels.cpu import linear as _cpu_linear
from dsv4.kernels.cpu import rope as _cpu_rope
from dsv4.kernels.cpu import route as _cpu_route
from dsv4.kernels.cpu import rows as _cpu_rows
from dsv4.kernels.cpu import sample as _cpu_sample
from dsv4.kernels.reference import decode as _decode
from dsv4.kernels.reference import swiglu, top_mask
from dsv4.numerics import Packed

__all__ = [
    "attend",
    "attention_inputs",
    "attention_output",
    "choose",
    "collapse",
    "expert",
    "grouped_linear",
    "hc_enter",
    "hc_leave",
    "index_queries",
    "index_row",
    "joint_attention",
    "kv_row",
    "linear",
    "mixture",
    "pool",
    "project",
    "rms_norm",
    "rotate",
    "route",
    "routed_experts",
    "sample",
    "stream_logits",
    "swiglu",
    "top_mask",
]


def hc_enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams -> sub-layer input and the maps for `hc_leave`; `reference.hc_enter` is the specification."""
    backend = _hyper_connections(streams, fn, base, scale)
    return backend.hc_enter(streams, fn, base, scale, iterations, rms_eps, eps)


def stream_logits(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """What a site's maps are made of; `reference.stream_logits` is the specification."""
    v = streams.flatten(-2).float()
    return linear(v, fn, wide=True) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def collapse(streams: Tensor, weight: Tensor) -> Tensor:
    """Streams [..., n, D] to one; `reference.collapse` is the specification. Term by term: a matrix product would add
    in an order that depends on the batch."""
    total = weight[..., :1] * streams[..., 0, :].float()
    for j in range(1, streams.shape[-2]):
        total = total + weight[..., j : j + 1] * streams[..., j, :].float()
    return total.to(streams.dtype)


def hc_leave(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Sub-layer output back into the streams; `reference.hc_leave` is the specification."""
    return _hyper_connections(streams, y, post, comb).hc_leave(streams, y, post, comb)


def _hyper_connections(streams: Tensor, *others: Tensor) -> Any:
    if _triton.usable(streams, *others, backward=True):
        return _triton.hyper_connections
    return _cpu_hc if _cpu_hc.usable(streams) else reference


def joint_attention(
    q: Tensor, near: Tensor, near_mask: Tensor, far: Tensor | None, far_mask: Tensor | None, sink: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Window rows and compressed rows under one softmax with a sink; `reference.joint_attention` is the
    specification."""
    backend = _cpu_attention if _cpu_attention.usable(q) else reference
    return backend.joint_attention(q, near, near_mask, far, far_mask, sink, scale)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last axis; `reference.rms_norm` is the specification."""
    return _norm(x, weight).rms_norm(x, weight, eps)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Partial interleaved RoPE; `reference.rotate` is the specification."""
    return _norm(x, angles, backward=True).rotate(x, angles)


def _norm(x: Tensor, other: Tensor | None, backward: bool = False) -> Any:
    if _triton.usable(x, other, backward=backward):
        return _triton.norm
    return _cpu_rope if _cpu_rope.usable(x) else reference


def attention_inputs(
    h: Tensor, wq_a: Any, q_norm: Tensor, wq_b: Any, wkv: Any, kv_norm: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Latent [B, T, rank], queries [B, T, H, d] and KV rows [B, T, d], both turned, of h [B, T, D] in one call; None
    where that is no faster than `linear`, `rms_norm` and `rotate`, whose result it is."""
    if _triton.usable(h):
        return None
    if not _cpu_decode.usable(h, wq_a, wq_b, wkv):
        one = _plain_row(h, wq_a, wq_b, wkv)
        return _decode.attention_inputs(h, wq_a, q_norm, wq_b, wkv, kv_norm, angles, eps) if one else None
    return _cpu_decode.attention_inputs(h, wq_a, q_norm, wq_b, wkv, kv_norm, angles, eps)


def attention_output(o: Tensor, wo_a: Any, wo_b: Any, angles: Tensor, groups: int) -> Tensor | None:
    """o [B, T, H, d] turned back by ``angles`` and through the grouped output projection, [B, T, D], in one call; None
    where that is no faster than `rotate`, `grouped_linear` and `linear`, whose result it is."""
    if _triton.usable(o):
        return None
    if not _cpu_decode.usable(o.flatten(-2), wo_a, wo_b):
        one = _plain_row(o.flatten(-2), wo_a, wo_b)
        return _decode.attention_output(o, wo_a, wo_b, angles, groups) if one else None
    return _cpu_decode.attention_output(o, wo_a, wo_b, angles, groups)


def index_queries(
    h: Tensor, latent: Tensor, wq_b: Any, proj: Tensor, angles: Tensor, size: float
) -> tuple[Tensor, Tensor] | None:
    """The indexer's queries [B, T, H, dim] of latent [B, T, rank], turned, and its heads' weights float32 [B, T, H] of
    h [B, T, D] and proj [H, D], times ``size``, in one call; None where that is no faster than `linear` and `rotate`,
    whose result it is (from C++ to the bit)."""
    if _triton.usable(h):
        return None
    if not (_cpu_decode.usable(latent, wq_b) and _cpu_linear.plain(h, proj)):
        one = _plain_row(h, wq_b, proj)
        return _decode.index_queries(h, latent, wq_b, proj, angles, size) if one else None
    return _cpu_decode.index_queries(h, latent, wq_b, proj, angles, size)


def _plain_row(x: Tensor, *weights: Any) -> bool:
    """Whether `reference.decode` does best what is asked for."""
    return _decode.alone(x, *weights) and not _cpu_linear.plain(x, *weights)


def linear(x: Tensor, weight: Tensor | Packed, wide: bool = False) -> Tensor:
    """x [..., in], weight [out, in] -> x W^T [..., out]. ``wide``: multiplied and returned in float32, whatever the two
    are stored in. `numerics.packed_linear` is the specification for packed weights."""
    if isinstance(weight, Packed):
        if _triton.usable(x, weight.elements):
            return _triton.linear.packed_linear(x, weight)
        return (_cpu_linear if _cpu_linear.packed_usable(x, weight) else numerics).packed_linear(x, weight)
    if wide and x.dtype != weight.dtype:
        x, weight = x.float(), weight.float()
    if _triton.exact(x, weight):
        return _triton.linear.linear(x, weight, wide)
    if _cpu_linear.usable(x, weight):
        return _cpu_linear.linear(x, weight, wide)
    if not wide or weight.dtype == torch.float32 or x.shape[:-1].numel() > 16:
        return reference.linear(*((x.float(), weight.float()) if wide else (x, weight)))
    # Few rows: the matrix is widened a piece at a time, in the cache.
    return torch.cat([reference.linear(x.float(), rows.float()) for rows in weight.split(2048)], -1)


def grouped_linear(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """x [..., G, in], weight [G * out, in] -> [..., G, out]: every group through its own matrix. A packed weight is
    expanded and x is not rounded, as the official converter does with wo_a."""
    if isinstance(weight, Packed):
        if _triton.usable(x, weight.elements):
            return _triton.linear.grouped_linear(x, weight)
        usable = x.dtype == torch.bfloat16 and _cpu_linear.packed_usable(x, weight)
        if usable and not _cpu_linear.worth_a_copy(x):
            return _cpu_linear.grouped_linear(x, weight)
        weight = _cpu_linear.expanded(weight) if usable else weight.dequantise(x.dtype)
    elif _triton.exact(x, weight):
        return _triton.linear.grouped_linear(x, weight)
    elif _cpu_linear.usable(x, weight):
        return _cpu_linear.grouped_linear(x, weight)
    return reference.grouped_linear(x, weight)


def route(
    logits: Tensor, bias: Tensor | None, fixed: Tensor | None, k: int, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The router (report 2.1): logits float32 [N, E] -> experts int64 [N, k], their weights float32 [N, k] (they sum to
    ``factor``) and the affinities sqrt(softplus(logits)) [N, E]. The experts are the best under affinity + bias [E],
    the lowest number first among equals, or ``fixed`` int64 [N, k]; `reference.route` is the specification."""
    if _triton.usable(logits, bias, fixed):
        return _triton.route.route(logits, bias, fixed, k, factor)
    return (_cpu_route if _cpu_route.usable(logits) else reference).route(logits, bias, fixed, k, factor)


def routed_experts(x: Tensor, experts: Tensor, weights: Tensor, w1: Any, w2: Any, w3: Any, limit: float) -> Tensor:
    """Every token through its own experts; `reference.routed_experts` is the specification, `numerics.packed_experts`
    for packed or streamed stacks."""
    if isinstance(w1, Packed) and _triton.usable(x, weights, w1.elements):
        return _triton.experts.packed_experts(x, experts, weights, w1, w2, w3, limit)
    if not isinstance(w1, Tensor):
        first = w1 if isinstance(w1, Packed) else w1[int(experts[0, 0])]
        usable = x.dtype == torch.bfloat16 and w2.shape[-1] % 32 == 0 and _cpu_linear.packed_usable(x, first)
        return (_cpu_linear if usable else numerics).packed_experts(x, experts, weights, w1, w2, w3, limit)
    if _triton.usable(x, weights, w1, w2, w3) and w1.dtype == x.dtype:
        return _triton.experts.routed_experts(x, experts, weights, w1, w2, w3, limit)
    backend = _cpu_linear if _cpu_linear.plain(x, w1, w2, w3) else reference
    return backend.routed_experts(x, experts, weights, w1, w2, w3, limit)


def expert(x: Tensor, w1: Any, w2: Any, w3: Any, limit: float) -> Tensor:
    """Every row through one expert with weight 1: x [N, D] -> W2 swiglu(W1 x, W3 x), float32 [N, D]."""
    if isinstance(w1, Tensor) and _cpu_linear.plain(x, w1, w2, w3) and not _cpu_linear.many(x):
        everyone = torch.zeros(len(x), 1, dtype=torch.int64)
        return routed_experts(x, everyone, torch.ones(len(x), 1), w1[None], w2[None], w3[None], limit)
    if isinstance(w1, Packed) and _packed_expert(x, w1, w2, w3):
        return _cpu_linear.packed_expert(x, w1, w2, w3, limit)
    hidden = swiglu(linear(x, w1).float(), linear(x, w3).float(), limit)
    return linear(hidden.to(x.dtype), w2).float()


def mixture(
    x: Tensor, experts: Tensor, weights: Tensor, routed: tuple[Any, ...], shared: tuple[Any, ...], limit: float
) -> Tensor | None:
    """Routed experts (their stacks w1, w2, w3) and the shared one in one call, [N, D] in x's dtype; None where that is
    no faster than the two calls whose sum it is, `routed_experts` and `expert`."""
    packed = isinstance(routed[0], Packed) and isinstance(shared[0], Packed) and shared[0].form.per_byte == 1
    if packed and routed[1].shape[-1] % 32 == 0 and _packed_expert(x, *routed, *shared):
        return _cpu_linear.mixture(x, experts, weights, routed, shared, limit)
    if _plain_row(x, *routed, *shared):
        return _decode.mixture(x, experts[0].tolist(), weights, routed, shared, limit)
    return None


def _packed_expert(x: Tensor, *weights: Packed) -> bool:
    """Whether one call of the C++ kernel does best what a packed expert asks for."""
    few = x.dtype == torch.bfloat16 and not _cpu_linear.worth_a_copy(x)
    return few and not _triton.usable(x) and _cpu_linear.packed_usable(x, *weights)


def project(x: Tensor, values: Tensor, gates: Tensor, ape: Tensor, position: Tensor, dim: int) -> Tensor:
    """What a compressor takes from its tokens (eqs. 9-10, 20-21), float32: x [B, T, D], values and gates [N, D] ->
    [B, T, 2 N]. Per half of ``dim`` channels its values and its gates side by side; a gate has its place's row of ape
    float32 [ratio, N] added. position int64 [B, T]. `reference.project` is the specification."""
    if _triton.usable(x, values, gates, ape) and x.dtype == values.dtype == gates.dtype:
        return _triton.compress.project(x, values, gates, ape, position, dim)
    if not _cpu_linear.plain(x, values, gates) or ape.dtype != torch.float32:
        if x.dtype == torch.float32 and _plain_row(x, values, gates):
            return _decode.project(x, values, gates, ape, position, dim)
        return reference.project(linear(x, values, wide=True), linear(x, gates, wide=True), ape, position, dim)
    return _cpu_linear.project(x, values, gates, ape, position, dim)


def choose(q: Tensor, weights: Tensor, keys: Tensor, low: Tensor, high: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The lightning indexer's choice (eqs. 16-17): of the entries low <= e < high the k with the largest
    sum_h w_h ReLU(q_h . key_e), the lowest index first among equals.

    q [B, T, H, dim], weights float32 [B, T, H], keys [B, E, dim], low and high int64 [B, T] -> int32 [B, T, k],
    ascending, and how many of them count, int32 [B, T]. Inference only; `reference.choose` is the specification.
    """
    return _inference(q).choose(q, weights, keys, low, high, k)


def attend(
    q: Tensor, near: Tensor, near_from: Tensor, near_to: Tensor, far: Tensor | None,
    low: Tensor | None, high: Tensor | None, picked: tuple[Tensor, Tensor] | None, sink: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """One softmax over the rows a query reads and a sink (eq. 27); keys are values.

    q [B, T, H, d]; near [B, N, d], of which a query reads near_from <= r < near_to (int32 [B, T]); far [B, E, d], of
    which it reads low <= e < high (int64 [B, T]) or those `choose` picked; sink float32 [H]. Returns [B, T, H, d].
    Inference only (`joint_attention` has gradients); `reference.attend` is the specification.
    """
    return _inference(q).attend(q, near, near_from, near_to, far, low, high, picked, sink, scale)


def _inference(q: Tensor) -> Any:
    if _triton.usable(q):
        return _triton.attend
    return _cpu_attend if _cpu_attend.usable(q) else reference


def pool(kv: Tensor, gate: Tensor) -> Tensor:
    """A compressor's pooling (eqs. 11-12, 22-23): kv, gate float32 [..., slots, dim] -> [..., dim], per channel the
    softmax over the slots times their values. A gate may be -inf, but not all of a channel's. `reference.pool` is the
    specification."""
    if _triton.usable(kv, gate):
        return _triton.compress.pool(kv, gate)
    return (_cpu_compress if _cpu_compress.usable(kv) else reference).pool(kv, gate)


def kv_row(x: Tensor, rope: int) -> Tensor:
    """KV rows as an FP8 cache gives them back; `numerics.kv_row` is the specification."""
    return _rows(x).kv_row(x, rope)


def index_row(x: Tensor) -> Tensor:
    """Index queries or keys, transformed and rounded to FP4; `numerics.index_row` is the specification."""
    whole = x.shape[-1] % numerics.INDEX_ROW.block[1] == 0
    return (_rows(x) if whole else numerics).index_row(x)


def _rows(x: Tensor) -> Any:
    if _triton.usable(x):
        return _triton.rows
    return _cpu_rows if _cpu_rows.usable(x) else numerics


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    """The next token of every row: logits float32 [B, V]; temperature, top_p and draw (in [0, 1)) float64 [B] -> ids
    int64 [B]; `reference.sample` is the specification."""
    if _triton.usable(logits) and logits.dtype == torch.float32:
        return _triton.sample.sample(logits, temperature, top_p, draw)
    return (_cpu_sample if _cpu_sample.usable(logits) else reference).sample(logits, temperature, top_p, draw)
