"""The two commands that read numbers: what they print, what a program reads, what a mistake says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dsv4
from dsv4.cli.estimate import estimate, parse_context
from dsv4.cli.inspect import inspect
from dsv4.model import Transformer

app = typer.Typer()
app.command()(estimate)
app.command()(inspect)


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_estimate_table() -> None:
    out = run("estimate")
    for figure in ("1,572,997,179,491", "284,332,230,231", "26.7%", "10.1%", "10.5%", "7.3%", "5,280,404,480"):
        assert figure in out


def test_estimate_json() -> None:
    record = json.loads(run("estimate", "--model", "flash", "--context", "1M", "--json"))
    assert record["model"] == "flash" and record["context"] == 1048576
    assert record["params_total"] == 284_332_230_231 and record["params_active"] == 13_270_091_351
    assert record["flops_per_token"] == record["flops_linear"] + record["flops_attention"] + record["flops_indexer"]
    assert round(record["flops_ratio_v32"], 3) == 0.101 and round(record["kv_ratio_v32"], 3) == 0.073
    assert record["kv_bytes"] == 3_688_172_544
    both = json.loads(run("estimate", "-m", "pro", "-m", "v3.2", "--json"))
    assert [one["model"] for one in both] == ["pro", "v3.2"] and both[1]["kv_ratio_v32"] == 1


def test_estimate_reads_a_folder(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "m")
    record = json.loads(run("estimate", "-m", tmp_path / "m", "-c", "512", "--json"))
    trained = sum(p.numel() for name, p in tiny.named_parameters() if not name.startswith("mtp."))
    assert record["params_total"] == trained


def test_estimate_plot(tmp_path: Path) -> None:
    run("estimate", "--plot", tmp_path / "new/curves.png")
    assert (tmp_path / "new/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text, tokens", [("1M", 1 << 20), ("128k", 1 << 17), ("1_048_576", 1 << 20), ("7", 7)])
def test_contexts(text: str, tokens: int) -> None:
    assert parse_context(text) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "", "many", "1G", "1.5M"])
def test_bad_contexts(text: str) -> None:
    with pytest.raises(ValueError, match="number of tokens"):
        parse_context(text)


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'flesh'.*'flash'"):
        run("estimate", "--model", "flesh")


def test_inspect(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "m", dtype="bfloat16", max_shard_bytes=150_000)
    out = run("inspect", tmp_path / "m")
    assert "complete" in out and "1 window, 2 CSA, 2 HCA" in out and "0 4 8 4 8 | 0" in out
    report = json.loads(run("inspect", tmp_path / "m", "--json", "--tensors"))
    assert report["layout"] == "official" and report["mtp"] and report["tokenizer"] is None
    assert report["missing"] == report["extra"] == report["misshapen"] == []
    assert len(report["list"]) == report["tensors"] == sum(row["tensors"] for row in report["dtypes"].values())
    assert report["bytes"] == sum(row["bytes"] for row in report["dtypes"].values())
    first = report["list"][0]
    assert set(first) == {"name", "shape", "dtype", "file"}
    assert "layers.1.attn.compressor.ape  [4, 64]  F32" in run("inspect", tmp_path / "m", "--tensors")


def test_inspect_reads_headers_only(tiny: Transformer, tmp_path: Path) -> None:
    """A released Flash cannot be here, but its headers can: sparse files of the true size."""
    from dsv4.checkpoint.inventory import inventory
    from dsv4.config import Config

    config = Config.preset("flash")
    header, end = {}, 0
    for spec in inventory(config):
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + end)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    report = json.loads(run("inspect", tmp_path, "--verify", "--json"))
    assert (report["tensors"], report["bytes"], report["quantised"]) == (69_187, 159_609_485_896, True)
    assert report["missing"] == report["extra"] == report["misshapen"] == report["not_as_released"] == []
    assert report["expected"] == {"tensors": 69_187, "bytes": 159_609_485_896}


def test_inspect_verify(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "native", dtype="native")
    out = run("inspect", tmp_path / "native", "--verify")
    assert "verified" in out and "each as its config says" in out
    dsv4.save(tiny, tmp_path / "wide", dtype="float32")
    assert "complete" in run("inspect", tmp_path / "wide")
    assert "not_as_released" in run("inspect", tmp_path / "wide", "--verify", code=1)


def test_inspect_names_what_is_wrong(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["num_hash_layers"] = 1
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    report = json.loads(run("inspect", tmp_path / "m", "--json", code=1))
    assert report["missing"] == ["layers.1.ffn.gate.bias"] and report["extra"] == ["layers.1.ffn.gate.tid2eid"]
    assert "missing      1: layers.1.ffn.gate.bias" in run("inspect", tmp_path / "m", code=1)


def test_inspect_of_a_broken_folder(tiny: Transformer, tmp_path: Path) -> None:
    dsv4.save(tiny, tmp_path / "m")
    (tmp_path / "m/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is corrupt"):
        run("inspect", tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ValueError, match=r"no config\.json"):
        run("inspect", tmp_path / "m")
