"""The safetensors files of a model folder: headers and tensors in, whole shards out. Names mean nothing here.

Tensors are read and written one at a time with plain file calls: a mapped file would count as resident memory, shard
by shard, and a library call per shard would need the whole shard in memory to write it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from dsv4.checkpoint.inventory import BYTES, TensorSpec

INDEX = "model.safetensors.index.json"
TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""Dtypes of unquantised tensors."""


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


def read_tensor(spec: Stored, stream: BinaryIO) -> torch.Tensor:
    """The tensor that ``spec`` describes, from its open file."""
    data = bytearray(spec.nbytes)
    stream.seek(spec.offset)
    if stream.readinto(data) != spec.nbytes:  # type: ignore[attr-defined]
        raise ValueError(f"{spec.file} was truncated while it was read, at {spec.name}")
    return torch.frombuffer(data, dtype=TORCH[spec.dtype]).reshape(spec.shape)


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


Source = tuple[TensorSpec, Callable[[], torch.Tensor]]


def write_shards(folder: Path, sources: list[Source], max_bytes: int) -> None:
    """Writes tensors, made one at a time, into numbered shards of at most ``max_bytes`` of data each, and their index.

    A tensor larger than ``max_bytes`` gets a shard of its own.
    """
    shards: list[list[Source]] = [[]]
    room = max_bytes
    for source in sources:
        size = source[0].nbytes
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(source)
        room -= size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= {spec.name: name for spec, _ in shard}
    total = sum(spec.nbytes for spec, _ in sources)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(file: Path, shard: list[Source]) -> None:
    # Widest elements first: every tensor is then aligned to its own element size, as readers that map the file need.
    shard = sorted(shard, key=lambda source: (-BYTES[source[0].dtype], source[0].name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec, _ in shard:
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for spec, make in shard:
            tensor = make()
            assert tuple(tensor.shape) == spec.shape, (spec, tensor.shape)
            data = tensor.detach().to("cpu", TORCH[spec.dtype]).contiguous()
            stream.write(data.view(torch.uint8).numpy().data)
