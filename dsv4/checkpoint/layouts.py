"""Tensor names: the official ones, transformers' module names, and the hybrid that its ``save_pretrained`` writes.

Everything inside is official; this file translates at the border. One table of substrings serves both directions.
"""

from __future__ import annotations

import re

Index = tuple[int | slice, ...]

# (official, transformers), applied top to bottom on the way out and bottom to top on the way in: the order matters
# where one entry contains another. Neither side occurs in the other dialect, so official names pass unchanged.
_NAMES = (
    (".indexer.compressor.", ".compressor.indexer."),
    (".indexer.weights_proj.", ".compressor.indexer.scorer.weights_proj."),
    (".indexer.wq_b.", ".compressor.indexer.q_b_proj."),
    (".compressor.norm.", ".compressor.kv_norm."),
    (".compressor.indexer.norm.", ".compressor.indexer.kv_norm."),
    (".ape", ".position_bias"),
    (".attn_sink", ".sinks"),
    (".attn.wq_a.", ".attn.q_a_proj."),
    (".attn.q_norm.", ".attn.q_a_norm."),
    (".attn.wq_b.", ".attn.q_b_proj."),
    (".wkv.", ".kv_proj."),
    (".wgate.", ".gate_proj."),
    (".wo_a.", ".o_a_proj."),
    (".wo_b.", ".o_b_proj."),
    (".gate.bias", ".gate.e_score_correction_bias"),
    (".shared_experts.w1.", ".shared_experts.gate_proj."),
    (".shared_experts.w2.", ".shared_experts.down_proj."),
    (".shared_experts.w3.", ".shared_experts.up_proj."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".hc_attn_", ".attn_hc."),
    (".hc_ffn_", ".ffn_hc."),
    (".hc_head_", ".hc_head.hc_"),
    (".embed.", ".embed_tokens."),
    (".head.", ".lm_head."),
    (".attn.", ".self_attn."),
    (".ffn.", ".mlp."),
)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w[123])\.weight")


def to_official(name: str) -> str:
    """Any dialect -> official. ``experts.gate_up_proj`` and ``.down_proj`` stay stacked: see `pieces`."""
    name = "." + name.removeprefix("model.").replace(".weight_scale_inv", ".scale")
    for official, foreign in reversed(_NAMES):
        name = name.replace(foreign, official)
    # save_pretrained inverts its rename of the compressors' norms on the attention's too.
    return name.replace(".attn.norm.", ".attn.kv_norm.")[1:]


def to_transformers(name: str) -> str:
    """Official -> the module name in DeepseekV4ForCausalLM; MTP tensors, which it skips, keep their official name."""
    if name.startswith("mtp."):
        return name
    name = "." + name
    for official, foreign in _NAMES:
        name = name.replace(official, foreign)
    return name[1:] if name.startswith(".lm_head.") else "model" + name


def pieces(name: str, shape: tuple[int, ...]) -> list[tuple[str, Index]]:
    """The official tensors inside one stored tensor, each with its index there.

    transformers stacks experts: ``experts.gate_up_proj`` [E, 2I, D] (w1's rows, then w3's), ``experts.down_proj``.
    """
    name = to_official(name)
    prefix, _, leaf = name.rpartition(".")
    if not prefix.endswith(".experts") or leaf not in ("gate_up_proj", "down_proj") or len(shape) != 3:
        return [(name, ())]
    if leaf == "down_proj":
        return [(f"{prefix}.{e}.w2.weight", (e,)) for e in range(shape[0])]
    half = shape[1] // 2
    rows = (("w1", slice(0, half)), ("w3", slice(half, shape[1])))
    return [(f"{prefix}.{e}.{w}.weight", (e, part)) for e in range(shape[0]) for w, part in rows]


def piece_shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """The shape of ``tensor[index]`` for a tensor of ``shape``, for the indices of `pieces`."""
    kept = [range(n)[i] for n, i in zip(shape, index)]
    return tuple(len(part) for part in kept if isinstance(part, range)) + shape[len(index) :]


def home(name: str) -> tuple[str, Index]:
    """Where an official tensor lives in `dsv4.model.Transformer`: parameter name and index (experts are stacked)."""
    expert = _EXPERT.fullmatch(name)
    return (f"{expert[1]}.{expert[3]}", (int(expert[2]),)) if expert else (name, ())
