"""`save`: a `Transformer` -> a model folder that is complete or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from dsv4.checkpoint.experts import StreamedStack
from dsv4.checkpoint.inventory import UNQUANTISED, TensorSpec, stored_as
from dsv4.checkpoint.layouts import home, to_transformers
from dsv4.checkpoint.shards import INDEX, Source, shards_by_layer, shards_of_size, write_shards
from dsv4.common.files import atomic_folder
from dsv4.config import Config
from dsv4.model import Transformer
from dsv4.model.costs import Tensor, tensors
from dsv4.numerics import FP4, FP8, RELEASES, Format, Packed, quantise, recast, scale_values

GIGABYTE = 1 << 30
Fetch = Callable[[str], "torch.Tensor | Packed"]
"""Official name -> the tensor, as it is kept."""


class SavesItself(Protocol):
    """A tokenizer, seen from here."""

    def save(self, folder: Path) -> object: ...


def save(
    model: Transformer,
    path: str | Path,
    layout: Literal["official", "transformers"] = "official",
    *,
    dtype: Literal["float32", "bfloat16", "native"] | None = None,
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes config.json, generation_config.json, the weights in shards with their index, and the tokenizer.

    ``layout`` "official": the names of the releases, experts one by one. "transformers": the module names of
    DeepseekV4ForCausalLM and its config dialect (MTP tensors keep their official names; it skips them). ``dtype``
    "bfloat16" stores what the releases store in bf16 and fp32 as such, "float32" everything in fp32, "native" as the
    releases do, in FP4 and FP8 (packed weights as they are, others are quantised: a loss); None follows the model.
    Shards hold at most ``max_shard_bytes`` (4 GiB), native ones a layer each. A model folder already at ``path`` is
    replaced at the very end; its other files (a tokenizer, a README) are carried over. A folder that holds no
    config.json is never replaced: ValueError.
    """
    if layout not in ("official", "transformers"):
        raise ValueError(f"layout must be 'official' or 'transformers', got {layout!r}")
    state = model.state_dict()
    kept = {name: module for name, module in model.named_modules() if isinstance(module, Packed | StreamedStack)}
    if dtype is None:
        dtype = "native" if kept else "bfloat16" if state["embed.weight"].dtype == torch.bfloat16 else "float32"
    if dtype not in ("float32", "bfloat16", "native"):
        raise ValueError(f"dtype must be 'float32', 'bfloat16' or 'native', got {dtype!r}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    path = Path(path).resolve()
    if path.exists() and not (path / "config.json").is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not a model folder (it has no config.json): refusing to replace it")

    def fetch(name: str) -> torch.Tensor | Packed:
        parameter, position = home(name)
        if module := kept.get(parameter):
            return module[position[0]] if position else module  # type: ignore[index, return-value]
        return state[parameter][position]

    target = Target.of(model.config, layout, dtype, quantise=not kept)
    sources = target.sources(fetch)
    by_layer = dtype == "native" and max_shard_bytes is None
    shards = shards_by_layer(sources) if by_layer else shards_of_size(sources, max_shard_bytes or 4 * GIGABYTE)
    with atomic_folder(path) as folder:
        write_shards(folder, shards)
        target.write_config(folder)
        for entry in path.iterdir() if path.is_dir() else ():
            if entry.suffix != ".safetensors" and entry.name != INDEX and not (folder / entry.name).exists():
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, folder / entry.name)
        if tokenizer is not None:
            tokenizer.save(folder)


@dataclass(frozen=True)
class Target:
    """What a folder is to hold: the config of its config.json, its layout, and each tensor's dtype or format.
    ``quantise``: whether values may be rounded into formats that they are not in."""

    config: Config
    layout: Literal["official", "transformers"]
    dtype: str
    quantise: bool

    @staticmethod
    def of(config: Config, layout: Literal["official", "transformers"], dtype: str, quantise: bool) -> Target:
        """``config`` with its number formats set. ValueError where the layout has no place for them."""
        if dtype == "native" and layout == "transformers":
            raise ValueError("transformers' layout is written unquantised: choose dtype 'bfloat16' or 'float32'")
        if dtype == "native":
            release = Config.preset("flash").quantization_config
            changes = {"expert_dtype": config.expert_dtype or "fp4", "quantization_config": release}
        else:
            changes = {"expert_dtype": None, "quantization_config": None}
        kept = "bfloat16" if dtype == "native" else dtype
        return Target(config.replace(torch_dtype=kept, **changes), layout, dtype, quantise)

    def write_config(self, folder: Path) -> None:
        """config.json and generation_config.json."""
        generation = {
            "bos_token_id": self.config.bos_token_id,
            "eos_token_id": self.config.eos_token_id,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        for name, data in (("config", self.config.to_dict(self.layout)), ("generation_config", generation)):
            (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def sources(self, fetch: Fetch) -> list[Source]:
        """Every tensor of the folder in forward order, made from ``fetch`` one at a time."""
        formats = RELEASES[self.config.expert_dtype]
        found: list[Source] = []
        for tensor in tensors(self.config):
            stacked = self.layout == "transformers" and home(tensor.name)[1] and not tensor.name.startswith("mtp.")
            if form := formats.get(tensor.kind):
                both = _Quantised(tensor.name, form, fetch, self.quantise)
                parts: tuple[Callable[[], list[torch.Tensor]], ...] = (both.elements, both.scale)
                found += [Source(spec, make) for spec, make in zip(stored_as(tensor, form), parts)]
            elif not stacked:
                name = tensor.name if self.layout == "official" else to_transformers(tensor.name)
                found.append(self._plain(name, tensor, tensor.shape, fetch, (tensor.name,)))
            elif home(tensor.name)[1] == (0,) and tensor.name.endswith((".w1.weight", ".w2.weight")):
                found.append(self._stack(tensor, fetch))
        return found

    def _stack(self, tensor: Tensor, fetch: Fetch) -> Source:
        """transformers stacks a layer's experts, w1's rows before w3's."""
        prefix, leaf = home(tensor.name)[0].rsplit(".", 1)
        count, (rows, columns) = self.config.n_routed_experts, tensor.shape
        if leaf == "w2":
            names = tuple(f"{prefix}.{e}.w2.weight" for e in range(count))
            return self._plain(f"{to_transformers(prefix)}.down_proj", tensor, (count, rows, columns), fetch, names)
        names = tuple(f"{prefix}.{e}.{w}.weight" for e in range(count) for w in ("w1", "w3"))
        return self._plain(f"{to_transformers(prefix)}.gate_up_proj", tensor, (count, 2 * rows, columns), fetch, names)

    def _plain(self, name: str, tensor: Tensor, shape: tuple[int, ...], fetch: Fetch, names: tuple[str, ...]) -> Source:
        kept = UNQUANTISED[tensor.kind]
        stored = "F32" if self.dtype == "float32" and kept == "BF16" else kept
        kind = torch.float32 if stored == "F32" else torch.bfloat16

        def parts() -> Iterator[torch.Tensor]:
            for one in names:
                data = fetch(one)
                yield data.dequantise(kind) if isinstance(data, Packed) else data

        return Source(TensorSpec(name, shape, stored), parts)


class _Quantised:
    """Elements and scales of one tensor, which is fetched and quantised once where they are written one after the
    other."""

    _last: tuple[_Quantised, Packed] | None = None

    def __init__(self, name: str, form: Format, fetch: Fetch, quantise: bool) -> None:
        self.name, self.form, self.fetch, self.quantise = name, form, fetch, quantise

    def elements(self) -> list[torch.Tensor]:
        return [self._packed().elements]

    def scale(self) -> list[torch.Tensor]:
        return [self._packed().scale]

    def _packed(self) -> Packed:
        if _Quantised._last is None or _Quantised._last[0] is not self:
            _Quantised._last = None
            _Quantised._last = (self, repacked(self.name, self.fetch(self.name), self.form, self.quantise))
        return _Quantised._last[1]


def repacked(name: str, data: torch.Tensor | Packed, form: Format, rounding: bool) -> Packed:
    """A tensor in ``form``: as it is, by a change of format that loses nothing (FP4 to FP8; the dtype of FP8 scales),
    or, where ``rounding`` is allowed, quantised anew. ValueError otherwise."""
    if isinstance(data, Packed):
        if data.form == form:
            return data
        if form.per_byte == 1 and data.form == FP4:
            eight = recast(data.elements, data.scale, form=form)
            if eight.exact:
                return Packed(eight.elements, eight.scale, form)
            if not rounding:
                raise ValueError(
                    f"{name}: FP4 scales of one FP8 block differ by 2^{eight.ratio}, more than FP8 holds exactly"
                )
        elif data.form.block == form.block and data.form.dtype == form.dtype:
            values = scale_values(data.scale)
            mantissa, exponent = torch.frexp(values)
            if form != FP8:
                return Packed(data.elements, values, form)
            if bool((mantissa == 0.5).all()):
                return Packed(data.elements, (exponent + 126).to(torch.uint8), form)
        data = data.dequantise() if rounding else data
    if isinstance(data, Packed) or not rounding:
        kind = data.form.dtype if isinstance(data, Packed) else str(data.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {kind}: storing it as {form.dtype} would round it (allow it with --quantise)")
    return Packed(*quantise(data.float(), form), form)
