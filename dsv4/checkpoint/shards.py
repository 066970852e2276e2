"""The safetensors files of a model folder: headers and tensors in, whole shards out. Names mean nothing here.

Tensors are read and written one at a time with plain file calls: a mapped file would count as resident memory, shard
by shard, and a library call per shard would need the whole shard in memory to write it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from dsv4.checkpoint.inventory import BYTES, TensorSpec
from dsv4.checkpoint.layouts import Index, piece_shape

INDEX = "model.safetensors.index.json"
RANKED = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
"""A file of a folder that is cut for several devices: rank, ranks."""
PLAIN = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""Dtypes of unquantised tensors."""
TORCH = PLAIN | dict.fromkeys(("I8", "U8", "F8_E4M3", "F8_E8M0"), torch.uint8)
"""Quantised elements and scales travel as raw bytes."""


@dataclass(frozen=True)
class Stored(TensorSpec):
    """A tensor, the file that holds it and its first byte there."""

    file: Path
    offset: int


def listed(names: Iterable[str]) -> str:
    """``3 (a, b, c)``; after five names a count stands for the rest."""
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def read_header(file: Path) -> list[Stored]:
    """The tensors of one safetensors file, without their data. ValueError where the file is corrupt or truncated."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is truncated or no safetensors file: {size} bytes, header of {length} announced")
        raw = stream.read(length)
    found, end = [], 0
    try:
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            spec = Stored(name, tuple(entry["shape"]), entry["dtype"], file, 8 + length + begin)
            if spec.nbytes != stop - begin:
                raise ValueError(f"{name} {list(spec.shape)} {spec.dtype} has {stop - begin} bytes, not {spec.nbytes}")
            if begin != end:
                raise ValueError(f"{name} begins at byte {begin}, the tensor before it ends at {end}")
            found.append(spec)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a corrupt header: {type(error).__name__} {error}") from None
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "longer than its header says"
        raise ValueError(f"{file} is {state}: {size} bytes, its header describes {8 + length + end}")
    return found


def read_tensor(spec: Stored, stream: BinaryIO, index: Index = (), out: torch.Tensor | None = None) -> torch.Tensor:
    """``tensor[index]`` of the tensor that ``spec`` describes, from its open file; reads no other part of it. Into
    ``out`` where that is given, without a copy if it can hold the bytes as they are. Threads may share ``stream``."""
    shape, begin, whole = piece_shape(spec.shape, index), 0, spec.shape
    for depth, position in enumerate(index):
        first = position if isinstance(position, int) else range(whole[depth])[position].start
        begin += first * math.prod(whole[depth + 1 :])
    dtype = TORCH[spec.dtype]
    direct = out is not None and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
    data = out if out is not None and direct else torch.empty(shape, dtype=dtype)
    room, at = data.view(-1).view(torch.uint8).numpy().data, spec.offset + begin * BYTES[spec.dtype]
    while room.nbytes:  # a call reads at most 2 GiB
        if not (count := os.preadv(stream.fileno(), [room], at)):
            raise ValueError(f"{spec.file} was truncated while it was read, at {spec.name}")
        room, at = room[count:], at + count
    return data if out is None or direct else out.copy_(data)


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder by stored name; the index and the shards must agree."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    present = {file.name for file in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        try:
            wanted = {str(k): str(v) for k, v in json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is corrupt: {type(error).__name__} {error}") from None
        files = set(wanted.values())
        if files - present:
            raise ValueError(f"{folder} lacks shards that its index names: {listed(files - present)}")
        if stray := {name for name in present - files if name.startswith("model-")}:
            raise ValueError(f"{folder} holds shards that its index does not name: {listed(stray)}")
    elif any(RANKED.fullmatch(name) for name in present):
        raise ValueError(f"{folder} is cut for several devices: join it first (dsv4 convert {folder} DST)")
    elif len(present) == 1:
        files, wanted = present, None
    else:
        raise ValueError(f"{folder} holds {len(present)} safetensors files and no {INDEX}")
    stored: dict[str, Stored] = {}
    for name in sorted(files):
        for spec in read_header(folder / name):
            if spec.name in stored:
                raise ValueError(f"{spec.name} is in both {stored[spec.name].file.name} and {name}")
            stored[spec.name] = spec
    if wanted is not None:
        found = {spec.name: spec.file.name for spec in stored.values()}
        if wrong := {name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)}:
            raise ValueError(f"{folder}: the index and the shards disagree on tensors: {listed(wrong)}")
    return stored


@dataclass(frozen=True)
class Source:
    """A tensor to be written: ``parts`` makes its data, in pieces of any shape that follow each other."""

    spec: TensorSpec
    parts: Callable[[], Iterable[torch.Tensor]]


def shards_of_size(sources: list[Source], max_bytes: int) -> list[list[Source]]:
    """Shards of at most ``max_bytes`` of data each; a larger tensor gets one of its own."""
    shards: list[list[Source]] = [[]]
    room = max_bytes
    for source in sources:
        size = source.spec.nbytes
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(source)
        room -= size
    return shards


_LAYER = re.compile(r"((?:layers|mtp)\.\d+|embed)\.")


def shards_by_layer(sources: list[Source]) -> list[list[Source]]:
    """Shards as the releases have them: the embedding, every block, what follows the blocks."""
    groups = itertools.groupby(sources, lambda source: match[1] if (match := _LAYER.match(source.spec.name)) else "")
    return [list(group) for _, group in groups]


def shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_shards(folder: Path, shards: list[list[Source]]) -> None:
    """Writes numbered shards, tensor by tensor, and their index."""
    for number, shard in enumerate(shards, 1):
        write_shard(folder / shard_name(number, len(shards)), shard)
    write_index(folder, shards)


def write_index(folder: Path, shards: list[list[Source]]) -> None:
    weight_map = {
        source.spec.name: shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for source in shard
    }
    total = sum(source.spec.nbytes for shard in shards for source in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(file: Path, shard: list[Source], wrote: Callable[[int], None] = lambda size: None) -> None:
    """Writes one safetensors file; ``wrote`` hears of every piece's bytes. An error names tensor and file."""
    # Widest elements first: every tensor is then aligned to its own element size, as readers that map the file need.
    shard = sorted(shard, key=lambda source: (-BYTES[source.spec.dtype], source.spec.name))
    raw = header(shard)
    with file.open("wb", buffering=0) as stream:
        wrote(stream.write(struct.pack("<Q", len(raw)) + raw))
        for source in shard:
            spec, size = source.spec, 0
            for part in source.parts():
                data = part.detach().to("cpu", TORCH[spec.dtype]).contiguous().view(-1).view(torch.uint8).numpy().data
                size += data.nbytes
                try:
                    while data.nbytes:  # unbuffered: a disk that is full says so here, and may take a part
                        taken = stream.write(data)
                        wrote(taken)
                        data = data[taken:]
                except OSError as error:
                    raise OSError(error.errno, f"{error.strerror} at {spec.name} in {file}") from error
            assert size == spec.nbytes, (spec, size)


def header(shard: list[Source]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in shard:
        spec = source.spec
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)
