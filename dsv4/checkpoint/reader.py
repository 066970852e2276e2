"""`load`: a model folder -> a `Transformer`, tensor by tensor.

Peak memory is the model and the largest stored tensor. Every name and shape is checked from the files' headers
before the first byte of data is read.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from dsv4.checkpoint.inventory import UNQUANTISED
from dsv4.checkpoint.layouts import Index, home, piece_shape, pieces
from dsv4.checkpoint.shards import TORCH, Stored, listed, read_headers, read_tensor
from dsv4.config import Config
from dsv4.model import Transformer
from dsv4.model.costs import tensors

Place = tuple[Stored, Index]


def load(path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu") -> Transformer:
    """Reads official names, transformers' module names or what its ``save_pretrained`` writes.

    ``dtype`` is "float32" or "bfloat16" (tensors of the fp32 list stay fp32). A folder without ``mtp.*`` tensors, as
    transformers writes, gives a model without MTP blocks (``model.config.num_nextn_predict_layers`` is 0) and a
    warning; ``mtp.*`` tensors that the config does not ask for are left out, with a warning. ValueError names what
    is missing, extra, misshapen, corrupt or quantised.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    folder = Path(path)
    config = Config.load(folder)
    places = _places(folder, read_headers(folder))
    config = match(folder, config, places)
    model = Transformer(config, device="meta", dtype=getattr(torch, dtype)).to_empty(device=device)
    state = model.state_dict()
    by_file: dict[Path, dict[Stored, list[tuple[str, Index]]]] = {}
    for name, (spec, index) in places.items():
        by_file.setdefault(spec.file, {}).setdefault(spec, []).append((name, index))
    for file, wanted in by_file.items():
        with file.open("rb") as stream:
            for spec, parts in wanted.items():
                data = read_tensor(spec, stream)
                for name, index in parts:
                    parameter, position = home(name)
                    state[parameter][position].copy_(data[index])
    _check_tables(config, state)
    return model


def _places(folder: Path, stored: dict[str, Stored]) -> dict[str, Place]:
    """Official name -> where it is stored."""
    quantised = [name for name, spec in stored.items() if spec.dtype not in TORCH]
    if quantised:
        raise ValueError(
            f"{folder} is a quantised checkpoint; this version loads bf16, fp16 and fp32 tensors only. "
            f"Quantised tensors: {listed(quantised)}"
        )
    places: dict[str, Place] = {}
    for spec in stored.values():
        for name, index in pieces(spec.name, spec.shape):
            if name in places:
                raise ValueError(f"{folder}: {spec.name} and {places[name][0].name} are both {name}")
            places[name] = (spec, index)
    return places


def match(folder: Path, config: Config, places: dict[str, Place]) -> Config:
    """Compares a folder's tensors with what its config needs and drops from ``places`` what is not wanted.

    Returns the config that the tensors really make: without MTP where they are absent. ValueError lists every
    difference.
    """
    mtp = [name for name in places if name.startswith("mtp.")]
    if config.num_nextn_predict_layers and not mtp:
        warnings.warn(f"{folder} holds no mtp.* tensors: loaded without its MTP block", stacklevel=3)
        config = config.replace(
            num_nextn_predict_layers=0, compress_ratios=config.compress_ratios[: config.num_hidden_layers]
        )
    elif mtp and not config.num_nextn_predict_layers:
        warnings.warn(f"{folder}: its config has no MTP block, {len(mtp)} mtp.* tensors are left out", stacklevel=3)
        for name in mtp:
            del places[name]
    wanted = {tensor.name: tensor for tensor in tensors(config)}
    problems = []
    if missing := wanted.keys() - places.keys():
        problems.append(f"missing tensors: {listed(missing)}")
    if extra := places.keys() - wanted.keys():
        problems.append(f"extra tensors: {listed(extra)}")
    wrong = []
    for name in wanted.keys() & places.keys():
        stored, index = places[name]
        shape = piece_shape(stored.shape, index)
        is_table = UNQUANTISED[wanted[name].kind] == "I64"
        if shape != wanted[name].shape or is_table != (stored.dtype == "I64"):
            wrong.append(f"{name} {list(shape)} {stored.dtype}, expected {list(wanted[name].shape)}")
    if wrong:
        problems.append(f"misshapen tensors: {listed(wrong)}")
    if problems:
        raise ValueError(f"{folder} does not fit its config: {'; '.join(problems)}")
    return config


def _check_tables(config: Config, state: dict[str, torch.Tensor]) -> None:
    for name, table in state.items():
        if name.endswith(".tid2eid") and not 0 <= int(table.min()) <= int(table.max()) < config.n_routed_experts:
            low, high = int(table.min()), int(table.max())
            raise ValueError(f"{name} holds expert ids {low}..{high}, expected 0..{config.n_routed_experts - 1}")
