"""dtype "native": a model whose FP4 and FP8 weights stay packed, and that computes as the release does (model card
B.8): inputs of quantised linears rounded to E4M3, KV rows to FP8, index queries and keys to FP4."""

from __future__ import annotations

from functools import partial

import torch

from dsv4.checkpoint.experts import parse_bytes, stream_experts
from dsv4.checkpoint.folder import Folder
from dsv4.checkpoint.layouts import home
from dsv4.checkpoint.shards import listed
from dsv4.config import Config
from dsv4.kernels import index_row, kv_row
from dsv4.model import Transformer
from dsv4.model.costs import tensors
from dsv4.numerics import Format, Packed


def load_native(
    folder: Folder, device: str | torch.device, expert_memory: int | str | None, progress: bool
) -> Transformer:
    """ValueError where a tensor that the releases quantise is not."""
    config = folder.config
    plain = [t.name for t in tensors(config) if t.kind in ("expert", "linear") and not folder.places[t.name].form]
    if plain:
        raise ValueError(
            f"{folder.path} is not quantised, so it cannot be loaded as 'native' (make it so: dsv4 convert SRC DST "
            f"--to official --quantise). Tensors in higher precision: {listed(plain)}"
        )
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    if expert_memory is not None:
        stream_experts(model, folder, parse_bytes(expert_memory))
    forms = {home(name)[0]: place.form for name, place in folder.places.items() if place.form}
    for name, weight in list(model.named_parameters()):
        if form := forms.get(name):
            replace_weight(model, name, tuple(weight.shape), form)
    model.to_empty(device=device)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    state = model.state_dict()
    resident = [name for name in folder.places if home(name)[0] in packed or home(name)[0] in state]
    for name in folder.walk(resident, progress):  # others are experts that stay on disk
        parameter, position = home(name)
        if parameter in packed:
            folder.read(name, packed[parameter][position[0]] if position else packed[parameter])  # type: ignore[index]
        else:
            folder.read(name, state[parameter][position])
    round_rows(model, config)
    return model


def replace_weight(model: Transformer, name: str, shape: tuple[int, ...], form: Format) -> None:
    """Puts an empty `Packed` on the meta device where the parameter ``name`` was."""
    parent, leaf = name.rsplit(".", 1)
    module = model.get_submodule(parent)
    delattr(module, leaf)
    setattr(module, leaf, Packed.empty(shape, form, "meta"))


def round_rows(model: Transformer, config: Config) -> None:
    """KV rows and index rows are stored in low precision from now on."""
    rows = partial(kv_row, rope=config.qk_rope_head_dim)
    for block in (*model.layers, *model.mtp):
        attention = block.attn
        attention.round = rows
        if block.layer.compress_ratio:
            attention.compressor.round = rows
        if block.layer.indexer:
            attention.indexer.round = attention.indexer.compressor.round = index_row
