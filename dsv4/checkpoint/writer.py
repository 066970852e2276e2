"""`save`: a `Transformer` -> a model folder that is complete or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch

from dsv4.checkpoint.inventory import UNQUANTISED, TensorSpec
from dsv4.checkpoint.layouts import Index, home, to_transformers
from dsv4.checkpoint.shards import INDEX, Source, write_shards
from dsv4.common.files import atomic_folder
from dsv4.config import Config
from dsv4.model import Transformer
from dsv4.model.costs import Tensor, tensors

GIGABYTE = 1 << 30


class SavesItself(Protocol):
    """A tokenizer, seen from here."""

    def save(self, folder: Path) -> object: ...


def save(
    model: Transformer,
    path: str | Path,
    layout: Literal["official", "transformers"] = "official",
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int = 4 * GIGABYTE,
) -> None:
    """Writes config.json, generation_config.json, the weights in shards with their index, and the tokenizer.

    ``layout`` "official": the names of the releases, experts one by one. "transformers": the module names of
    DeepseekV4ForCausalLM and its config dialect (MTP tensors keep their official names; it skips them). ``dtype``
    "bfloat16" stores what the releases store in bf16 and fp32 as such, "float32" everything in fp32; None follows
    the model's embedding. A model folder already at ``path`` is replaced at the very end; its other files (a
    tokenizer, a README) are carried over. A folder that holds no config.json is never replaced: ValueError.
    """
    if layout not in ("official", "transformers"):
        raise ValueError(f"layout must be 'official' or 'transformers', got {layout!r}")
    state = model.state_dict()
    if dtype is None:
        dtype = "bfloat16" if state["embed.weight"].dtype == torch.bfloat16 else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    path = Path(path).resolve()
    if path.exists() and not (path / "config.json").is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not a model folder (it has no config.json): refusing to replace it")
    config = model.config.replace(torch_dtype=dtype, expert_dtype=None, quantization_config=None)
    settings = config.to_dict(layout)
    with atomic_folder(path) as folder:
        write_shards(folder, _sources(config, state, layout, dtype), max_shard_bytes)
        _write_json(folder / "config.json", settings)
        _write_json(
            folder / "generation_config.json",
            {
                "bos_token_id": config.bos_token_id,
                "eos_token_id": config.eos_token_id,
                "do_sample": True,
                "temperature": 1.0,
                "top_p": 1.0,
            },
        )
        for entry in path.iterdir() if path.is_dir() else ():
            if entry.suffix != ".safetensors" and entry.name != INDEX and not (folder / entry.name).exists():
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, folder / entry.name)
        if tokenizer is not None:
            tokenizer.save(folder)


def _write_json(file: Path, data: dict[str, object]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _sources(config: Config, state: dict[str, torch.Tensor], layout: str, dtype: str) -> list[Source]:
    def stored(tensor: Tensor) -> str:
        kept = UNQUANTISED[tensor.kind]
        return "F32" if dtype == "float32" and kept == "BF16" else kept

    def add(name: str, tensor: Tensor, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> None:
        sources.append((TensorSpec(name, shape, stored(tensor)), make))

    def at(name: str, position: Index) -> torch.Tensor:
        return state[name][position]

    def gate_up(prefix: str) -> torch.Tensor:
        return torch.cat([state[f"{prefix}.w1"], state[f"{prefix}.w3"]], dim=1)

    sources: list[Source] = []
    for tensor in tensors(config):
        parameter, position = home(tensor.name)
        if layout == "official" or not position or tensor.name.startswith("mtp."):
            name = tensor.name if layout == "official" else to_transformers(tensor.name)
            add(name, tensor, tensor.shape, partial(at, parameter, position))
        elif position == (0,):  # transformers stacks a layer's experts, w1's rows before w3's
            prefix, leaf = parameter.rsplit(".", 1)
            rows, columns = tensor.shape
            if leaf == "w1":
                shape = (config.n_routed_experts, 2 * rows, columns)
                add(f"{to_transformers(prefix)}.gate_up_proj", tensor, shape, partial(gate_up, prefix))
            elif leaf == "w2":
                shape = (config.n_routed_experts, rows, columns)
                add(f"{to_transformers(prefix)}.down_proj", tensor, shape, partial(at, parameter, ()))
    return sources
