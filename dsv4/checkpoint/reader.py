"""`load`: a model folder -> a `Transformer`, tensor by tensor. Peak memory is the model and one tensor."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv4.checkpoint.folder import Folder
from dsv4.checkpoint.layouts import home
from dsv4.checkpoint.native import load_native
from dsv4.config import Config
from dsv4.model import Transformer


def load(
    path: str | Path,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    *,
    expert_memory: int | str | None = None,
    progress: bool = False,
) -> Transformer:
    """Reads official names (FP4/FP8 or not), transformers' module names or what its ``save_pretrained`` writes.

    ``dtype`` is "float32" or "bfloat16" (quantised tensors are expanded exactly, tensors of the fp32 list stay fp32),
    or "native": FP4 and FP8 weights stay packed and the network computes as the release does; "auto" is native for a
    quantised folder and float32 for others. ``expert_memory`` (bytes,
    or "8GiB"), with "native" only: routed experts stay on disk, and at most so much of them in memory. ``progress``
    shows bytes and ETA on stderr.

    A folder without ``mtp.*`` tensors, as transformers writes, gives a model without MTP blocks
    (``model.config.num_nextn_predict_layers`` is 0) and a warning; ``mtp.*`` tensors that the config does not ask for
    are left out, with a warning. ValueError names what is missing, extra, misshapen or corrupt.
    """
    if dtype not in ("float32", "bfloat16", "native", "auto"):
        raise ValueError(f"dtype must be 'float32', 'bfloat16', 'native' or 'auto', got {dtype!r}")
    if dtype == "auto":
        dtype = "native" if Config.load(path).expert_dtype else "float32"
    if expert_memory is not None and dtype != "native":
        raise ValueError(f"expert_memory needs dtype 'native', got {dtype!r}")
    with Folder(path) as folder:
        if dtype == "native":
            model = load_native(folder, device, expert_memory, progress)
        else:
            model = Transformer(folder.config, device="meta", dtype=getattr(torch, dtype)).to_empty(device=device)
            state = model.state_dict()
            for name in folder.walk(folder.places, progress):
                parameter, position = home(name)
                folder.fill(name, state[parameter][position])
    _check_tables(folder.config, model.state_dict())
    return model


def _check_tables(config: Config, state: dict[str, torch.Tensor]) -> None:
    for name, table in state.items():
        if name.endswith(".tid2eid") and not 0 <= int(table.min()) <= int(table.max()) < config.n_routed_experts:
            low, high = int(table.min()), int(table.max())
            raise ValueError(f"{name} holds expert ids {low}..{high}, expected 0..{config.n_routed_experts - 1}")
