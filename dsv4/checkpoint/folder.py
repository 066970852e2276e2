"""A model folder opened for reading, in any layout and number format: official names, one tensor at a time.

Every name, shape and dtype is checked from the files' headers before the first byte of data is read.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO

import torch

from dsv4.checkpoint.inventory import BYTES, UNQUANTISED, scale_name
from dsv4.checkpoint.layouts import Index, piece_shape, pieces
from dsv4.checkpoint.shards import PLAIN, Stored, listed, read_headers, read_tensor
from dsv4.common.console import Progress
from dsv4.config import Config
from dsv4.model.costs import tensors
from dsv4.numerics import STORED, Format, Packed


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored; for a quantised one also its scales and format."""

    stored: Stored
    index: Index = ()
    scale: Stored | None = None
    form: Format | None = None


class Folder:
    """``with Folder(path) as folder: folder.read("layers.0.attn.wq_a.weight")``. ValueError names what is missing,
    extra, misshapen, corrupt or not of this model."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = Config.load(self.path)
        self.places = _places(self.path, read_headers(self.path))
        self.config = _match(self.path, self.config, self.places)
        self._open: dict[Path, BinaryIO] = {}
        self._opening = Lock()

    @property
    def quantised(self) -> bool:
        return any(place.form for place in self.places.values())

    def read(self, name: str, into: torch.Tensor | Packed | None = None) -> torch.Tensor | Packed:
        """A tensor as it is stored: float or int64, or `Packed` and checked. ``into`` takes it where it is given."""
        place = self.places[name]
        if place.form is None or place.scale is None:
            assert not isinstance(into, Packed), name
            return self._tensor(place.stored, place.index, into)
        slot = into if isinstance(into, Packed) else None
        elements = self._tensor(place.stored, place.index, slot.elements if slot else None)
        scale = self._tensor(place.scale, (), slot.scale if slot else None)
        packed = slot or Packed(elements, scale, place.form)
        with self._blame(name):
            packed.check()
        return packed

    def empty(self, name: str) -> Packed:
        """Room for a quantised tensor."""
        place = self.places[name]
        assert place.form is not None, name
        shape = piece_shape(place.stored.shape, place.index)
        return Packed.empty((*shape[:-1], shape[-1] * place.form.per_byte), place.form)

    def foresee(self, name: str) -> None:
        """Asks the operating system to have a tensor's bytes ready; returns at once."""
        place = self.places[name]
        for spec in (place.stored, place.scale):
            if spec is not None and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._stream(spec).fileno(), spec.offset, spec.nbytes, os.POSIX_FADV_WILLNEED)

    def fill(self, name: str, target: torch.Tensor) -> None:
        """The exact values into ``target``, rounded only where its dtype is narrower than what is stored."""
        if self.places[name].form is None:
            self.read(name, target)
        else:
            packed = self.read(name)
            assert isinstance(packed, Packed), name
            target.copy_(packed.dequantise(target.dtype))

    @contextmanager
    def _blame(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.places[name].stored.file}: {name}: {error}") from None

    def walk(self, names: Iterable[str], progress: bool) -> Iterator[str]:
        """``names`` in the order in which a disk reads them fastest; ``progress`` shows bytes and ETA on stderr."""
        ordered = sorted(names, key=lambda n: (self.places[n].stored.file, self.places[n].stored.offset))
        sizes = [self._size(name) for name in ordered]
        with Progress(sum(sizes), "load", "B") if progress else nullcontext() as bar:
            for name, size in zip(ordered, sizes):
                yield name
                if bar:
                    bar.update(size)

    def _size(self, name: str) -> int:
        place = self.places[name]
        shape = piece_shape(place.stored.shape, place.index)
        return math.prod(shape) * BYTES[place.stored.dtype] + (place.scale.nbytes if place.scale else 0)

    def _tensor(self, spec: Stored, index: Index, out: torch.Tensor | None) -> torch.Tensor:
        return read_tensor(spec, self._stream(spec), index, out)

    def _stream(self, spec: Stored) -> BinaryIO:
        with self._opening:
            if spec.file not in self._open:
                self._open[spec.file] = spec.file.open("rb", buffering=0)
            return self._open[spec.file]

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._open.values():
            stream.close()
        self._open.clear()


def _places(folder: Path, stored: dict[str, Stored]) -> dict[str, Place]:
    """Official name -> where it is stored; scales still under their own names."""
    places: dict[str, Place] = {}
    for spec in stored.values():
        for name, index in pieces(spec.name, spec.shape):
            if name in places:
                raise ValueError(f"{folder}: {spec.name} and {places[name].stored.name} are both {name}")
            places[name] = Place(spec, index)
    return places


def _match(folder: Path, config: Config, places: dict[str, Place]) -> Config:
    """Compares a folder's tensors with what its config needs, joins scales to their tensors and drops from ``places``
    what is not wanted.

    Returns the config that the tensors really make: without MTP where they are absent, with the experts' format where
    it was not said. ValueError lists every difference.
    """
    mtp = [name for name in places if name.startswith("mtp.")]
    if config.num_nextn_predict_layers and not mtp:
        warnings.warn(f"{folder} holds no mtp.* tensors: loaded without its MTP block", stacklevel=4)
        config = config.replace(
            num_nextn_predict_layers=0, compress_ratios=config.compress_ratios[: config.num_hidden_layers]
        )
    elif mtp and not config.num_nextn_predict_layers:
        warnings.warn(f"{folder}: its config has no MTP block, {len(mtp)} mtp.* tensors are left out", stacklevel=4)
        for name in mtp:
            del places[name]
    wanted = {tensor.name: tensor for tensor in tensors(config)}
    missing, wrong, experts = set(wanted.keys() - places.keys()), [], set()
    for name in wanted.keys() & places.keys():
        place, tensor = places[name], wanted[name]
        shape = piece_shape(place.stored.shape, place.index)
        scale = places.pop(scale_name(name), None) if name.endswith(".weight") else None
        expected = tensor.shape
        quantised = scale is not None or place.stored.dtype not in PLAIN
        if quantised and tensor.kind not in ("expert", "linear"):
            wrong.append(f"{name} {place.stored.dtype} is never quantised")
            continue
        if scale is not None:
            form = STORED.get((place.stored.dtype, scale.stored.dtype))
            if form is None:
                wrong.append(f"{name} {place.stored.dtype} with {scale.stored.name} {scale.stored.dtype}")
                continue
            if scale.stored.shape != form.scales(tensor.shape):
                wrong.append(
                    f"{scale.stored.name} {list(scale.stored.shape)}, expected {list(form.scales(tensor.shape))}"
                )
            places[name] = replace(place, scale=scale.stored, form=form)
            expected = form.packed(tensor.shape)
        elif quantised:
            missing.add(scale_name(name))
            continue
        if tensor.kind == "expert":
            experts.add(place.stored.dtype)
        is_table = UNQUANTISED[tensor.kind] == "I64"
        if shape != expected or is_table != (place.stored.dtype == "I64"):
            wrong.append(f"{name} {list(shape)} {place.stored.dtype}, expected {list(expected)}")
    extra = places.keys() - wanted.keys()
    problems = [f"missing tensors: {listed(missing)}"] if missing else []
    problems += [f"extra tensors: {listed(extra)}"] if extra else []
    problems += [f"misshapen tensors: {listed(wrong)}"] if wrong else []
    if problems:
        raise ValueError(f"{folder} does not fit its config: {'; '.join(problems)}")
    return _expert_format(folder, config, experts)


def _expert_format(folder: Path, config: Config, dtypes: set[str]) -> Config:
    found = {{"I8": "fp4", "F8_E4M3": "fp8"}.get(dtype) for dtype in dtypes}
    if len(found) > 1:
        raise ValueError(f"{folder}: its experts are stored in several formats: {', '.join(sorted(dtypes))}")
    name = found.pop()
    if name and config.expert_dtype not in (None, name):
        raise ValueError(f"{folder}: its config says {config.expert_dtype} experts, they are stored as {name}")
    return config.replace(expert_dtype=name) if name else config
