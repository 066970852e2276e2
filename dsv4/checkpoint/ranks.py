"""A checkpoint cut for several devices, and joined again: the layout of the released inference code.

``model{rank}-mp{ranks}.safetensors``: every rank has a run of the routed experts, whole; its rows or columns of what
tensor parallelism cuts; and a copy of everything else. Elements and scales are cut alike and stay as they are stored,
so joining gives back the same bytes. (The released converter expands wo_a to bf16 on the way; here it stays FP8.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch

from dsv4.checkpoint.convert import copy_others, stamps, write_folder
from dsv4.checkpoint.folder import Folder
from dsv4.checkpoint.inventory import TensorSpec, inventory
from dsv4.checkpoint.shards import RANKED, Source, Stored, listed, read_header, read_tensor, shards_by_layer
from dsv4.config import Config

_CUT = {"embed": 0, "head": 0, "wq_b": 0, "wo_a": 0, "wo_b": 1, "attn_sink": 0, "weights_proj": 0}
"""Module -> the axis that is cut: vocabulary, heads, output groups, index heads."""
_EXPERT = re.compile(r"\.ffn\.experts\.(\d+)\.")


def axis(name: str) -> int | None:
    """The axis along which an official tensor is cut, or None: it is whole everywhere, or a routed expert's."""
    module = name.removesuffix(".weight").removesuffix(".scale").rsplit(".", 1)[-1]
    return None if _EXPERT.search(name) else _CUT.get(module)


def owner(name: str, experts: int, ranks: int) -> int | None:
    """The only rank that holds a routed expert's tensor; None for other tensors."""
    found = _EXPERT.search(name)
    return int(found[1]) * ranks // experts if found else None


def file_name(rank: int, ranks: int) -> str:
    return f"model{rank}-mp{ranks}.safetensors"


def split(source: Path, path: Path, ranks: int) -> None:
    """Writes the official folder ``source`` for ``ranks`` devices; resumable as `convert` is, and ``path`` appears when
    it is complete. ValueError names a tensor that cannot be cut into so many parts."""
    with Folder(source) as folder, ExitStack() as stack:
        config = folder.config
        if config.n_routed_experts % ranks or ranks < 1:
            raise ValueError(f"{config.n_routed_experts} routed experts cannot be shared by {ranks} devices")
        read = _reader(stack)
        stored = {place.stored.name: place.stored for place in folder.places.values()}
        stored |= {place.scale.name: place.scale for place in folder.places.values() if place.scale}
        order = [spec.name for spec in inventory(config)]
        if stored.keys() != set(order):
            raise ValueError(f"{source} does not have the official names and dtypes: convert it --to official first")
        shards = [
            [
                _cut(stored[name], rank, ranks, read)
                for name in order
                if owner(name, config.n_routed_experts, ranks) in (None, rank)
            ]
            for rank in range(ranks)
        ]
        plan = {"from": str(source.resolve()), "ranks": ranks, "files": stamps({s.file for s in stored.values()})}
        write_folder(
            path, shards, lambda staging: copy_others(source, staging), plan, lambda n, _: file_name(n - 1, ranks)
        )


def join(source: Path, path: Path) -> None:
    """Writes an official folder from one that `split`, or the released converter, made. ValueError names what is
    missing, misshapen, or not alike on all ranks."""
    files = {int(found[1]): file for file in source.iterdir() if (found := RANKED.fullmatch(file.name))}
    counts = {int(found[2]) for file in files.values() if (found := RANKED.fullmatch(file.name))}
    if len(counts) != 1 or files.keys() != set(range(*counts)):
        raise ValueError(f"{source} lacks ranks, or mixes layouts: {listed(file.name for file in files.values())}")
    ranks, config = len(files), Config.load(source)
    held = [{spec.name: spec for spec in read_header(files[rank])} for rank in range(ranks)]
    with ExitStack() as stack:
        read = _reader(stack)
        wanted = inventory(_with_mtp(config, held[0]))
        sources = [_joined(spec, held, config.n_routed_experts, read, files) for spec in wanted]
        names = {spec.name for spec in wanted}
        for rank, tensors in enumerate(held):
            if extra := tensors.keys() - names:
                raise ValueError(f"{files[rank]} holds tensors that its config does not ask for: {listed(extra)}")
        plan = {"from": str(source.resolve()), "join": ranks, "files": stamps(set(files.values()))}
        write_folder(path, shards_by_layer(sources), lambda staging: copy_others(source, staging), plan)


def _with_mtp(config: Config, held: dict[str, Stored]) -> Config:
    if config.num_nextn_predict_layers and not any(name.startswith("mtp.") for name in held):
        config = config.replace(
            num_nextn_predict_layers=0, compress_ratios=config.compress_ratios[: config.num_hidden_layers]
        )
    return config


Read = Callable[..., torch.Tensor]


def _reader(stack: ExitStack) -> Read:
    """read(spec, index): files are opened once and closed with ``stack``."""
    streams: dict[Path, BinaryIO] = {}

    def read(spec: Stored, index: tuple[slice, ...] = ()) -> torch.Tensor:
        if spec.file not in streams:
            streams[spec.file] = stack.enter_context(spec.file.open("rb"))
        return read_tensor(spec, streams[spec.file], index)

    return read


def _cut(spec: Stored, rank: int, ranks: int, read: Read) -> Source:
    """Rank's part of a stored tensor."""
    along = axis(spec.name)
    if along is None:
        return Source(TensorSpec(spec.name, spec.shape, spec.dtype), lambda: [read(spec)])
    if spec.shape[along] % ranks:
        raise ValueError(f"{spec.file}: {spec.name} {list(spec.shape)} cannot be cut into {ranks} along axis {along}")
    size = spec.shape[along] // ranks
    part = slice(rank * size, (rank + 1) * size)
    shape = (*spec.shape[:along], size, *spec.shape[along + 1 :])
    make = (lambda: [read(spec, (part,))]) if along == 0 else (lambda: [read(spec)[:, part]])
    return Source(TensorSpec(spec.name, shape, spec.dtype), make)


def _joined(
    spec: TensorSpec, held: list[dict[str, Stored]], experts: int, read: Read, files: dict[int, Path]
) -> Source:
    """The whole tensor ``spec`` from the ranks' parts."""
    ranks = len(held)
    only, along = owner(spec.name, experts, ranks), axis(spec.name)
    parts = []
    for rank in range(ranks) if only is None else (only,):
        found = held[rank].get(spec.name)
        if found is None:
            raise ValueError(f"{files[rank]} lacks {spec.name}")
        shape = list(spec.shape)
        if along is not None:
            shape[along] //= ranks
        if list(found.shape) != shape or found.dtype != spec.dtype:
            raise ValueError(
                f"{found.file}: {spec.name} is {list(found.shape)} {found.dtype}, expected {shape} {spec.dtype}"
            )
        parts.append(found)

    def make() -> Iterator[torch.Tensor]:
        if along == 0:
            yield from map(read, parts)
        elif along is not None:
            yield torch.cat([read(part) for part in parts], along)
        else:
            first = read(parts[0])
            for part in parts[1:]:
                if not torch.equal(read(part).view(torch.uint8), first.view(torch.uint8)):
                    raise ValueError(f"{part.file}: {spec.name} is not what {parts[0].file.name} holds")
            yield first

    return Source(spec, make)
