"""Saving and loading: nothing is lost, nothing is half-written, nothing else is touched."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dsv4
from dsv4.checkpoint import inventory
from dsv4.model import Transformer


def same(one: Transformer, other: Transformer) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tiny: Transformer, tmp_path: Path, layout: str, dtype: str) -> None:
    dsv4.save(tiny, tmp_path / "m", layout, dtype=dtype)
    again = dsv4.load(tmp_path / "m")
    assert same(tiny, again)
    assert again.config.replace(torch_dtype="bfloat16") == tiny.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_load_then_save_is_byte_identical(tiny: Transformer, tmp_path: Path, layout: str, dtype: str) -> None:
    dsv4.save(tiny, tmp_path / "a", layout, dtype=dtype, max_shard_bytes=100_000)
    dsv4.save(dsv4.load(tmp_path / "a", dtype=dtype), tmp_path / "b", layout, max_shard_bytes=100_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_official_folder_holds_the_inventory(tiny: Transformer, tmp_path: Path) -> None:
    """Names, shapes and dtypes as the reference library of the format reads them, and an index that agrees."""
    dsv4.save(tiny, tmp_path / "m", dtype="bfloat16", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    found = {}
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for file in shards:
        with safe_open(file, framework="pt") as shard:
            sizes = []
            for name in shard.keys():  # noqa: SIM118 - not a dict
                part = shard.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
                sizes.append(shard.get_tensor(name).nbytes)
                assert index["weight_map"][name] == file.name
            assert sum(sizes) <= 100_000 or len(sizes) == 1
    wanted = inventory(tiny.config)
    assert found == {spec.name: (spec.shape, spec.dtype) for spec in wanted}
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in wanted)


def test_bfloat16_model_keeps_its_float32_tensors(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "m")
    model = dsv4.load(tmp_path / "m", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert "layers.0.attn.attn_sink" in kept and "layers.0.hc_attn_fn" in kept
    assert "layers.0.attn.wq_a.weight" not in kept


def test_without_mtp(tiny: Transformer, tmp_path: Path, ids: torch.Tensor) -> None:
    dsv4.save(tiny, tmp_path / "m")
    remove(tmp_path / "m", "mtp.")
    with pytest.warns(UserWarning, match=r"no mtp\.\* tensors"):
        model = dsv4.load(tmp_path / "m")
    assert model.config.num_nextn_predict_layers == 0 and model.config.compress_ratios == (0, 4, 8, 4, 8)
    assert torch.equal(model(ids), tiny(ids))
    dsv4.save(model, tmp_path / "again")
    assert same(dsv4.load(tmp_path / "again"), model)  # no warning: its config says so


def test_mtp_tensors_that_the_config_does_not_name_are_left_out(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config |= {"num_nextn_predict_layers": 0, "compress_ratios": config["compress_ratios"][:-1]}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="left out"):
        assert dsv4.load(tmp_path / "m").config.num_nextn_predict_layers == 0


def remove(folder: Path, prefix: str) -> None:
    """Rewrites a folder's single shard without the tensors of a prefix, with the format's reference library."""
    from safetensors.torch import load_file, save_file

    file = folder / "model-00001-of-00001.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(prefix)}
    save_file(tensors, file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Tokenizer:
    def __init__(self, target: str = "tokenizer.json") -> None:
        self.target = target

    def save(self, folder: Path) -> None:
        (folder / self.target).write_text("{}" * 100_000)


def test_replacing_a_folder_keeps_its_other_files(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "m", tokenizer=Tokenizer(), max_shard_bytes=100_000)
    (tmp_path / "m/README.md").write_text("mine")
    dsv4.save(tiny, tmp_path / "m")
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model-00001-of-00001.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_is_no_model_is_never_replaced(tiny: Transformer, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.txt").write_text("dear")
    with pytest.raises(ValueError, match="not a model folder"):
        dsv4.save(tiny, tmp_path / "letters")
    with pytest.raises(ValueError, match="not a model folder"):
        dsv4.save(tiny, tmp_path / "letters/one.txt")
    assert (tmp_path / "letters/one.txt").read_text() == "dear"


def test_bad_arguments(tiny: Transformer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout must be 'official' or 'transformers', got 'gguf'"):
        dsv4.save(tiny, tmp_path / "m", "gguf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'int4'"):
        dsv4.save(tiny, tmp_path / "m", dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        dsv4.save(tiny, tmp_path / "m", max_shard_bytes=0)
    with pytest.raises(ValueError, match="got 'int8'"):
        dsv4.load(tmp_path / "m", dtype="int8")
    with pytest.raises(ValueError, match="expert_memory needs dtype 'native'"):
        dsv4.load(tmp_path / "m", expert_memory="8GiB")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk(tiny: Transformer, tmp_path: Path, existing: bool) -> None:
    """No room for the next byte: one error with its reason, the old folder untouched, no debris."""
    before = {}
    if existing:
        dsv4.save(tiny, tmp_path / "m")
        before = contents(tmp_path / "m")
    # Every file of this process may hold 64 KiB: the second one of the weights' blocks fails.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            dsv4.save(tiny, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [entry.name for entry in tmp_path.iterdir()] == (["m"] if existing else [])
    assert not existing or contents(tmp_path / "m") == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_no_space_left_is_said_in_words(tiny: Transformer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"disk full while writing .*m; what was there before is untouched"):
        dsv4.save(tiny, tmp_path / "m", tokenizer=Tokenizer("/dev/full"))
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, signal, sys
import dsv4
class Tokenizer:
    def save(self, folder):
        assert (folder / "model.safetensors.index.json").exists()
        os.kill(os.getpid(), signal.SIGKILL)
dsv4.save(dsv4.load(sys.argv[1]), sys.argv[2], tokenizer=Tokenizer())
"""


@pytest.mark.parametrize("existing", [False, True])
def test_killed_while_saving(tiny: Transformer, tmp_path: Path, existing: bool) -> None:
    dsv4.save(tiny, tmp_path / "source")
    if existing:
        dsv4.save(tiny, tmp_path / "m", max_shard_bytes=100_000)
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "source"), str(tmp_path / "m")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    visible = {entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")}
    assert visible == ({"source", "m"} if existing else {"source"})
    if existing:
        assert same(dsv4.load(tmp_path / "m"), tiny)
    dsv4.save(tiny, tmp_path / "m")  # and the debris is in nobody's way
    assert same(dsv4.load(tmp_path / "m"), tiny)
