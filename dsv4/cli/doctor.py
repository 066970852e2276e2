"""`dsv4 doctor`: what this machine offers, and what stands in the way of running dsv4 on it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

import dsv4

MODEL_FILES = ("config.json", "model.safetensors.index.json", "tokenizer.json")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16")


def _memory_gib() -> dict[str, float]:
    if sys.platform == "linux":
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return {key: round(int(rows[f"Mem{key.title()}"].split()[0]) / 2**20, 1) for key in ("total", "available")}
    return {"total": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in cpuinfo.splitlines())}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {"name": name, "cores": usable, "features": [flag for flag in CPU_FLAGS if flag in flags]}


def _kernels(problems: list[str]) -> dict[str, Any]:
    """What the hot operations run on: C++ for which instructions (DSV4_ISA forces one), or plain torch."""
    import torch

    from dsv4.kernels.cpu.isa import choose
    from dsv4.kernels.cpu.library import levels, library

    try:
        if library(torch.float32) is not None:
            return {"backend": "C++", "isa": choose(levels()), "available": levels()}
    except ValueError as error:
        problems.append(str(error))
    return {"backend": "plain torch"}


def examine(model: Path) -> dict[str, Any]:
    """Facts about this machine and `problems`: one sentence for each thing that keeps dsv4 from running here."""
    problems: list[str] = []
    report: dict[str, Any] = {"python": platform.python_version(), "dsv4": dsv4.__version__}
    try:
        import torch

        report["torch"] = {"version": torch.__version__, "threads": torch.get_num_threads()}
        report["kernels"] = _kernels(problems)
        report["devices"] = [
            {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    except ImportError as error:
        problems.append(f"torch cannot be imported ({error}): run script/setup")
    report["cpu"] = _cpu()
    report["memory_gib"] = _memory_gib()
    report["disk_free_gib"] = round(shutil.disk_usage(".").free / 2**30, 1)
    report["compiler"] = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    missing = [name for name in MODEL_FILES if not (model / name).is_file()]
    report["model"] = {"path": str(model), "complete": not missing}
    if missing:
        problems.append(f"{model} lacks {', '.join(missing)}: run from the repository root or name a model folder")
    report["problems"] = problems
    return report


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_line(v)}" for k, v in value.items())
    return " ".join(map(_line, value)) or "none" if isinstance(value, list) else str(value)


def doctor(
    model: Path = typer.Argument(Path("models/nano"), help="The model folder to look for."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Check this machine: Python, torch, processor, memory, devices, and the bundled model.

    Exits with code 1 when something keeps dsv4 from running.

    Example:
      dsv4 doctor
      dsv4 doctor --json
    """
    report = examine(model)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            if key != "problems":
                typer.echo(f"{key:<14} {_line(value)}")
        for problem in report["problems"]:
            typer.echo(f"problem        {problem}")
        typer.echo("all well" if not report["problems"] else f"{len(report['problems'])} problem(s)")
    if report["problems"]:
        raise typer.Exit(1)
