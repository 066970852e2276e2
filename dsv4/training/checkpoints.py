"""Training checkpoints: complete or invisible, and enough to continue bit for bit.

A checkpoint is a folder ``step-00001200``: the model's tensors, the optimisers' state, and ``trainer.json``. Randomness
needs no state, because data and initial weights are functions of (seed, step).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4.common.files import atomic_folder

_NAME = re.compile(r"step-(\d{8})")


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step` (steps done), then removes all but the newest `keep`. Leftovers of writers that
    were killed go too."""
    for leftover in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover)
    path = folder / f"step-{step:08}"
    with atomic_folder(path) as fresh:
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(here, fresh / "tensors.safetensors")
        (fresh / "trainer.json").write_text(json.dumps({"step": step, **facts}, indent=1) + "\n")
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts with "step") of one checkpoint. ValueError names the file that is broken."""
    try:
        tensors = load_file(path / "tensors.safetensors", device=str(device))
        return tensors, json.loads((path / "trainer.json").read_text())
    except (SafetensorError, FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} is corrupt: {error}; remove it to continue from an older one") from None
