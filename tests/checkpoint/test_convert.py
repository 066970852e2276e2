"""`dsv4 convert`: formats change without loss unless allowed, stopped runs go on, nothing half-written is ever seen."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dsv4
from dsv4.checkpoint import convert as conversion
from dsv4.checkpoint.convert import convert
from dsv4.checkpoint.folder import Folder
from dsv4.checkpoint.synthetic import slice_of, synthesise
from dsv4.cli.app import app
from dsv4.cli.inspect import examine
from dsv4.config import Config
from dsv4.model import Transformer


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same(one: Path, other: Path) -> bool:
    a, b = (dsv4.load(path).state_dict() for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(tiny: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "m"
    dsv4.save(tiny, folder, dtype="bfloat16")
    (folder / "README.md").write_text("about this model")
    (folder / "encoding").mkdir()
    (folder / "encoding/code.py").write_text("pass")
    return folder


@pytest.fixture(scope="module")
def release(plain: Path) -> Path:
    convert(plain, plain.with_name("release"), "official", quantise=True)
    return plain.with_name("release")


def test_official_is_what_save_writes(release: Path, tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "saved", dtype="native")
    wanted = contents(tmp_path / "saved")
    found = {file.name: file.read_bytes() for file in release.iterdir() if file.is_file() and file.name != "README.md"}
    assert found == wanted
    assert (release / "README.md").read_text() == "about this model" and (release / "encoding/code.py").is_file()
    assert not (release.parent / ".release.partial").exists()


def test_official_to_official_is_byte_identical(release: Path, tmp_path: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.1"}))  # not ours to drop
    convert(release, tmp_path / "again", "official")
    for file in release.iterdir():
        if file.is_file():
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_expanded_and_packed_again_has_the_same_values(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "wide", "bf16")
    assert same(release, tmp_path / "wide") and not examine(tmp_path / "wide")["quantised"]
    convert(tmp_path / "wide", tmp_path / "narrow", "official", quantise=True)
    assert same(release, tmp_path / "narrow")


def test_to_transformers(release: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    """transformers opens the written folder by itself, and computes our logits."""
    from transformers import DeepseekV4ForCausalLM

    convert(release, tmp_path / "theirs", "transformers")
    theirs, info = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert (theirs(ids).logits - dsv4.load(release)(ids)).abs().max() < 1e-4
    convert(tmp_path / "theirs", tmp_path / "back", "official", quantise=True)
    assert same(release, tmp_path / "back")


def test_fp4_to_fp8_loses_nothing(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "eight", "official", expert_dtype="fp8")
    assert same(release, tmp_path / "eight")
    report = examine(tmp_path / "eight")
    assert not report["not_as_released"] and report["config"]["expert_dtype"] == "fp8" and "I8" not in report["dtypes"]


def test_what_would_round_needs_permission(plain: Path, release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not quantised \(layers\.0\..*allow it by --quantise"):
        convert(plain, tmp_path / "m", "official")
    convert(release, tmp_path / "eight", "official", expert_dtype="fp8")
    with pytest.raises(ValueError, match=r"experts\.0\.w1\.weight is F8_E4M3: storing it as I8 would round it"):
        convert(tmp_path / "eight", tmp_path / "m", "official", expert_dtype="fp4")
    assert not (tmp_path / "m").exists()


def test_a_folder_that_exists_is_never_touched(release: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.txt").write_text("dear")
    with pytest.raises(ValueError, match="exists: a conversion writes a new folder"):
        convert(release, tmp_path / "letters", "bf16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["letters"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from dsv4.checkpoint import convert, shards
whole = convert.write_shard
def write_shard(file, shard, wrote):
    if "00004" in file.name:
        def wrote(size): os.kill(os.getpid(), signal.SIGKILL)
    whole(file, shard, wrote)
convert.write_shard = write_shard
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), "official")
"""


@pytest.fixture(scope="module")
def stopped(release: Path) -> Path:
    """What a conversion killed in its fourth shard leaves behind."""
    target = release.with_name("stopped")
    assert subprocess.run([sys.executable, "-c", _KILLED, release, target], check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    return target.with_name(".stopped.partial")


@pytest.fixture
def staging(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / ".m.partial"))


def test_a_killed_conversion_goes_on(
    release: Path, staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(file.suffix for file in staging.iterdir()) == [".json", *[".safetensors"] * 3, ".tmp"]
    written: list[str] = []
    whole = conversion.write_shard
    monkeypatch.setattr(conversion, "write_shard", lambda file, *rest: (written.append(file.name), whole(file, *rest)))
    convert(release, tmp_path / "m", "official")
    assert written == [f"model-{n:05d}-of-00008.tmp" for n in range(4, 9)]
    assert all((tmp_path / "m" / n).read_bytes() == data for n, data in contents_of_files(release).items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_shards_whose_plan_is_gone_are_not_trusted(release: Path, staging: Path, tmp_path: Path) -> None:
    (staging / "plan.json").unlink()
    first = sorted(staging.glob("*.safetensors"))[0]
    first.write_bytes(b"of another conversion")
    convert(release, tmp_path / "m", "official")
    assert same(tmp_path / "m", release)


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_another_conversion_does_not_mix_with_an_unfinished_one(release: Path, staging: Path, tmp_path: Path) -> None:
    before = contents(staging)
    with pytest.raises(ValueError, match=r"\.m\.partial holds another conversion, unfinished"):
        convert(release, tmp_path / "m", "bf16")
    changed = shutil.copytree(release, tmp_path / "changed")
    os.utime(next(changed.glob("*.safetensors")), (1, 1))
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(changed, tmp_path / "m", "official")
    assert contents(staging) == before and not (tmp_path / "m").exists()


def test_a_full_disk_names_tensor_and_file_and_is_resumed(release: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"at layers\.\d\.\S+ in \S+model-\d+-of-00008\.tmp") as caught:
            convert(release, tmp_path / "m", "official")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "m").exists() and not list(tmp_path.rglob("*.tmp"))
    convert(release, tmp_path / "m", "official")
    assert same(tmp_path / "m", release)


def test_a_disk_without_room_is_seen_before(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"m needs [\d,]+ more bytes, its disk has 1,000"):
        convert(release, tmp_path / "m", "official")
    assert not (tmp_path / "m").exists()


def test_a_disk_that_fills_up_at_the_end_says_where(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken in ("write_text", "copy2"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(OSError, match=r"No space left .* while writing \S+\.m\.partial"),
        ):
            patch.setattr(*((Path, "write_text", full) if broken == "write_text" else (shutil, "copy2", full)))
            convert(release, tmp_path / "m", "official")
        assert not (tmp_path / "m").exists()
    before = {file.name: file.stat().st_ino for file in (tmp_path / ".m.partial").glob("*.safetensors")}
    convert(release, tmp_path / "m", "official")
    assert {file.name: file.stat().st_ino for file in (tmp_path / "m").glob("*.safetensors")} == before


def test_damage_in_the_source_is_named_and_nothing_appears(release: Path, tmp_path: Path) -> None:
    """A NaN scale and a NaN weight: found when their tensor is reached, in every direction."""
    with Folder(release) as folder:
        place = folder.places["layers.1.ffn.experts.3.w1.weight"]
        linear = folder.places["layers.1.attn.wq_a.weight"].stored
    assert place.scale is not None
    for spec, byte, message in ((place.scale, 255, "scales are NaN"), (linear, 127, "elements are NaN")):
        source = shutil.copytree(release, tmp_path / "source")
        with (source / spec.file.name).open("r+b") as stream:
            stream.seek(spec.offset + 3)
            stream.write(bytes([byte]))
        for to in ("official", "bf16", "transformers"):
            with pytest.raises(
                ValueError, match=rf"model-00003-of-\d+.safetensors: layers\.1\.\S+: 1 of \d+ {message}"
            ):
                convert(source, tmp_path / "m", to)
            assert not (tmp_path / "m").exists() and not list(tmp_path.rglob("*.tmp"))
            shutil.rmtree(tmp_path / ".m.partial")
        shutil.rmtree(source)


# --- synthetic releases ---


def test_a_slice_keeps_its_layers_kinds() -> None:
    config = slice_of(Config.preset("flash"), [0, 2, 3], experts=8)
    flash = Config.preset("flash")
    kinds = [(layer.compress_ratio, layer.router) for layer in config.layers]
    assert kinds == [(flash.layers[i].compress_ratio, flash.layers[i].router) for i in (0, 2, 3)]
    assert kinds == [(0, "hash"), (4, "hash"), (128, "learned")]
    for layers in ([3, 2], [0, 0], [43], [-1], []):
        with pytest.raises(ValueError, match=r"layers must rise within 0\.\.42"):
            slice_of(flash, layers)


def test_synthetic_release(tmp_path: Path) -> None:
    """Every kind of layer; loads native and expanded, with sound logits; the same again from the same seed."""
    synthesise("nano", [1, 2, 3], tmp_path / "m", experts=4)
    report = examine(tmp_path / "m")
    assert not any(report[kind] for kind in ("missing", "extra", "misshapen", "not_as_released"))
    assert {"config.json", "generation_config.json"} < {file.name for file in (tmp_path / "m").iterdir()}
    ids = torch.randint(0, 4096, (1, 80), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        native = dsv4.load(tmp_path / "m", dtype="native")(ids)
        wide = dsv4.load(tmp_path / "m", dtype="bfloat16")(ids)
    assert native.isfinite().all() and native.std() > 0.1
    assert torch.cosine_similarity(native, wide, -1).mean() > 0.97
    synthesise("nano", [1, 2, 3], tmp_path / "twin", experts=4)
    assert contents(tmp_path / "twin") == contents(tmp_path / "m")
    synthesise("nano", [1, 2, 3], tmp_path / "other", experts=4, seed=1)
    assert contents(tmp_path / "other") != contents(tmp_path / "m")


def test_synthetic_experts_look_quantised(tmp_path: Path) -> None:
    """Drawn blocks have the codes and scales that quantising normal weights gives; experts differ."""
    from dsv4.checkpoint.folder import Folder
    from dsv4.numerics import FP4, Packed, quantise

    synthesise("nano", [2], tmp_path / "m", experts=2)
    with Folder(tmp_path / "m") as folder:
        one, other = (folder.read(f"layers.0.ffn.experts.{e}.w1.weight") for e in (0, 1))
    assert isinstance(one, Packed) and isinstance(other, Packed)
    assert not torch.equal(one.elements, other.elements)
    fresh = Packed(*quantise(torch.randn(96, 256, generator=torch.Generator().manual_seed(1)) / 16, FP4), FP4)
    counts = [torch.bincount(p.elements.flatten().int() & 15, minlength=16) / p.elements.numel() for p in (one, fresh)]
    assert (counts[0] - counts[1]).abs().max() < 0.02
    assert abs(float(one.dequantise().std()) * 16 - 1) < 0.05


def test_real_shapes_with_few_experts(tmp_path: Path) -> None:
    """A full-size Flash layer is what its config says, tensor by tensor, but for the number of experts (headers of a
    vocabulary-sized folder are too large to write in a quick test: the layer's sources alone)."""
    from dsv4.checkpoint.inventory import inventory
    from dsv4.checkpoint.writer import Target

    config = slice_of(Config.preset("flash"), [0, 2, 3], experts=8)
    sources = Target.of(config, "official", "native", True).sources(lambda name: torch.zeros(0))
    assert [source.spec for source in sources] == inventory(config)


# --- the command ---


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, words)])
    return result.exit_code, f"{result.output}{result.exception or ''}"


def test_command(plain: Path, tmp_path: Path) -> None:
    assert run(plain, tmp_path / "m", "--to", "official", "--quantise")[0] == 0
    assert not examine(tmp_path / "m")["not_as_released"]
    assert run("--synthesise", "micro", "--layers", "0,1", "--experts", "4", tmp_path / "s")[0] == 0
    assert dsv4.load(tmp_path / "s", dtype="native").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["a"], "give SRC and DST, got 1"),
        (["--synthesise", "micro", "a", "b"], "give DST alone, got 2"),
        (["--synthesise", "micro", "--layers", "x", "a"], "--layers must be numbers such as 0,2,3, got 'x'"),
        (["--synthesise", "macro", "a"], "unknown preset 'macro'"),
        (["nowhere", "b"], "no config.json at nowhere"),
        (["nowhere", "b", "--expert-dtype", "fp2"], "--expert-dtype must be fp4 or fp8"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    code, output = run(*words)
    assert code and message in output


def test_unknown_target(plain: Path, tmp_path: Path) -> None:
    code, output = run(plain, tmp_path / "m", "--to", "gguf")
    assert code and "cannot convert to 'gguf'; known: official, bf16, transformers" in output
