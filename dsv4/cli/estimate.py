"""`dsv4 estimate`: parameters, FLOPs per token and KV bytes of a model at any context, beside DeepSeek-V3.2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from dsv4.config import Config

V32_NAME = "v3.2"
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_context(text: str) -> int:
    """``1048576``, ``1_048_576``, ``128k`` or ``1M`` (powers of two) -> tokens."""
    found = re.fullmatch(r"(\d[\d_,]*)([kKmM]?)", text.strip())
    tokens = int(re.sub("[_,]", "", found[1])) * _UNITS[found[2].lower()] if found else 0
    if tokens < 1:
        raise ValueError(f"context must be a number of tokens such as 131072, 128k or 1M, got {text!r}")
    return tokens


def _config(name: str) -> Config | None:
    from dsv4.config import PRESETS, Config

    if name == V32_NAME:
        return None
    return Config.load(name) if name not in PRESETS and Path(name).exists() else Config.preset(name)


def _table(rows: list[list[str]]) -> str:
    """First column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows
    )


def _plot(file: Path, models: dict[str, Config | None], context: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from dsv4.model.costs import estimate as cost

    positions = sorted({max(1, context * step // 64) for step in range(65)})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, config in models.items():
        records = [cost(config, position, name) for position in positions]
        at = [position / 1024 for position in positions]
        left.plot(at, [record["flops_per_token"] / 1e12 for record in records], label=name)
        right.plot(at, [record["kv_bytes"] / 1e9 for record in records], label=name)
    left.set(title="FLOPs of one token", ylabel="TFLOP, FP8-equivalent")
    right.set(title="KV cache of one sequence", ylabel="GB")
    for axis in (left, right):
        axis.set(xlabel="context, 1024 tokens", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, format=file.suffix.lstrip(".") or "png")
    pyplot.close(figure)


def estimate(
    model: list[str] = typer.Option(
        ["pro", "flash", V32_NAME], "--model", "-m", help="A preset, v3.2, a model folder or a config.json; repeatable."
    ),
    context: str = typer.Option("1M", "--context", "-c", help="Tokens already read: 131072, 128k, 1M."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: an object for one model, a list for several."),
    plot: Path | None = typer.Option(None, "--plot", help="Write the curves up to this context as a PNG."),
) -> None:
    """Count parameters, FLOPs per token and KV-cache bytes, and compare them with DeepSeek-V3.2.

    FLOPs are FP8-equivalent (bf16 counts twice, FP4 half), of one decoded token, without embedding and MTP.

    Example:
      dsv4 estimate --context 1M
      dsv4 estimate --model flash --context 128k --json
      dsv4 estimate --plot costs.png
    """
    from dsv4.model.costs import estimate as cost

    tokens = parse_context(context)
    models = {name: _config(name) for name in model}
    records: list[dict[str, Any]] = [cost(config, tokens, name) for name, config in models.items()]
    if plot is not None:
        _plot(plot, models, tokens)
    if as_json:
        typer.echo(json.dumps(records[0] if len(records) == 1 else records, indent=2))
        return
    typer.echo(f"At a context of {tokens:,} tokens\n")
    columns = {
        "model": "{model}",
        "parameters": "{params_total:,}",
        "active": "{params_active:,}",
        "FLOP/token": "{flops_per_token:,}",
        "of V3.2": "{flops_ratio_v32:.1%}",
        "KV bytes": "{kv_bytes:,}",
        "of V3.2 ": "{kv_ratio_v32:.1%}",
    }
    rows = [list(columns), *([form.format(**record) for form in columns.values()] for record in records)]
    typer.echo(_table(rows) + "\n")
    parts = ("linear", "attention", "indexer")
    rows = [["GFLOP/token", *parts]]
    rows += [[record["model"], *(f"{record[f'flops_{part}'] / 1e9:.1f}" for part in parts)] for record in records]
    typer.echo(_table(rows))
    for record in records:
        if "components" in record:
            mtp = {"total": record["params_mtp"], "active": record["params_mtp_active"]}
            counts = {**record["components"], "MTP (in no total)": mtp}
            rows = [[record["model"], "parameters", "active"]]
            rows += [[part, f"{both['total']:,}", f"{both['active']:,}"] for part, both in counts.items()]
            typer.echo("\n" + _table(rows))
    if plot is not None:
        typer.echo(f"\ncurves: {plot}")
