"""Three dialects, one record; and one clear sentence for everything that is not a V4 config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4.config import PRESETS, Config, RopeScaling

OFFICIAL_FLASH = {  # the release's inference/config.json: other names for the same values
    "vocab_size": 129280, "dim": 4096, "moe_inter_dim": 2048, "n_layers": 43, "n_hash_layers": 3, "n_heads": 64,
    "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 6, "score_func": "sqrtsoftplus",
    "route_scale": 1.5, "swiglu_limit": 10.0, "q_lora_rank": 1024, "head_dim": 512, "rope_head_dim": 64,
    "window_size": 128, "o_groups": 8, "o_lora_rank": 1024, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 512, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "original_seq_len": 65536,
    "rope_theta": 10000.0, "rope_factor": 16, "beta_fast": 32, "beta_slow": 1, "compress_rope_theta": 160000.0,
    "dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": "fp4",
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_round_trip(name: str, layout: str) -> None:
    config = Config.preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict(layout)))) == config  # type: ignore[arg-type]


def test_official_inference_names() -> None:
    config = Config.from_dict(OFFICIAL_FLASH)
    assert config.replace(quantization_config=PRESETS["flash"].quantization_config) == PRESETS["flash"]


def test_transformers_reads_what_we_write() -> None:
    transformers = pytest.importorskip("transformers", reason="the peer implementation (a development dependency)")
    for name in ("flash", "pro", "nano"):
        config = Config.preset(name)
        theirs = transformers.DeepseekV4Config(**config.to_dict("transformers"))
        kinds = {"sliding_attention": 0, "compressed_sparse_attention": 4}
        heavy = max(config.compress_ratios)
        assert tuple(kinds.get(k, heavy) for k in theirs.layer_types) == config.compress_ratios[:-1]
        written = {k: v for k, v in theirs.to_dict().items() if v is not None}
        assert Config.from_dict(written).layers == config.layers


def test_published_layer_patterns() -> None:
    """Flash starts with two window layers, Pro with two HCA layers; the list has one entry more, for the MTP block."""
    flash, pro = Config.preset("flash"), Config.preset("pro")
    assert [layer.compress_ratio for layer in flash.layers[:5]] == [0, 0, 4, 128, 4]
    assert [layer.compress_ratio for layer in pro.layers[:5]] == [128, 128, 4, 128, 4]
    for config, csa, hca in ((flash, 21, 20), (pro, 30, 31)):
        assert len(config.compress_ratios) == config.num_hidden_layers + 1
        assert sum(layer.indexer for layer in config.layers) == csa
        assert sum(layer.compress_ratio == 128 for layer in config.layers) == hca
        assert [layer.router for layer in config.layers[:4]] == ["hash", "hash", "hash", "learned"]
        (mtp,) = config.mtp_layers
        assert (mtp.compress_ratio, mtp.router, mtp.rope) == (0, "learned", "main")
    assert all(layer.overlap == layer.indexer == (layer.compress_ratio == 4) for layer in flash.layers)
    assert all(layer.rope == ("compress" if layer.compress_ratio else "main") for layer in flash.layers)
    assert all(layer.kv_source == layer.index_source == layer.index for layer in flash.layers)


def test_a_list_without_the_mtp_entry_gets_it() -> None:
    data = Config.preset("flash").to_dict()
    data["compress_ratios"] = data["compress_ratios"][:-1]
    assert Config.from_dict(data) == Config.preset("flash")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 5}, "unknown key 'hiden_size' (nearest known: 'hidden_size')"),
        ({"compress_ratios": [0, 4]}, "compress_ratios has 2 entries, expected 8 (7 layers + 1 MTP)"),
        ({"compress_ratios": [0, 0, 4, 32, 4, 32, -4, 0]}, "must not be negative"),
        ({"o_groups": 3}, "num_attention_heads 8 is not a multiple of o_groups 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds n_routed_experts 8"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; DeepSeek-V4 has 'sqrtsoftplus'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"qk_rope_head_dim": 33}, "qk_rope_head_dim 33 must be even"),
        ({"num_hash_layers": 8}, "num_hash_layers 8 is outside 0..7"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"expert_dtype": "int4"}, "expert_dtype must be fp4 or fp8"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "deepseek_v41"}, "DeepSeek-V4.1"),
        ({"text_config": {}}, "DeepSeek-V4.1"),
        ({"kv_source_layer_ids": [2]}, "DeepSeek-V4.1"),
        ({"dspark_block_size": 5}, "dspark_block_size describes a DSpark"),
        ({"dim": 4096}, "dim and hidden_size are both given"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factr": 2}}, "unknown key rope_scaling.factr (nearest known: 'factor')"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.2}}, "attention_factor must be 1.0"),
    ],
)
def test_what_is_wrong_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Config.from_dict(Config.preset("nano").to_dict() | change)
    assert message in str(caught.value)


def test_missing_keys_are_named() -> None:
    data = Config.preset("nano").to_dict()
    del data["head_dim"], data["index_topk"]
    with pytest.raises(ValueError, match="missing keys head_dim, index_topk"):
        Config.from_dict(data)


def test_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(Config.preset("micro").to_dict()))
    assert Config.load(tmp_path) == Config.load(tmp_path / "config.json") == Config.preset("micro")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Config.load(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        Config.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"unknown preset 'flsh'.*nearest known: 'flash'"):
        Config.preset("flsh")
    assert Config.preset("nano").rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=1024)
