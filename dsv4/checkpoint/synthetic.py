"""A release that is not there: full-size layers with random weights, in the released formats, names and files.

For real shapes where the 160 GB (Flash) or 865 GB (Pro) cannot be had. Every tensor comes from its own seed, so a
stopped run goes on to the same bytes.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path

import torch

from dsv4.checkpoint.convert import write_folder
from dsv4.checkpoint.shards import shards_by_layer
from dsv4.checkpoint.writer import Target
from dsv4.config import Config
from dsv4.model.costs import Tensor, tensors
from dsv4.numerics import FP4, RELEASES, Packed, quantise

_POOL = 1 << 18
"""Quantised blocks of 32 normal numbers from which FP4 matrices are drawn: quantising 6.4 G weights a layer would take
minutes, drawing blocks takes seconds, and the codes and scales have the same distribution."""


def slice_of(config: Config, layers: list[int], experts: int | None = None) -> Config:
    """The config of some of a model's layers, without MTP; ``experts`` per layer, or all. ValueError for layers that
    are not there or not in rising order (hash-routed layers come first)."""
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < config.num_hidden_layers:
        raise ValueError(f"layers must rise within 0..{config.num_hidden_layers - 1}, got {layers}")
    return config.replace(
        num_hidden_layers=len(layers),
        num_nextn_predict_layers=0,
        compress_ratios=tuple(config.compress_ratios[layer] for layer in layers),
        num_hash_layers=sum(layer < config.num_hash_layers for layer in layers),
        n_routed_experts=experts or config.n_routed_experts,
    )


def synthesise(
    preset: str | Config, layers: list[int], path: Path, *, experts: int | None = None, seed: int = 0
) -> None:
    """Writes the folder: config.json, generation_config.json, a shard per layer and the index. Peak memory is one
    tensor (the embedding). A preset or config without a released format gets FP4 experts."""
    whole = Config.preset(preset) if isinstance(preset, str) else preset
    config = slice_of(whole, layers, experts)
    target = Target.of(config, "official", "native", quantise=True)
    known = {tensor.name: tensor for tensor in tensors(target.config)}
    sources = target.sources(lambda name: _random(target.config, known[name], seed))
    plan = {"synthesise": whole.to_dict("official"), "layers": layers, "experts": experts, "seed": seed}
    write_folder(path, shards_by_layer(sources), target.write_config, plan)


def _random(config: Config, tensor: Tensor, seed: int) -> torch.Tensor | Packed:
    """Matrices keep their input's size (normal, fan_in^-0.5); norms stand near 1, sinks, biases and mHC maps at sizes
    that matter; hash tables name distinct experts."""
    generator = torch.Generator().manual_seed(zlib.crc32(tensor.name.encode()) ^ seed)
    shape, leaf = tensor.shape, tensor.name.rsplit(".", 1)[-1]

    def normal(std: float, mean: float = 0.0) -> torch.Tensor:
        kind = torch.bfloat16 if tensor.kind == "plain" else torch.float32  # as stored: the embedding is a gigabyte
        return torch.empty(shape, dtype=kind).normal_(mean, std, generator=generator)

    if tensor.kind == "table":
        order = torch.rand(shape[0], config.n_routed_experts, generator=generator)
        return order.topk(config.num_experts_per_tok, -1).indices
    if tensor.kind == "expert" and RELEASES[config.expert_dtype]["expert"] == FP4 and shape[1] % FP4.block[1] == 0:
        elements, scale = _pool(shape[1])
        picks = torch.randint(_POOL, (shape[0] * shape[1] // FP4.block[1],), generator=generator)
        return Packed(elements[picks].view(FP4.packed(shape)), scale[picks].view(FP4.scales(shape)), FP4)
    if tensor.component == "norms" or (leaf == "weight" and len(shape) == 1):
        return normal(0.1, 1.0)
    if leaf.endswith("_scale"):
        return normal(0.1, 0.5)
    if leaf in ("bias", "ape") or leaf.endswith(("_base", "attn_sink")):
        return normal(0.02 if leaf == "bias" else 0.5)
    return normal(1.0 if tensor.name == "embed.weight" else shape[-1] ** -0.5)


@cache
def _pool(fan_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(fan_in)
    return quantise(torch.empty(_POOL, FP4.block[1]).normal_(0, fan_in**-0.5, generator=generator), FP4)
