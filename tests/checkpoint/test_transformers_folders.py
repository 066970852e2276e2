"""Folders travel to transformers and back: its own export, our export, same logits in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.checkpoint.layouts import to_official, to_transformers
from dsv4.cli.inspect import examine
from dsv4.config import Config
from dsv4.model import Transformer
from dsv4.model.costs import tensors


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """transformers' model of every layer kind; its default weights (zero tables, sinks, biases) would prove little."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=5, num_attention_heads=4,
        head_dim=32, q_lora_rank=48, qk_rope_head_dim=8, o_groups=2, o_lora_rank=24, index_n_heads=16,
        index_head_dim=16, index_topk=4, n_routed_experts=8, num_experts_per_tok=2,
        compress_ratios=[0, 4, 128, 4, 128, 0], compress_rate_hca=8, num_hash_layers=2, sliding_window=16,
        max_position_embeddings=1024,
        rope_scaling={
            "type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    model = DeepseekV4ForCausalLM(config)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("tid2eid"):
            tensor.data = torch.rand(256, 8, generator=generator).argsort(1)[:, :2]
        elif "inv_freq" not in name:
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3 + ("norm" in name)
    return model.eval()


@pytest.fixture(scope="module")
def exported(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))


def distance(a: torch.nn.Module, b: torch.nn.Module, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        one, other = (model(tokens) for model in (a, b))
        one, other = (out if isinstance(out, torch.Tensor) else out.logits for out in (one, other))
        assert one.abs().max() > 1
        return float((one - other).abs().max())


def test_their_export_loads_here(theirs: torch.nn.Module, exported: Path, tokens: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="without its MTP block"):
        ours = dsv4.load(exported)
    assert distance(theirs, ours, tokens) < 1e-4
    report = examine(exported)
    assert report["layout"] == "transformers hybrid"
    assert not report["missing"] and not report["extra"] and not report["misshapen"]


def test_their_state_dict_loads_here(
    theirs: torch.nn.Module, exported: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Module names (stacked experts), as a plain dump of the state dict has them."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.warns(UserWarning, match="without its MTP block"):
        ours = dsv4.load(tmp_path)
    assert distance(theirs, ours, tokens) < 1e-4
    assert examine(tmp_path)["layout"] == "transformers"


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_our_export_loads_there(tiny: Transformer, ids: torch.Tensor, tmp_path: Path, layout: str) -> None:
    """With an MTP block, which transformers passes over; in several shards; both config dialects."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    dsv4.save(tiny, tmp_path / "m", layout, max_shard_bytes=150_000)
    extra = {}
    if layout == "official":  # transformers reads the HCA ratio of published configs as the literal 128
        ratios = [{8: 128}.get(ratio, ratio) for ratio in tiny.config.compress_ratios]
        published = Config.load(tmp_path / "m").to_dict() | {"compress_ratios": ratios, "compress_rate_hca": 8}
        extra = {"config": DeepseekV4Config(**published)}
    theirs, info = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True, **extra)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.dtype == torch.float32
    assert distance(tiny, theirs.eval(), ids) < 1e-4


def test_there_and_back_changes_no_bit(tiny: Transformer, tmp_path: Path) -> None:
    from transformers import DeepseekV4ForCausalLM

    dsv4.save(tiny, tmp_path / "out", "transformers")
    DeepseekV4ForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "back")
    with pytest.warns(UserWarning, match="without its MTP block"):
        back = dsv4.load(tmp_path / "back").state_dict()
    for name, tensor in tiny.state_dict().items():
        assert name.startswith("mtp.") or torch.equal(tensor, back[name]), name


def test_names_translate_both_ways() -> None:
    for preset in ("flash", "pro", "nano"):
        for tensor in tensors(Config.preset(preset)):
            assert to_official(tensor.name) == tensor.name
            assert to_official(to_transformers(tensor.name)) == tensor.name


@pytest.mark.parametrize(
    "name, official",
    [
        ("model.layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.attn.compressor.norm.weight", "layers.3.attn.compressor.norm.weight"),
        ("model.layers.3.attn.indexer.compressor.norm.weight", "layers.3.attn.indexer.compressor.norm.weight"),
        ("model.layers.3.self_attn.compressor.indexer.kv_norm.weight", "layers.3.attn.indexer.compressor.norm.weight"),
        ("model.layers.3.self_attn.kv_norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.layers.0.ffn_hc.scale", "layers.0.hc_ffn_scale"),
    ],
)
def test_names_that_are_easily_confused(name: str, official: str) -> None:
    assert to_official(name) == official
