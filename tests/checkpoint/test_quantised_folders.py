"""Folders in the released FP4 and FP8 formats: byte-identical round trips, exact expansion, transformers' logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.checkpoint import inventory
from dsv4.checkpoint.folder import Folder
from dsv4.cli.inspect import examine
from dsv4.config import Config
from dsv4.model import Transformer
from dsv4.model.costs import tensors
from dsv4.numerics import FP4, FP8, Packed

INDEX = "model.safetensors.index.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def release(request: pytest.FixtureRequest, tiny: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, rounded into the formats of the instruct (fp4) or the Base release (fp8)."""
    folder = tmp_path_factory.mktemp("release") / request.param
    config = tiny.config
    tiny.config = config.replace(expert_dtype=request.param)
    try:
        dsv4.save(tiny, folder, dtype="native")
    finally:
        tiny.config = config
    return folder


@pytest.fixture
def folder(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "m"))


def test_names_shapes_and_dtypes_are_the_inventory(release: Path) -> None:
    """As the format's reference library reads them; one shard per block, plus embedding, head and MTP."""
    config = Config.load(release)
    found = {}
    shards = sorted(release.glob("*.safetensors"))
    for file in shards:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                part = shard.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    assert found == {spec.name: (spec.shape, spec.dtype) for spec in inventory(config)}
    assert len(shards) == config.num_hidden_layers + 3
    report = examine(release)
    assert report["not_as_released"] == report["missing"] == report["extra"] == report["misshapen"] == []
    assert report["expected"] == {"tensors": report["tensors"], "bytes": report["bytes"]}


def test_config_says_what_the_release_says(release: Path) -> None:
    data = json.loads((release / "config.json").read_text())
    assert data["expert_dtype"] == release.name and data["torch_dtype"] == "bfloat16"
    assert data["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }  # fmt: skip


def expanded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor by official name, dequantised by the formulas of model card C.2 on torch's own float8 types."""
    raw = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    out = {}
    for name, t in raw.items():
        scale = raw.get(name.removesuffix("weight") + "scale")
        if name.endswith(".scale"):
            continue
        if scale is None:
            out[name] = t if t.dtype == torch.int64 else t.float()
            continue
        high, wide = (1, 32) if t.dtype == torch.int8 else (128, 128)
        if t.dtype == torch.int8:
            bits = torch.stack((t & 15, (t >> 4) & 15), -1).flatten(-2).long()
            value = magnitudes[bits & 7] * torch.where(bits >= 8, -1.0, 1.0)
        else:
            value = t.float()
        s = scale.float().repeat_interleave(high, 0)[: value.shape[0]].repeat_interleave(wide, 1)[:, : value.shape[1]]
        out[name] = value * s
    return out


def test_loading_expands_to_the_bit(release: Path, tiny: Transformer) -> None:
    from dsv4.checkpoint.layouts import home

    wanted = expanded(release)
    state = dsv4.load(release).state_dict()
    half = dsv4.load(release, dtype="bfloat16").state_dict()
    for name, value in wanted.items():
        parameter, position = home(name)
        assert torch.equal(state[parameter][position], value), name
        assert torch.equal(half[parameter][position].float(), value.float()), name
    # and what was stored is the tiny model, rounded: the formats' own resolution, no more
    for name, value in tiny.state_dict().items():
        error = (state[name] - value).abs().max() / value.abs().max().clamp(min=1e-9)
        assert error < 0.2, name


def test_load_native_and_save_is_byte_identical(release: Path, tmp_path: Path) -> None:
    dsv4.save(dsv4.load(release, dtype="native"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(release)


def test_native_keeps_the_bytes(release: Path) -> None:
    model = dsv4.load(release, dtype="native")
    raw = {name: t for file in release.glob("*.safetensors") for name, t in load_file(file).items()}
    experts = model.get_submodule("layers.3.ffn.experts.w2")
    assert isinstance(experts, Packed)
    kept = raw["layers.3.ffn.experts.2.w2.weight"].view(torch.uint8)
    assert torch.equal(experts[2].elements, kept)
    quantised = {t.name for t in tensors(model.config) if t.kind in ("expert", "linear")}
    held = sum(m.elements.nbytes + m.scale.nbytes for m in model.modules() if isinstance(m, Packed))
    stored = {name: t for name, t in raw.items() if name.endswith(".scale") or name in quantised}
    assert held == sum(t.nbytes for t in stored.values())


def test_an_unquantised_folder_is_not_native(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "m")
    with pytest.raises(ValueError, match=r"is not quantised.*dsv4 convert.*in higher precision: \d+ \("):
        dsv4.load(tmp_path / "m", dtype="native")


# --- transformers ---


def test_transformers_agrees_with_the_expanded_weights(release: Path, ids: torch.Tensor) -> None:
    """Logits of the expanded FP4 + FP8 weights in transformers' model and in ours, both float32."""
    from tests.parity.peer import peer

    ours = dsv4.load(release)
    theirs = peer(ours)
    wanted = expanded(release)  # put in by hand, not through our loader
    with torch.no_grad():
        stacked = theirs.model.layers[2].mlp.experts.gate_up_proj
        for e in range(ours.config.n_routed_experts):
            both = [wanted[f"layers.2.ffn.experts.{e}.{w}.weight"] for w in ("w1", "w3")]
            assert torch.equal(stacked[e], torch.cat(both))
        difference = (theirs(ids).logits - ours(ids)).abs().max()
        assert ours(ids).abs().max() > 1 and difference < 1e-4


def test_transformers_expands_our_folder_itself(release: Path, ids: torch.Tensor) -> None:
    """Its FP8 loader reads our FP4/FP8 folder and dequantises it; where it lacks a package, the test says so."""
    pytest.importorskip("accelerate", reason="transformers' FP8 loader needs accelerate")
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, FineGrainedFP8Config

    ratios = [{8: 128}.get(ratio, ratio) for ratio in Config.load(release).compress_ratios]
    published = json.loads((release / "config.json").read_text()) | {
        "compress_ratios": ratios, "compress_rate_hca": 8,
    }  # fmt: skip
    theirs = DeepseekV4ForCausalLM.from_pretrained(
        release,
        config=DeepseekV4Config(**published),
        quantization_config=FineGrainedFP8Config(dequantize=True),
    ).float()
    with torch.no_grad():
        assert (theirs(ids).logits - dsv4.load(release)(ids)).abs().max() < 1e-4


def test_tensors_written_from_transformers_load_here(tiny: Transformer, ids: torch.Tensor, tmp_path: Path) -> None:
    """transformers' own state dict, packed into an official folder with torch's float8 casts and the format's
    reference library, not with our writer: same logits as transformers with those weights."""
    from tests.parity.peer import peer

    theirs = peer(tiny)
    config = tiny.config.replace(expert_dtype="fp4", num_nextn_predict_layers=0, compress_ratios=(0, 4, 8, 4, 8))
    renamed = {}
    from dsv4.checkpoint.layouts import pieces

    for name, t in theirs.state_dict().items():
        for official, index in pieces(name, tuple(t.shape)):
            renamed[official] = t[index]
    kinds = {t.name: t.kind for t in tensors(config)}
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    stored: dict[str, torch.Tensor] = {}
    for name, t in renamed.items():
        if name not in kinds:
            continue
        if kinds[name] == "expert":
            s = torch.exp2((t.unflatten(1, (-1, 32)).abs().amax(-1) / 6).log2().ceil())
            whole = t / s.repeat_interleave(32, 1)
            nearest = (whole.abs()[..., None] - magnitudes).abs().argmin(-1)
            code = nearest + 8 * (whole < 0)
            stored[name] = (code[:, 0::2] + 16 * code[:, 1::2]).to(torch.uint8).view(torch.int8)
            stored[name.replace("weight", "scale")] = s.to(torch.float8_e8m0fnu)
            t.copy_(magnitudes[nearest] * whole.sign() * s.repeat_interleave(32, 1))
        elif kinds[name] == "linear":
            high, wide = t.shape
            s = torch.ones(-(-high // 128), -(-wide // 128)) * 2.0**-7
            eight = (t / 2.0**-7).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[name], stored[name.replace("weight", "scale")] = eight, s.to(torch.float8_e8m0fnu)
            t.copy_(eight.float() * 2.0**-7)
        else:
            stored[name] = t.clone()
    save_file({name: t.contiguous() for name, t in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    ours = dsv4.load(tmp_path)
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(ids)).abs().max()
        assert difference < 1e-4 and (tiny(ids) - ours(ids)).abs().max() > 1e-2


# --- damage ---


def edit(folder: Path, number: int, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces or drops tensors of a shard and of the index."""
    file = sorted(folder.glob("*.safetensors"))[number]
    found = load_file(file)
    for name, value in change.items():
        found.pop(name, None)
        if value is not None:
            found[name] = value
    save_file(found, file)
    index = json.loads((folder / INDEX).read_text())
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != file.name}
    index["weight_map"] = kept | dict.fromkeys(found, file.name)
    (folder / INDEX).write_text(json.dumps(index))


def fails(folder: Path, *words: str) -> None:
    for dtype in ("float32", "bfloat16", "native"):
        with pytest.raises(ValueError) as caught:
            dsv4.load(folder, dtype=dtype)
        for word in words:
            assert word in str(caught.value)


EXPERT, LINEAR = "layers.1.ffn.experts.3.w1", "layers.1.attn.wq_a"


def test_nan_scales(folder: Path) -> None:
    scale = Folder(folder).read(f"{EXPERT}.weight").scale.clone()  # type: ignore[union-attr]
    if scale.dtype == torch.uint8:
        scale[0, 0] = 255
        edit(folder, 2, {f"{EXPERT}.scale": scale.view(torch.float8_e8m0fnu)})
        fails(folder, "model-00003-of-", f"{EXPERT}.weight: 1 of 64 scales are NaN")
    else:
        edit(folder, 2, {f"{EXPERT}.scale": torch.full_like(scale, float("nan"))})
        fails(folder, "model-00003-of-", f"{EXPERT}.weight: 1 of 1 scales are not positive numbers")


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf])
def test_scales_that_are_no_scales(folder: Path, bad: float) -> None:
    scale = Folder(folder).read(f"{EXPERT}.weight").scale.clone()  # type: ignore[union-attr]
    if scale.dtype == torch.float32:  # a UE8M0 byte cannot say such a thing
        scale.fill_(bad)
        edit(folder, 2, {f"{EXPERT}.scale": scale})
        fails(folder, "model-00003-of-", f"{EXPERT}.weight: 1 of 1 scales are not positive numbers")


def test_blocks_of_another_shape(folder: Path) -> None:
    """Scales for other blocks than the format's, and scales in a format that no release has."""
    scale = Folder(folder).read(f"{EXPERT}.weight").scale  # type: ignore[union-attr]
    stored = scale if scale.dtype == torch.float32 else scale.view(torch.float8_e8m0fnu)
    edit(folder, 2, {f"{EXPERT}.scale": stored.repeat(1, 2)})
    fails(folder, f"misshapen tensors: 1 ({EXPERT}.scale [{scale.shape[0]}, {2 * scale.shape[1]}], expected")
    edit(folder, 2, {f"{EXPERT}.scale": torch.ones(scale.shape, dtype=torch.bfloat16)})
    fails(folder, f"{EXPERT}.weight", f"with {EXPERT}.scale BF16")


def test_nan_weights(folder: Path) -> None:
    weight = Folder(folder).read(f"{LINEAR}.weight").elements.clone()  # type: ignore[union-attr]
    weight[1, 1] = 127
    edit(folder, 2, {f"{LINEAR}.weight": weight.view(torch.float8_e4m3fn)})
    fails(folder, "model-00003-of-", f"{LINEAR}.weight: 1 of {weight.numel()} elements are NaN")


def test_scales_of_the_wrong_shape(folder: Path) -> None:
    scale = Folder(folder).read(f"{LINEAR}.weight").scale  # type: ignore[union-attr]
    stored = scale if scale.dtype == torch.float32 else scale.view(torch.float8_e8m0fnu)
    edit(folder, 2, {f"{LINEAR}.scale": stored.repeat(2, 1)})
    fails(folder, f"misshapen tensors: 1 ({LINEAR}.scale [2, 1], expected [1, 1])")


def test_scales_missing_and_scales_without_a_weight(folder: Path) -> None:
    edit(folder, 2, {f"{LINEAR}.scale": None, f"{EXPERT}.weight": None})
    fails(folder, f"missing tensors: 2 ({LINEAR}.scale, {EXPERT}.weight)", f"extra tensors: 1 ({EXPERT}.scale)")


def test_what_is_never_quantised(folder: Path) -> None:
    name = "layers.1.attn_norm"
    edit(folder, 2, {f"{name}.scale": torch.ones(1, 1)})
    fails(folder, f"{name}.weight BF16 is never quantised")


def test_config_and_experts_disagree(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    other = {"fp4": "fp8", "fp8": "fp4"}[data["expert_dtype"]]
    (folder / "config.json").write_text(json.dumps(data | {"expert_dtype": other}))
    fails(folder, f"its config says {other} experts, they are stored as {data['expert_dtype']}")
    assert examine(folder)["misshapen"]


def test_the_first_uploads_config_does_not_name_the_format(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    wanted = data.pop("expert_dtype")
    (folder / "config.json").write_text(json.dumps(data))
    assert dsv4.load(folder, dtype="native").config.expert_dtype == wanted
    assert not examine(folder)["not_as_released"]


def test_inspect_verify_sees_a_dtype(folder: Path) -> None:
    edit(folder, 0, {"embed.weight": torch.zeros(96, 64)})
    report = examine(folder)
    assert report["not_as_released"] == ["embed.weight"] and not report["misshapen"]


def test_truncated_shard(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-7])
    fails(folder, file.name, "truncated")


def test_formats_in_memory(release: Path) -> None:
    with Folder(release) as folder:
        forms = {name: place.form for name, place in folder.places.items() if place.form}
    if release.name == "fp4":
        assert forms[f"{EXPERT}.weight"] == FP4 and forms[f"{LINEAR}.weight"] == FP8
    assert {form.scale for form in forms.values() if form} == {"F8_E8M0" if release.name == "fp4" else "F32"}
