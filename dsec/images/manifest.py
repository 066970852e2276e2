"""What an image is made of: lists of chunks, each named by the digest of what it says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsec.errors import ImageError
from dsec.images.store import Store

CHUNK = 256 << 10
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63}){0,3}")
Role = Literal["base", "workspace", "toolkit"]


@dataclass(frozen=True)
class Layer:
    """A layer's list of chunks: SHA-256 of each 256 KiB (the last is shorter) of its EROFS file."""

    size: int
    chunks: tuple[str, ...]
    chunk: int = CHUNK

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes, digest: str) -> Layer:
        """The layer that `digest` names; ImageError if the list is another one or makes no sense."""
        if hashlib.sha256(data).hexdigest() != digest:
            raise ImageError(f"the list of layer {digest[:12]} has another digest")
        value = json.loads(data)
        layer = cls(value["size"], tuple(value["chunks"]), value["chunk"])
        if len(layer.chunks) != -(-layer.size // layer.chunk):
            raise ImageError(f"layer {digest[:12]} has {len(layer.chunks)} chunks for {layer.size} bytes")
        return layer

    @classmethod
    def of(cls, file: Path) -> Layer:
        with open(file, "rb") as source:
            chunks = tuple(hashlib.sha256(block).hexdigest() for block in iter(lambda: source.read(CHUNK), b""))
        return cls(file.stat().st_size, chunks)


@dataclass(frozen=True)
class Image:
    """A name for a stack of layers, base first, with what its maker set (env, workdir, user)."""

    name: str
    layers: tuple[tuple[Role, str, int], ...]
    """(role, digest, bytes) of each."""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of what it contains, not of its name: this is what a trajectory's keys are made of."""
        value = [[digest for _, digest, _ in self.layers], self.config]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def decode(cls, data: bytes) -> Image:
        value = json.loads(data)
        layers = tuple((role, digest, size) for role, digest, size in value["layers"])
        if not layers or any(not re.fullmatch("[0-9a-f]{64}", digest) for _, digest, _ in layers):
            raise ImageError(f"image {value.get('name')!r} names no layers")
        return cls(value["name"], layers, value["config"])


def distinct(layer: Layer) -> Sequence[tuple[int, str]]:
    """(index, digest) of every chunk, repeated ones once."""
    return [(index, digest) for digest, index in {digest: index for index, digest in enumerate(layer.chunks)}.items()]


def start_chunks(layer: Layer) -> int:
    """The most chunks that may be fetched before anybody asks: a start that reads it all is not what others want."""
    return max(len(layer.chunks) // 4, 16)


def chunk_key(digest: str) -> str:
    return f"chunks/{digest[:2]}/{digest}"


def fetch_chunk(store: Store, digest: str, tries: int = 2) -> bytes:
    """A chunk whose bytes are what its name says. A wrong one is fetched again, then ImageError."""
    for _ in range(tries):
        data = store.get(chunk_key(digest))
        found = hashlib.sha256(data).hexdigest()
        if found == digest:
            return data
    raise ImageError(f"chunk {digest} is corrupt in the store: its {len(data)} bytes have digest {found}")
