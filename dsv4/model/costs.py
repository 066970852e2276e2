"""What a model weighs: every tensor it is made of, parameters, FLOPs per token and KV bytes at any context.

The list of tensors (`tensors`) is the root of everything here and of the checkpoint rooms: parameters are its
sizes, FLOPs are its multiply-adds plus attention, the released files are its storage classes. DeepSeek-V3.2, the
report's yardstick (Fig. 1), is a table of constants (`V32`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsv4.config import Config, Layer

Kind = Literal["expert", "linear", "plain", "exact", "table"]
"""Storage class: routed experts, block-quantised linears, bf16, fp32, int64. Formats: `dsv4.checkpoint.inventory`."""

# Prices in FP8 multiply-adds; the only pair that gives both published ratios, 27 % and 10 % (report Fig. 1).
BF16_PRICE = 2
FP4_PRICE = 0.5
# Channels under one scale byte in a cache row: values are e4m3 in blocks of 64, index keys MXFP4 in blocks of 32.
_KV_BLOCK, _INDEX_BLOCK = 64, 32


@dataclass(frozen=True)
class Tensor:
    """One tensor of the official checkpoint before quantisation: its logical shape is [out, in] for matrices."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    component: str
    experts: int = 0
    """0, or E: one of E equal matrices of routed experts, its name with ``{}`` for the number (see `groups`)."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def multiplies(self) -> bool:
        """Whether a token is multiplied by it: a matrix, neither looked up nor added."""
        return (
            len(self.shape) == 2 and self.component not in ("embedding", "buffers") and not self.name.endswith(".ape")
        )


def tensors(config: Config) -> Iterator[Tensor]:
    """Every tensor of a model in forward order, MTP blocks (``mtp.0.``) last, under the official names."""
    for tensor in groups(config):
        for number in range(tensor.experts):
            yield replace(tensor, name=tensor.name.format(number), experts=0)
        if not tensor.experts:
            yield tensor


def groups(config: Config) -> Iterator[Tensor]:
    """`tensors`, with a layer's routed experts as three entries: all that counting needs."""
    vocab, dim = config.vocab_size, config.hidden_size
    yield Tensor("embed.weight", (vocab, dim), "plain", "embedding")
    for layer in config.layers:
        yield from _block(config, layer, f"layers.{layer.index}.")
    yield from _collapse(config, "")
    yield Tensor("norm.weight", (dim,), "plain", "norms")
    yield Tensor("head.weight", (vocab, dim), "plain", "head")
    for number, layer in enumerate(config.mtp_layers):
        prefix = f"mtp.{number}."
        for name in ("e_proj", "h_proj"):
            yield Tensor(f"{prefix}{name}.weight", (dim, dim), "linear", "mtp projections")
        for name in ("enorm", "hnorm", "norm"):
            yield Tensor(f"{prefix}{name}.weight", (dim,), "plain", "norms")
        yield from _block(config, layer, prefix)
        yield from _collapse(config, prefix)


def _collapse(config: Config, prefix: str) -> Iterator[Tensor]:
    streams = config.hc_mult
    for name, shape in (("fn", (streams, streams * config.hidden_size)), ("base", (streams,)), ("scale", (1,))):
        yield Tensor(f"{prefix}hc_head_{name}", shape, "exact", "mHC")


def _block(config: Config, layer: Layer, prefix: str) -> Iterator[Tensor]:
    c, dim, streams = config, config.hidden_size, config.hc_mult
    heads_dim = c.num_attention_heads * c.head_dim
    mixes = (2 + streams) * streams

    def make(component: str, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
        for name, shape in shapes.items():
            yield Tensor(prefix + name, shape, kind, component)

    for site in ("attn", "ffn"):
        yield from make("norms", "plain", {f"{site}_norm.weight": (dim,)})
        shapes = {f"hc_{site}_fn": (mixes, streams * dim), f"hc_{site}_base": (mixes,), f"hc_{site}_scale": (3,)}
        yield from make("mHC", "exact", shapes)
    yield from make("attention", "exact", {"attn.attn_sink": (c.num_attention_heads,)})
    matrices = {
        "attn.wq_a.weight": (c.q_lora_rank, dim),
        "attn.wq_b.weight": (heads_dim, c.q_lora_rank),
        "attn.wkv.weight": (c.head_dim, dim),
        "attn.wo_a.weight": (c.o_groups * c.o_lora_rank, heads_dim // c.o_groups),
        "attn.wo_b.weight": (dim, c.o_groups * c.o_lora_rank),
    }
    yield from make("attention", "linear", matrices)
    norms = {"attn.q_norm.weight": (c.q_lora_rank,), "attn.kv_norm.weight": (c.head_dim,)}
    yield from make("attention", "plain", norms)
    if layer.compress_ratio:
        component = "CSA compressors" if layer.indexer else "HCA compressors"
        yield from _compressor(config, layer, c.head_dim, component, f"{prefix}attn.compressor.")
    if layer.indexer:
        queries = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        yield from make("indexer", "linear", {"attn.indexer.wq_b.weight": queries})
        yield from make("indexer", "plain", {"attn.indexer.weights_proj.weight": (c.index_n_heads, dim)})
        yield from _compressor(config, layer, c.index_head_dim, "indexer", f"{prefix}attn.indexer.compressor.")
    yield from make("router", "plain", {"ffn.gate.weight": (c.n_routed_experts, dim)})
    if layer.router == "hash":
        yield from make("buffers", "table", {"ffn.gate.tid2eid": (c.vocab_size, c.num_experts_per_tok)})
    else:
        yield from make("buffers", "exact", {"ffn.gate.bias": (c.n_routed_experts,)})
    inner = c.moe_intermediate_size
    for name, shape in {"w1": (inner, dim), "w2": (dim, inner), "w3": (inner, dim)}.items():
        experts = f"{prefix}ffn.experts.{{}}.{name}.weight"
        yield Tensor(experts, shape, "expert", "routed experts", c.n_routed_experts)
        yield from make("shared experts", "linear", {f"ffn.shared_experts.{name}.weight": shape})


def _compressor(config: Config, layer: Layer, width: int, component: str, prefix: str) -> Iterator[Tensor]:
    columns = width * (2 if layer.overlap else 1)
    for name in ("wkv", "wgate"):
        yield Tensor(f"{prefix}{name}.weight", (columns, config.hidden_size), "plain", component)
    yield Tensor(f"{prefix}ape", (layer.compress_ratio, columns), "exact", component)
    yield Tensor(f"{prefix}norm.weight", (width,), "plain", component)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts (report 4.2.1, "284B, 13B activated"). ``active`` = used for one token."""

    components: dict[str, tuple[int, int]]
    """component of the trunk -> (total, active)"""
    buffers: int
    """Elements of the hash tables and selection biases: stored, not trained by gradients, in no total."""
    mtp: tuple[int, int]
    """(total, active) of the MTP blocks with their selection bias; no published total counts them."""

    @property
    def total(self) -> int:
        """The trunk, embedding and head included."""
        return sum(total for total, _ in self.components.values())

    @property
    def active(self) -> int:
        """The trunk without the embedding table, which is a look-up."""
        return sum(active for name, (_, active) in self.components.items() if name != "embedding")


def parameters(config: Config) -> Parameters:
    """Counts of each component of the trunk, and of the MTP blocks as a whole."""
    components: dict[str, list[int]] = {}
    buffers, mtp = 0, [0, 0]
    for tensor in groups(config):
        if tensor.name.startswith("mtp."):
            row = mtp
        elif tensor.component == "buffers":
            buffers += tensor.numel
            continue
        else:
            row = components.setdefault(tensor.component, [0, 0])
        row[0] += tensor.numel * max(tensor.experts, 1)
        row[1] += tensor.numel * (config.num_experts_per_tok if tensor.experts else 1)
    return Parameters({name: (row[0], row[1]) for name, row in components.items()}, buffers, (mtp[0], mtp[1]))


@dataclass(frozen=True)
class Flops:
    """FLOPs of decoding one token, in FP8-equivalent operations: bf16 counts `BF16_PRICE`, FP4 `FP4_PRICE`."""

    linear: int
    attention: int
    indexer: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.indexer


def flops_per_token(config: Config, context: int) -> Flops:
    """The token at position ``context - 1`` through the trunk and the head (embedding look-up and MTP excluded)."""
    trunk = [tensor for tensor in groups(config) if not tensor.name.startswith("mtp.")]
    low_precision = sum(tensor.numel for tensor in trunk if tensor.kind == "linear")
    low_precision += parameters(config).components["routed experts"][1]
    full_precision = sum(tensor.numel for tensor in trunk if tensor.multiplies and tensor.kind in ("plain", "exact"))
    rows = keys = 0
    for layer in config.layers:
        rows += min(layer.window, context)
        if layer.compress_ratio:
            entries = context // layer.compress_ratio
            keys += entries if layer.indexer else 0
            rows += min(entries, config.index_topk) if layer.indexer else entries
    return Flops(
        linear=2 * low_precision + BF16_PRICE * 2 * full_precision,
        attention=BF16_PRICE * 4 * config.num_attention_heads * config.head_dim * rows,
        indexer=int(FP4_PRICE * 2 * config.index_n_heads * config.index_head_dim * keys),
    )


def kv_row_bytes(config: Config) -> tuple[int, int]:
    """Bytes of one cache row, (main entry, index key): e4m3 channels, bf16 RoPE channels and scale bytes padded to 8;
    index keys are MXFP4. 584 and 68 in the releases."""
    rope = config.qk_rope_head_dim
    plain, key = config.head_dim - rope, config.index_head_dim
    scales = 8 * math.ceil(math.ceil(plain / _KV_BLOCK) / 8)
    return plain + 2 * rope + scales, math.ceil(key / 2) + math.ceil(key / _INDEX_BLOCK)


def kv_bytes(config: Config, context: int) -> int:
    """Cache of one sequence of ``context`` tokens: window rings (full size, as allocated) and finished entries."""
    row, key = kv_row_bytes(config)
    total = 0
    for layer in config.layers:
        total += layer.window * row
        if layer.compress_ratio:
            total += context // layer.compress_ratio * (row + key if layer.indexer else row)
    return total


def state_bytes(config: Config) -> int:
    """fp32 rows and gates of windows not yet complete: constant per sequence, not counted in `kv_bytes`."""
    total = 0
    for layer in config.layers:
        widths = config.head_dim + (config.index_head_dim if layer.indexer else 0)
        # Overlap keeps the previous window too, and two halves per row.
        total += 2 * 4 * layer.compress_ratio * widths * (4 if layer.overlap else 1)
    return total


@dataclass(frozen=True)
class V32Constants:
    """DeepSeek-V3.2: MLA with absorbed projections, DSA top-k, a mixture of experts after three dense layers."""

    hidden: int = 7168
    layers: int = 61
    dense_layers: int = 3
    dense_inner: int = 18432
    heads: int = 128
    q_lora: int = 1536
    kv_lora: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    experts: int = 256
    active_experts: int = 8
    inner: int = 2048
    vocab: int = 129280
    index_heads: int = 64
    index_dim: int = 128
    topk: int = 2048

    @property
    def _experts(self) -> tuple[int, int]:
        expert, layers = 3 * self.hidden * self.inner, self.layers - self.dense_layers
        return layers * expert * (self.experts + 1), layers * expert * (self.active_experts + 1)

    @property
    def _fp8(self) -> int:
        """Attention, dense FFN and indexer matrices: used by every token."""
        queries = self.heads * (self.nope + self.rope) + self.index_heads * self.index_dim
        attention = self.q_lora * (self.hidden + queries)
        attention += (self.kv_lora + self.rope + self.index_dim) * self.hidden
        attention += self.kv_lora * self.heads * (self.nope + self.value) + self.heads * self.value * self.hidden
        return self.layers * attention + self.dense_layers * 3 * self.hidden * self.dense_inner

    @property
    def _bf16(self) -> int:
        """Head, routers and the indexer's head weights."""
        router = (self.layers - self.dense_layers) * self.experts * self.hidden
        return self.vocab * self.hidden + router + self.layers * self.index_heads * self.hidden

    @property
    def _norms(self) -> int:
        return self.layers * (2 * self.hidden + self.q_lora + self.kv_lora + 2 * self.index_dim) + self.hidden

    @property
    def total(self) -> int:
        return self.vocab * self.hidden + self._bf16 + self._norms + self._fp8 + self._experts[0]

    @property
    def active(self) -> int:
        return self._bf16 + self._norms + self._fp8 + self._experts[1]

    def flops_per_token(self, context: int) -> Flops:
        """As `flops_per_token`; V3.2's indexer runs in FP8, its absorbed attention in bf16."""
        rows = min(self.topk, context)
        return Flops(
            linear=2 * (self._fp8 + self._experts[1]) + BF16_PRICE * 2 * self._bf16,
            attention=BF16_PRICE * self.layers * 2 * self.heads * rows * (2 * self.kv_lora + self.rope),
            indexer=self.layers * 2 * self.index_heads * self.index_dim * context,
        )

    def kv_bytes(self, context: int) -> int:
        """Latent in e4m3 with an fp32 scale per 128 channels, bf16 RoPE channels, FP8 index key with one fp32 scale."""
        row = self.kv_lora + 4 * self.kv_lora // 128 + 2 * self.rope + self.index_dim + 4
        return self.layers * row * context


V32 = V32Constants()


def estimate(config: Config | None, context: int, name: str) -> dict[str, Any]:
    """The record behind ``dsv4 estimate``; ``config`` None is V3.2. Ratios are to V3.2 at the same context (tokens)."""
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")
    if config is None:
        flops, kv, total, active = V32.flops_per_token(context), V32.kv_bytes(context), V32.total, V32.active
    else:
        flops, kv, count = flops_per_token(config, context), kv_bytes(config, context), parameters(config)
        total, active = count.total, count.active
    record: dict[str, Any] = {
        "model": name,
        "context": context,
        "params_total": total,
        "params_active": active,
        "flops_per_token": flops.total,
        "flops_linear": flops.linear,
        "flops_attention": flops.attention,
        "flops_indexer": flops.indexer,
        "flops_ratio_v32": flops.total / V32.flops_per_token(context).total,
        "kv_bytes": kv,
        "kv_ratio_v32": kv / V32.kv_bytes(context),
    }
    if config is not None:
        record |= {
            "state_bytes": state_bytes(config),
            "params_mtp": count.mtp[0],
            "params_mtp_active": count.mtp[1],
            "buffers": count.buffers,
            "components": {part: {"total": both[0], "active": both[1]} for part, both in count.components.items()},
        }
    return record
