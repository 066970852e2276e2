"""`dsv4 inspect`: what a model folder holds, read from the headers of its files alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import typer


def _tokenizer(folder: Path) -> dict[str, int] | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return {"vocabulary": len(data["model"]["vocab"]), "added_tokens": len(data["added_tokens"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is corrupt: {type(error).__name__} {error}") from None


def examine(folder: Path) -> dict[str, Any]:
    """The JSON record: config, tensors by dtype, differences from what the config needs, tokenizer."""
    from dsv4.checkpoint.inventory import TensorSpec, inventory
    from dsv4.checkpoint.layouts import piece_shape, pieces
    from dsv4.checkpoint.shards import PLAIN, read_headers
    from dsv4.config import Config
    from dsv4.model.costs import parameters

    config = Config.load(folder)
    stored = read_headers(folder)
    found = {
        name: TensorSpec(name, piece_shape(spec.shape, index), spec.dtype)
        for spec in stored.values()
        for name, index in pieces(spec.name, spec.shape)
    }
    quantised = any(spec.dtype not in PLAIN for spec in stored.values())
    has_mtp = any(name.startswith("mtp.") for name in found)
    experts = next((spec.dtype for name, spec in found.items() if ".ffn.experts." in name and "weight" in name), None)
    guess = {"I8": "fp4", "F8_E4M3": "fp8"}.get(experts or "")  # the first upload's config does not say
    wanted = inventory(config.replace(expert_dtype=(config.expert_dtype or guess) if quantised else None))
    expected = {spec.name: spec for spec in wanted if has_mtp or not spec.name.startswith("mtp.")}
    both = expected.keys() & found.keys()
    floats = {"BF16", "F16", "F32", "F64"}
    # An unquantised float may be stored in any width; a release's may not (see `verify`).
    wrong = [n for n in both if {found[n].dtype, expected[n].dtype} - floats and found[n].dtype != expected[n].dtype]
    dtypes: dict[str, Counter[str]] = {}
    for spec in stored.values():
        dtypes.setdefault(spec.dtype, Counter()).update(tensors=1, bytes=spec.nbytes)
    official = sum(name in stored for name in found)
    prefixed = any(name.startswith("model.layers.0.attn.") for name in stored)
    count = parameters(config)
    return {
        "path": str(folder),
        "layout": "official" if official == len(found) else "transformers hybrid" if prefixed else "transformers",
        "quantised": quantised,
        "config": config.to_dict(),
        "parameters": {"total": count.total, "active": count.active, "mtp": count.mtp[0] if has_mtp else 0},
        "tensors": len(stored),
        "bytes": sum(spec.nbytes for spec in stored.values()),
        "expected": {"tensors": len(expected), "bytes": sum(spec.nbytes for spec in expected.values())},
        "files": len({spec.file for spec in stored.values()}),
        "dtypes": {dtype: dict(both) for dtype, both in sorted(dtypes.items())},
        "mtp": has_mtp,
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "misshapen": sorted({n for n in both if found[n].shape != expected[n].shape} | set(wrong)),
        "not_as_released": sorted(n for n in both if found[n].dtype != expected[n].dtype),
        "tokenizer": _tokenizer(folder),
    }


def _print(report: dict[str, Any], kinds: list[str], verify: bool) -> None:
    from dsv4.config import Config

    config = Config.from_dict(report["config"])
    layers = Counter("CSA" if one.indexer else "HCA" if one.compress_ratio else "window" for one in config.layers)
    trunk, mtp = config.compress_ratios[: config.num_hidden_layers], config.compress_ratios[config.num_hidden_layers :]
    count = report["parameters"]
    tokenizer = report["tokenizer"]
    lines = {
        "path": report["path"],
        "layout": report["layout"] + (", quantised" if report["quantised"] else ""),
        "parameters": f"{count['total']:,} (active {count['active']:,})"
        + (f", MTP {count['mtp']:,}" if report["mtp"] else ", no MTP"),
        "size": f"hidden {config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.n_routed_experts} experts of {config.moe_intermediate_size}, top {config.num_experts_per_tok}, "
        f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}",
        "layers": f"{config.num_hidden_layers}: "
        + ", ".join(f"{n} {kind}" for kind, n in layers.items())
        + f"; {config.num_hash_layers} hash-routed; window {config.sliding_window}",
        "ratios": " ".join(map(str, trunk)) + " | " + " ".join(map(str, mtp)),
        "tensors": f"{report['tensors']:,} in {report['files']} file(s), {report['bytes']:,} bytes",
    }
    for dtype, both in report["dtypes"].items():
        lines[f"  {dtype}"] = f"{both['tensors']:,} tensors, {both['bytes']:,} bytes"
    lines["tokenizer"] = "none" if tokenizer is None else ", ".join(f"{n:,} {k}" for k, n in tokenizer.items())
    for key, value in lines.items():
        typer.echo(f"{key:<12} {value}")
    for kind in kinds:
        names = report[kind]
        if names:
            typer.echo(f"{kind:<12} {len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
    if not any(report[kind] for kind in kinds):
        typer.echo("complete     every tensor its config asks for, and no other")
        if verify:
            typer.echo(
                f"verified     {report['tensors']:,} tensors, {report['bytes']:,} bytes, each as its config says"
            )


def inspect(
    path: Path = typer.Argument(..., help="A model folder."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    verify: bool = typer.Option(False, "--verify", help="Dtypes and byte counts must be a release's, too."),
    tensors: bool = typer.Option(False, "--tensors", help="List every tensor: name, shape, dtype, file."),
) -> None:
    """Show what a model folder holds without loading it.

    Exits with code 1 when tensors are missing, extra or misshapen, and with --verify when any is not stored in the
    dtype that its config's release has.

    Example:
      dsv4 inspect models/nano
      dsv4 inspect models/nano --verify --json
    """
    report = examine(path)
    kinds = ["missing", "extra", "misshapen"] + (["not_as_released"] if verify else [])
    rows = []
    if tensors:
        from dsv4.checkpoint.shards import read_headers

        for spec in read_headers(path).values():
            rows.append({"name": spec.name, "shape": spec.shape, "dtype": spec.dtype, "file": spec.file.name})
    if as_json:
        typer.echo(json.dumps({**report, "list": rows} if tensors else report, indent=2))
    else:
        _print(report, kinds, verify)
        for row in rows:
            typer.echo(f"{row['name']}  {list(row['shape'])}  {row['dtype']}  {row['file']}")
    if any(report[kind] for kind in kinds):
        raise typer.Exit(1)
