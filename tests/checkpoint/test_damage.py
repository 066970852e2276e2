"""Every way a folder can be broken is one ValueError that names the tensor or the file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.model import Transformer

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tiny: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "m"
    dsv4.save(tiny, folder, max_shard_bytes=400_000)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "m"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors of the first shard and of the index alike."""
    file = shards(folder)[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = json.loads((folder / INDEX).read_text())
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != file.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, file.name)
    (folder / INDEX).write_text(json.dumps(index))


def fails(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        dsv4.load(folder)
    for word in words:
        assert word in str(caught.value)


def test_missing_tensors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: [tensors.pop(n) for n in ("embed.weight", "layers.0.attn.attn_sink")])
    fails(folder, "missing tensors: 2 (embed.weight, layers.0.attn.attn_sink)")


def test_one_expert_missing(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("layers.0.ffn.experts.2.w3.weight"))
    fails(folder, "missing tensors: 1 (layers.0.ffn.experts.2.w3.weight)")


def test_extra_misshapen_and_missing_come_in_one_error(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embed.weight"] = tensors["embed.weight"].T.contiguous()
        tensors["layers.0.ffn.experts.4.w1.weight"] = tensors["layers.0.ffn.experts.3.w1.weight"].clone()
        del tensors["layers.0.attn_norm.weight"]

    edit_tensors(folder, change)
    fails(
        folder,
        "missing tensors: 1 (layers.0.attn_norm.weight)",
        "extra tensors: 1 (layers.0.ffn.experts.4.w1.weight)",
        "misshapen tensors: 1 (embed.weight [64, 96] F32, expected [96, 64])",
    )


def test_many_names_are_counted(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"more.{i:03}": torch.zeros(1) for i in range(200)}))
    fails(folder, "extra tensors: 200 (more.000, more.001, more.002, more.003, more.004, ...)")


def test_floats_where_expert_ids_belong(folder: Path) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    fails(folder, f"misshapen tensors: 1 ({name} [96, 2] F32")


def test_expert_ids_out_of_range(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["layers.0.ffn.gate.tid2eid"].fill_(4))
    fails(folder, "layers.0.ffn.gate.tid2eid holds expert ids 4..4, expected 0..3")


def test_quantised(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"embed.weight": t["embed.weight"].to(torch.float8_e4m3fn)}))
    fails(folder, "misshapen tensors: 1 (embed.weight F8_E4M3 is never quantised)")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(folder: Path, keep: int) -> None:
    data = shards(folder)[1].read_bytes()
    shards(folder)[1].write_bytes(data[:keep])
    fails(folder, "truncated", shards(folder)[1].name)


def test_shard_with_bytes_behind_its_end(folder: Path) -> None:
    with shards(folder)[1].open("ab") as stream:
        stream.write(b"\0")
    fails(folder, "longer than its header says")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"embed.weight": 3}',
        b'{"embed.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}',
        b'{"embed.weight": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"embed.weight": {"dtype": "F32", "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b"\xff\xfe",
    ],
)
def test_corrupt_header(folder: Path, header: bytes) -> None:
    shards(folder)[0].write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    fails(folder, shards(folder)[0].name, "corrupt")


def test_overlapping_tensors(folder: Path) -> None:
    file = shards(folder)[0]
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    twins = [n for n, e in header.items() if n.endswith((".w1.weight", ".w3.weight")) and "experts.0" in n]
    header[twins[0]]["data_offsets"] = header[twins[1]]["data_offsets"]
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    fails(folder, file.name, "corrupt")


def test_shard_gone(folder: Path) -> None:
    gone = shards(folder)[1]
    gone.unlink()
    fails(folder, f"lacks shards that its index names: 1 ({gone.name})")


def test_shard_that_the_index_does_not_name(folder: Path) -> None:
    shutil.copy(shards(folder)[0], folder / "model-00009-of-00009.safetensors")
    fails(folder, "holds shards that its index does not name: 1 (model-00009-of-00009.safetensors)")


def test_index_and_shards_disagree(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["embed.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    fails(folder, "disagree on tensors: 1 (embed.weight)")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 7}'])
def test_corrupt_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    fails(folder, INDEX, "corrupt")


def test_no_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    fails(folder, f"{len(shards(folder))} safetensors files and no {INDEX}")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    first, second = shards(folder)[:2]
    tensors = load_file(second) | {"embed.weight": load_file(first)["embed.weight"]}
    save_file(tensors, second)
    fails(folder, f"embed.weight is in both {first.name} and {second.name}")


def test_one_tensor_under_two_names(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.embed_tokens.weight": t["embed.weight"].clone()}))
    fails(folder, "embed_tokens.weight", "are both embed.weight")


def test_not_a_model(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    fails(folder, "no config.json")
    fails(tmp_path / "nowhere", "nowhere")


def test_config_of_another_model(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, "misshapen tensors: ", "expected [")
