"""The independent implementation: transformers' DeepseekV4ForCausalLM with our weights. Tests and benchmarks only."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.config import Config
from dsv4.model import Transformer


def randomise(model: Transformer, seed: int, gain: float = 1.5) -> Transformer:
    """Every tensor random and of a size that matters: default initialisation hides most mistakes (zero sinks, zero
    biases)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float, mean: float = 0.0) -> Tensor:
        return (torch.randn(like.shape, generator=generator) * std + mean).to(like.dtype)

    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.rsplit(".", 2)
            if name.endswith("norm.weight"):
                p.copy_(normal(p, 0.2, 1.0))
            elif leaf[-1].endswith("_scale"):
                p.copy_(normal(p, 0.3, 1.0))
            elif leaf[-1].endswith(("_base", "attn_sink", "ape")) or name == "embed.weight":
                p.copy_(normal(p, 1.0))
            else:
                p.copy_(normal(p, gain * p.shape[-1] ** -0.5))
        for name, b in model.named_buffers():
            if name.endswith("tid2eid"):
                k, e = b.shape[1], model.config.n_routed_experts
                b.copy_(torch.rand(b.shape[0], e, generator=generator).argsort(1)[:, :k])
            else:
                b.copy_(normal(b, 0.3))
    return model


# Ours -> transformers' in-memory names (model card C.3), applied in order.
_RENAMES = (
    ("hc_head_", "hc_head.hc_"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    (".attn.attn_sink", ".attn.sinks"),
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    (".attn.indexer.compressor.", ".attn.compressor.indexer."),
    (".attn.indexer.wq_b", ".attn.compressor.indexer.q_b_proj"),
    (".attn.indexer.weights_proj", ".attn.compressor.indexer.scorer.weights_proj"),
    ("indexer.wkv", "indexer.kv_proj"),
    ("indexer.wgate", "indexer.gate_proj"),
    ("indexer.ape", "indexer.position_bias"),
    ("indexer.norm", "indexer.kv_norm"),
    ("compressor.wkv", "compressor.kv_proj"),
    ("compressor.wgate", "compressor.gate_proj"),
    ("compressor.ape", "compressor.position_bias"),
    ("compressor.norm", "compressor.kv_norm"),
    (".attn.wq_a", ".attn.q_a_proj"),
    (".attn.q_norm", ".attn.q_a_norm"),
    (".attn.wq_b", ".attn.q_b_proj"),
    (".attn.wkv", ".attn.kv_proj"),
    (".attn.wo_a", ".attn.o_a_proj"),
    (".attn.wo_b", ".attn.o_b_proj"),
    (".attn.", ".self_attn."),
    ("gate.bias", "gate.e_score_correction_bias"),
    ("shared_experts.w1", "shared_experts.gate_proj"),
    ("shared_experts.w3", "shared_experts.up_proj"),
    ("shared_experts.w2", "shared_experts.down_proj"),
    (".ffn.", ".mlp."),
    ("embed.", "embed_tokens."),
    ("head.weight", "lm_head.weight"),
)


def peer_name(name: str) -> str:
    """Our parameter name -> transformers'."""
    if name == "head.weight":
        return "lm_head.weight"
    for ours, theirs in _RENAMES[:-1]:
        name = name.replace(ours, theirs)
    return "model." + name


def peer_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (parameters or gradients, MTP left out) under transformers' names; w1 rows before w3 rows."""
    out: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if name.startswith("mtp.") or name.endswith("experts.w3"):
            continue
        if name.endswith("experts.w1"):
            both = torch.cat((tensor, named[name[:-1] + "3"]), 1)
            out[peer_name(name).replace("experts.w1", "experts.gate_up_proj")] = both
        elif name.endswith("experts.w2"):
            out[peer_name(name).replace("experts.w2", "experts.down_proj")] = tensor
        else:
            out[peer_name(name)] = tensor
    return out


def peer(model: Transformer, **kwargs: str):
    """A `DeepseekV4ForCausalLM` that shares no code with ours and holds copies of our weights, float32, eval mode."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config: Config = model.config
    theirs = DeepseekV4ForCausalLM(DeepseekV4Config(**config.to_dict("transformers"), **kwargs)).float()
    state = peer_tensors(dict(model.named_parameters()) | dict(model.named_buffers()))
    missing, unexpected = theirs.load_state_dict({k: v.detach().clone() for k, v in state.items()}, strict=False)
    missing = [name for name in missing if "inv_freq" not in name]
    assert not missing and not unexpected, (missing[:5], unexpected[:5])
    return theirs.eval()
