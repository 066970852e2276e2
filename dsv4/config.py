"""`Config`: a model is data.

One frozen record holds what the three published dialects say (the root ``config.json``, the official
``inference/config.json`` and transformers' dialect); a layer is a record too (`Layer`), so no code asks
``layer % 2``. Field names are the published JSON keys. Unknown or inconsistent keys fail with the key and
the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class RopeScaling:
    """YaRN of the compressed layers (magnitude stays 1, model card). Positions in tokens."""

    factor: float = 16.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 65536


@dataclass(frozen=True)
class Layer:
    """What one block is. ``compress_ratio`` 0 = window only; ``overlap`` pools two neighbouring windows (CSA);
    ``indexer`` selects top-k entries. Sources are layer indices: in V4 every layer is its own source."""

    index: int
    window: int
    compress_ratio: int
    overlap: bool
    indexer: bool
    router: Literal["hash", "learned"]
    rope: Literal["main", "compress"]
    kv_source: int
    index_source: int


@dataclass(frozen=True)
class Config:
    """A DeepSeek-V4 network (report 2, 4.2.1). Sizes in elements, positions in tokens."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    compress_ratios: tuple[int, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    num_key_value_heads: int = 1
    n_shared_experts: int = 1
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    sliding_window: int = 128
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 1
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    overlap_ratio: int = 4
    """The ratio whose layers are CSA (overlap and indexer); every other ratio above 0 is HCA. 4 in every release."""
    expert_dtype: str | None = None
    torch_dtype: str = "bfloat16"
    quantization_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for key in _SIZES:
            if getattr(self, key) < 1:
                raise ValueError(f"config: {key} must be at least 1, got {getattr(self, key)}")
        wanted = self.num_hidden_layers + self.num_nextn_predict_layers
        if len(self.compress_ratios) != wanted:
            raise ValueError(
                f"config: compress_ratios has {len(self.compress_ratios)} entries, expected {wanted} "
                f"({self.num_hidden_layers} layers + {self.num_nextn_predict_layers} MTP)"
            )
        if any(ratio < 0 for ratio in self.compress_ratios):
            raise ValueError(f"config: compress_ratios must not be negative, got {list(self.compress_ratios)}")
        for key, value in _FIXED.items():
            if getattr(self, key) != value:
                raise ValueError(f"config: {key} is {getattr(self, key)!r}; DeepSeek-V4 has {value!r}")
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of o_groups {self.o_groups}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts "
                f"{self.n_routed_experts}"
            )
        for key in ("head_dim", "index_head_dim"):
            if self.qk_rope_head_dim > getattr(self, key) or self.qk_rope_head_dim % 2:
                raise ValueError(
                    f"config: qk_rope_head_dim {self.qk_rope_head_dim} must be even and at most "
                    f"{key} {getattr(self, key)}"
                )
        if not 0 <= self.num_hash_layers <= self.num_hidden_layers:
            raise ValueError(f"config: num_hash_layers {self.num_hash_layers} is outside 0..{self.num_hidden_layers}")
        if self.expert_dtype not in (None, "fp4", "fp8"):
            raise ValueError(f"config: expert_dtype must be fp4 or fp8, got {self.expert_dtype!r}")

    def _layer(self, index: int) -> Layer:
        ratio = self.compress_ratios[index]
        overlap = ratio == self.overlap_ratio
        return Layer(
            index=index,
            window=self.sliding_window,
            compress_ratio=ratio,
            overlap=overlap,
            indexer=overlap,
            router="hash" if index < self.num_hash_layers else "learned",
            rope="compress" if ratio else "main",
            kv_source=index,
            index_source=index,
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The trunk's blocks, in order."""
        return tuple(self._layer(i) for i in range(self.num_hidden_layers))

    @cached_property
    def mtp_layers(self) -> tuple[Layer, ...]:
        """The multi-token-prediction blocks; they count on after the trunk, so they are never hash-routed."""
        return tuple(self._layer(self.num_hidden_layers + i) for i in range(self.num_nextn_predict_layers))

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def preset(name: str) -> Config:
        """flash, pro, flash-base, pro-base (the releases), nano (bundled), micro (tests)."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}{_nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
        return PRESETS[name]

    @staticmethod
    def load(path: str | Path) -> Config:
        """Reads a checkpoint folder or a ``config.json`` in any dialect."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"no config.json at {path}")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"{file} holds a {type(data).__name__}, expected an object")
        return Config.from_dict(data)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Config:
        """Any of the three dialects -> `Config`. Raises ValueError naming the offending key."""
        data = dict(data)
        model_type = data.pop("model_type", "deepseek_v4")
        if model_type == "deepseek_v41" or "text_config" in data or "kv_source_layer_ids" in data:
            raise ValueError(
                "this is a DeepSeek-V4.1 config: V4.1 is another architecture (shared KV sources, Engram, no HCA) "
                "and its weights cannot run as V4"
            )
        if model_type != "deepseek_v4":
            raise ValueError(f"config: model_type is {model_type!r}, expected 'deepseek_v4'")
        dspark = sorted(key for key in data if key.startswith("dspark_"))
        if dspark:
            raise ValueError(f"config: {dspark[0]} describes a DSpark speculative head, which this version cannot run")
        for official, published in _OFFICIAL_NAMES.items():
            if official in data:
                if published in data:
                    raise ValueError(f"config: {official} and {published} are both given")
                data[published] = data.pop(official)
        _fold_rope(data)
        _fold_transformers(data)
        for key in _NOT_OURS & data.keys():
            del data[key]
        known = {field.name for field in dataclasses.fields(Config)}
        for key in data:
            if key not in known:
                raise ValueError(f"config: unknown key {key!r}{_nearest(key, known | _OFFICIAL_NAMES.keys())}")
        required = [f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING]
        missing = [key for key in required if key not in data]
        if missing:
            raise ValueError(f"config: missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
        ratios = tuple(int(ratio) for ratio in data["compress_ratios"])
        short = data["num_hidden_layers"] + data.get("num_nextn_predict_layers", 1) - len(ratios)
        if len(ratios) == data["num_hidden_layers"] and short > 0:
            ratios += (0,) * short  # a list without the MTP suffix; MTP blocks are window-only in every release
        data["compress_ratios"] = ratios
        return Config(**data)

    def to_dict(self, layout: Literal["official", "transformers"] = "official") -> dict[str, Any]:
        """The published root ``config.json`` ("official"), or transformers' dialect."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", **data}
        data["compress_ratios"] = list(self.compress_ratios)
        if self.overlap_ratio == 4:
            del data["overlap_ratio"]
        yarn = None
        if self.rope_scaling is not None:
            yarn = {"type": "yarn", **dataclasses.asdict(self.rope_scaling)}
        data["rope_scaling"] = yarn
        for key in ("expert_dtype", "quantization_config"):
            if data[key] is None:
                del data[key]
        if layout == "official":
            return data
        if layout != "transformers":
            raise ValueError(f"config: unknown layout {layout!r}; known: official, transformers")
        heavy = sorted({layer.compress_ratio for layer in self.layers if layer.compress_ratio and not layer.overlap})
        if len(heavy) > 1:
            raise ValueError(f"config: transformers knows one HCA ratio, this model has {heavy}")
        kind = {0: "sliding_attention", self.overlap_ratio: "compressed_sparse_attention"}
        data["layer_types"] = [kind.get(layer.compress_ratio, "heavily_compressed_attention") for layer in self.layers]
        data["compress_rates"] = {
            "compressed_sparse_attention": self.overlap_ratio,
            "heavily_compressed_attention": heavy[0] if heavy else 128,
        }
        data["mlp_layer_types"] = ["hash_moe" if layer.router == "hash" else "moe" for layer in self.layers]
        partial = self.qk_rope_head_dim / self.head_dim
        data["partial_rotary_factor"] = partial
        main = {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": partial}
        compress = {**main, "rope_theta": self.compress_rope_theta}
        if self.rope_scaling is not None:
            compress |= {"rope_type": "yarn", "attention_factor": 1.0, **dataclasses.asdict(self.rope_scaling)}
        data["rope_parameters"] = {"main": main, "compress": compress}
        for key in ("compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling", "overlap_ratio"):
            data.pop(key, None)
        return data


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" (nearest known: {close[0]!r})" if close else ""


def _fold_rope(data: dict[str, Any]) -> None:
    """YaRN from the root config's ``rope_scaling``, the official flat keys or transformers' ``rope_parameters``."""
    flat = {new: data.pop(old) for old, new in _OFFICIAL_ROPE.items() if old in data}
    scaling = data.pop("rope_scaling", None) or {}
    parameters = data.pop("rope_parameters", None) or {}
    main = parameters.get("main") or {}
    nested = parameters.get("compress") or {k: v for k, v in parameters.items() if k != "main"}
    for key, source, name in (("rope_theta", main, "rope_theta"), ("compress_rope_theta", nested, "rope_theta")):
        if name in source:
            data.setdefault(key, source[name])
    merged = {**nested, **scaling, **flat}
    kind = merged.pop("rope_type", merged.pop("type", "yarn" if "factor" in merged else "default"))
    merged.pop("type", None)
    if merged.pop("attention_factor", 1.0) not in (1.0, None):
        raise ValueError("config: attention_factor must be 1.0 (V4's YaRN does not scale magnitudes)")
    for key in ("rope_theta", "partial_rotary_factor", "truncate"):
        merged.pop(key, None)
    if not merged:
        if flat or scaling or nested or main:
            data["rope_scaling"] = None
        return
    if kind != "yarn":
        raise ValueError(f"config: rope type {kind!r} is not supported; V4 uses 'yarn'")
    fields = {field.name for field in dataclasses.fields(RopeScaling)}
    for key in merged:
        if key not in fields:
            raise ValueError(f"config: unknown key rope_scaling.{key}{_nearest(key, fields)}")
    data["rope_scaling"] = RopeScaling(**merged)


def _fold_transformers(data: dict[str, Any]) -> None:
    """layer_types, mlp_layer_types, compress_rates and partial_rotary_factor -> the published keys."""
    rates = dict(data.pop("compress_rates", None) or {})
    csa = data.pop("compress_rate_csa", rates.get("compressed_sparse_attention", 4))
    hca = data.pop("compress_rate_hca", rates.get("heavily_compressed_attention", 128))
    ratio_of = {"sliding_attention": 0, "compressed_sparse_attention": csa, "heavily_compressed_attention": hca}
    types = data.pop("layer_types", None)
    if types is not None:
        unknown = [kind for kind in types if kind not in ratio_of]
        if unknown:
            raise ValueError(f"config: layer_types has {unknown[0]!r}{_nearest(unknown[0], ratio_of)}")
        ratios = [ratio_of[kind] for kind in types]
        given = data.get("compress_ratios")
        if given is not None and [bool(ratio) for ratio in given[: len(ratios)]] != [bool(ratio) for ratio in ratios]:
            raise ValueError("config: layer_types and compress_ratios disagree")
        data["compress_ratios"] = ratios
    elif (csa, hca) != (4, 128) and "compress_ratios" in data:
        data["compress_ratios"] = [{4: csa, 128: hca}.get(ratio, ratio) for ratio in data["compress_ratios"]]
    if csa != 4:
        data["overlap_ratio"] = csa
    mlp = data.pop("mlp_layer_types", None)
    if mlp is not None:
        hashed = sum(kind == "hash_moe" for kind in mlp)
        if any(kind == "hash_moe" for kind in mlp[hashed:]):
            raise ValueError(f"config: mlp_layer_types must start with its hash_moe layers, got {mlp}")
        data.setdefault("num_hash_layers", hashed)
    partial = data.pop("partial_rotary_factor", None)
    if partial is not None and "head_dim" in data:
        data.setdefault("qk_rope_head_dim", int(data["head_dim"] * partial))


_SIZES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim q_lora_rank o_lora_rank "
    "o_groups n_routed_experts num_experts_per_tok moe_intermediate_size index_n_heads index_head_dim index_topk "
    "hc_mult hc_sinkhorn_iters sliding_window max_position_embeddings"
).split()
_FIXED: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_OFFICIAL_NAMES = {
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "window_size": "sliding_window",
    "norm_eps": "rms_norm_eps",
    "n_mtp_layers": "num_nextn_predict_layers",
}
_OFFICIAL_ROPE = {
    "original_seq_len": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
# Keys that say nothing about the network: provenance, run-time hints, generic transformers fields.
_NOT_OURS = set(
    "architectures transformers_version use_cache dtype scale_fmt max_batch_size max_seq_len pad_token_id "
    "output_router_logits router_aux_loss_coef router_jitter_noise mlp_bias _name_or_path "
    "_attn_implementation id2label label2id "
    "return_dict output_hidden_states output_attentions problem_type is_encoder_decoder chunk_size_feed_forward "
    "attn_implementation experts_implementation _experts_implementation _commit_hash auto_map".split()
)

_YARN_QUANT = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_FLASH = Config(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_lora_rank=1024,
    o_groups=8,
    compress_ratios=(0, 0) + (4, 128) * 20 + (4, 0),
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    routed_scaling_factor=1.5,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    expert_dtype="fp4",
    quantization_config=_YARN_QUANT,
)
_PRO = _FLASH.replace(
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    compress_ratios=(128, 128) + (4, 128) * 29 + (4, 0),
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
    index_topk=1024,
)
_NANO = Config(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=7,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=128,
    o_lora_rank=64,
    o_groups=2,
    compress_ratios=(0, 0, 4, 32, 4, 32, 4, 0),
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
    num_hash_layers=2,
    routed_scaling_factor=1.5,
    index_n_heads=8,
    index_head_dim=32,
    index_topk=64,
    max_position_embeddings=4096,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=1024),
)
_MICRO = _NANO.replace(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_lora_rank=16,
    compress_ratios=(0, 4, 16, 4, 0),
    n_routed_experts=4,
    moe_intermediate_size=32,
    num_hash_layers=1,
    index_n_heads=4,
    index_head_dim=16,
    index_topk=8,
    sliding_window=16,
    max_position_embeddings=1024,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=256),
)
PRESETS: dict[str, Config] = {
    "flash": _FLASH,
    "pro": _PRO,
    "flash-base": _FLASH.replace(expert_dtype="fp8"),
    "pro-base": _PRO.replace(expert_dtype="fp8"),
    "nano": _NANO,
    "micro": _MICRO,
}
