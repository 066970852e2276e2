"""Cut for several devices and joined: every byte again, every rank with what its device computes."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dsv4
from dsv4.checkpoint.convert import convert
from dsv4.checkpoint.ranks import axis, join, owner, split
from dsv4.cli.app import app
from dsv4.config import Config
from dsv4.model import Transformer
from dsv4.model.costs import tensors

# Blocks of 128 x 128 that can be cut in two: 256 rows of wq_b and wo_a, 256 columns of wo_b.
WIDE = {"num_attention_heads": 16, "head_dim": 32, "o_groups": 2, "o_lora_rank": 128, "q_lora_rank": 32}


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config.preset("micro").replace(n_routed_experts=4, index_n_heads=16, **WIDE)
    model = Transformer(config).init_weights(1)
    root = tmp_path_factory.mktemp("ranks")
    dsv4.save(model, root / "plain", dtype="bfloat16")
    convert(root / "plain", root / "release", "official", quantise=True, expert_dtype=request.param)
    (root / "release" / "README.md").write_text("about this model")
    (root / "release" / "encoding").mkdir()
    (root / "release" / "encoding" / "code.py").write_text("pass")
    return root / "release"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_round_trip_is_byte_identical(release: Path, tmp_path: Path, ranks: int) -> None:
    if ranks == 4:
        with pytest.raises(ValueError, match=r"scale \[\d, \d\] cannot be cut into 4 along axis"):
            split(release, tmp_path / "cut", ranks)
        return
    split(release, tmp_path / "cut", ranks)
    names = {name for name in contents(tmp_path / "cut") if name.endswith(".safetensors")}
    assert names == {f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)}
    join(tmp_path / "cut", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(release)


def test_every_rank_holds_its_part(release: Path, tmp_path: Path) -> None:
    split(release, tmp_path / "cut", 2)
    parts = [load_file(tmp_path / "cut" / f"model{rank}-mp2.safetensors") for rank in (0, 1)]
    whole: dict[str, torch.Tensor] = {}
    for file in release.glob("*.safetensors"):
        whole |= load_file(file)
    assert whole.keys() == parts[0].keys() | parts[1].keys()
    cut = 0
    for name, tensor in whole.items():
        ranks = [part[name].view(torch.uint8) for part in parts if name in part]
        raw = tensor.view(torch.uint8)
        if (rank := owner(name, 4, 2)) is not None:
            assert name not in parts[1 - rank] and torch.equal(ranks[0], raw)
            assert rank == int(name.split(".experts.")[1].split(".")[0]) // 2
        elif (along := axis(name)) is not None:
            cut += 1
            assert torch.equal(torch.cat(ranks, along), raw), name
        else:
            assert all(torch.equal(part, raw) for part in ranks) and len(ranks) == 2
    assert cut > 20


def test_what_is_cut_and_what_is_not() -> None:
    """Of Flash: vocabulary, heads, output groups and index heads; a device holds 1/8 of those and of the experts."""
    axes = {t.name: axis(t.name) for t in tensors(Config.preset("flash"))}
    rows = ("embed.weight", "head.weight", "layers.2.attn.wq_b.weight", "layers.2.attn.wo_a.weight",
            "layers.2.attn.attn_sink", "layers.2.attn.indexer.wq_b.weight", "layers.2.attn.indexer.weights_proj.weight",
            "mtp.0.attn.wq_b.weight")  # fmt: skip
    assert all(axes[name] == 0 for name in rows) and axes["layers.2.attn.wo_b.weight"] == 1
    whole = ("norm.weight", "layers.2.attn.wq_a.weight", "layers.2.attn.wkv.weight", "layers.2.ffn.gate.weight",
             "layers.2.ffn.shared_experts.w1.weight", "layers.2.ffn.experts.7.w1.weight", "layers.2.hc_attn_fn",
             "layers.2.attn.compressor.wkv.weight", "layers.2.attn.q_norm.weight",
             "layers.0.ffn.gate.tid2eid")  # fmt: skip
    assert all(axes[name] is None for name in whole)
    owners = [owner(f"layers.0.ffn.experts.{e}.w2.scale", 256, 8) for e in range(256)]
    assert owners == [e // 32 for e in range(256)]


def test_through_the_command_line(release: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> int:
        return CliRunner().invoke(app, ["convert", *map(str, arguments)]).exit_code

    assert run(release, tmp_path / "cut", "--ranks", 2) == 0
    assert run(tmp_path / "cut", tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(release)
    assert run(tmp_path / "cut", tmp_path / "x", "--ranks", 2) != 0
    assert run(tmp_path / "cut", tmp_path / "x", "--to", "bf16") != 0
    assert not (tmp_path / "x").exists()


def test_a_stopped_cut_goes_on(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4.checkpoint import convert as module

    written: list[str] = []
    real = module.write_shard

    def stops(file: Path, *rest: object) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        real(file, *rest)  # type: ignore[arg-type]
        written.append(file.name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_shard", stops)
        split(release, tmp_path / "cut", 2)
    assert not (tmp_path / "cut").exists()
    first = (tmp_path / ".cut.partial" / "model0-mp2.safetensors").stat()
    split(release, tmp_path / "cut", 2)
    assert (tmp_path / "cut" / "model0-mp2.safetensors").stat().st_ino == first.st_ino
    join(tmp_path / "cut", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(release)


def test_full_disks_and_truncated_files(release: Path, tmp_path: Path) -> None:
    def with_little_room(work: object) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"File too large at \S+ in \S+\.partial/model\S+\.tmp"):
                work()  # type: ignore[operator]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.rglob("*.tmp"))

    with_little_room(lambda: split(release, tmp_path / "cut", 2))
    assert not (tmp_path / "cut").exists()
    split(release, tmp_path / "cut", 2)
    with_little_room(lambda: join(tmp_path / "cut", tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    file = tmp_path / "cut" / "model1-mp2.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model1-mp2.safetensors is truncated"):
        join(tmp_path / "cut", tmp_path / "again")


def test_mistakes_are_one_clear_error(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 routed experts cannot be shared by 3 devices"):
        split(release, tmp_path / "x", 3)
    split(release, tmp_path / "cut", 2)
    with pytest.raises(ValueError, match=r"cut is cut for several devices: join it first"):
        dsv4.load(tmp_path / "cut")

    def damaged(change: object) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "cut", folder)
        file = folder / "model1-mp2.safetensors"
        data = load_file(file)
        change(data)  # type: ignore[operator]
        save_file(data, file)
        return folder

    def missing(data: dict[str, torch.Tensor]) -> None:
        del data["layers.0.attn.attn_sink"]

    def shape(data: dict[str, torch.Tensor]) -> None:
        data["head.weight"] = data["head.weight"][:-1].clone()

    def differs(data: dict[str, torch.Tensor]) -> None:
        data["norm.weight"] = data["norm.weight"] + 1

    def extra(data: dict[str, torch.Tensor]) -> None:
        data["layers.0.ffn.experts.0.w1.weight"] = data["layers.0.ffn.experts.2.w1.weight"].clone()
        data["nobody.asked"] = torch.zeros(1)

    for change, message in (
        (missing, r"model1-mp2.safetensors lacks layers.0.attn.attn_sink"),
        (shape, r"model1-mp2.safetensors: head.weight is \[\d+, \d+\] BF16, expected"),
        (differs, r"model1-mp2.safetensors: norm.weight is not what model0-mp2.safetensors holds"),
        (extra, r"does not ask for: 1 \(nobody.asked\)"),
    ):
        with pytest.raises(ValueError, match=message):
            join(damaged(change), tmp_path / "y")
        assert not (tmp_path / "y").exists()
        shutil.rmtree(tmp_path / ".y.partial", ignore_errors=True)
    (tmp_path / "cut" / "model1-mp2.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks ranks, or mixes layouts"):
        join(tmp_path / "cut", tmp_path / "z")
