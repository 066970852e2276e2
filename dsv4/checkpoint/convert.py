"""Folder to folder, tensor by tensor: between the released formats, bf16 and transformers' names. What a stopped
conversion has finished is kept beside the target, invisible, and the next run goes on from it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dsv4.checkpoint.folder import Folder
from dsv4.checkpoint.shards import (
    INDEX,
    Source,
    header,
    shard_name,
    shards_by_layer,
    shards_of_size,
    write_index,
    write_shard,
)
from dsv4.checkpoint.writer import GIGABYTE, Target
from dsv4.common.console import Progress
from dsv4.common.files import sync
from dsv4.model.costs import tensors
from dsv4.numerics import RELEASES

TARGETS: dict[str, tuple[Literal["official", "transformers"], str]] = {
    "official": ("official", "native"),
    "bf16": ("official", "bfloat16"),
    "transformers": ("transformers", "bfloat16"),
}
"""What --to says -> layout and dtype of the written folder."""


def convert(source: Path, path: Path, to: str, *, quantise: bool = False, expert_dtype: str | None = None) -> None:
    """Writes the model folder ``source`` again as ``path``, which must not exist.

    ``to``: "official" (FP4 or FP8 experts by ``expert_dtype``, FP8 elsewhere), "bf16" (official names), "transformers"
    (its names, bf16). Quantised tensors are kept, expanded exactly or recast without loss; only ``quantise`` allows
    rounding into FP4 or FP8. Other files of the folder (tokenizer, README) are copied. ValueError where a conversion
    would round, or where ``path`` is taken; OSError names the tensor that a full disk did not take.
    """
    if to not in TARGETS:
        raise ValueError(f"cannot convert to {to!r}; known: {', '.join(TARGETS)}")
    layout, dtype = TARGETS[to]
    with Folder(source) as folder:
        config = folder.config.replace(expert_dtype=expert_dtype or folder.config.expert_dtype)
        target = Target.of(config, layout, dtype, quantise)
        formats = RELEASES[target.config.expert_dtype]
        plain = [t.name for t in tensors(config) if t.kind in formats and not folder.places[t.name].form]
        if plain and not quantise:
            raise ValueError(
                f"{source} is not quantised ({plain[0]} ...): FP4 and FP8 round it, allow it by --quantise"
            )
        sources = target.sources(folder.read)
        same = to == "official" and not plain and config.expert_dtype == folder.config.expert_dtype

        def finish(staging: Path) -> None:
            if not same:
                target.write_config(staging)
            copy_others(source, staging, config=same)  # the release's own words, where nothing changed

        plan = {"from": str(source.resolve()), "to": to, "quantise": quantise, "experts": expert_dtype}
        plan["files"] = stamps({place.stored.file for place in folder.places.values()})
        shards = shards_by_layer(sources) if dtype == "native" else shards_of_size(sources, 4 * GIGABYTE)
        write_folder(path, shards, finish, plan)


def copy_others(source: Path, staging: Path, config: bool = True) -> None:
    """Copies everything of a model folder that is not weights; config.json only where it still holds."""
    for entry in source.iterdir():
        if entry.suffix != ".safetensors" and entry.name != INDEX and (config or entry.name != "config.json"):
            if entry.is_dir():
                shutil.copytree(entry, staging / entry.name, dirs_exist_ok=True)
            else:
                shutil.copy2(entry, staging)


def stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells one set of source files from another: names, sizes, times."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]


def write_folder(
    path: Path,
    shards: list[list[Source]],
    finish: Callable[[Path], None],
    plan: dict[str, Any],
    name: Callable[[int, int], str] = shard_name,
) -> None:
    """Writes shards, called ``name(number, count)``, and whatever ``finish`` adds, with an index where the names are
    those that have one; ``path`` appears when all is there and synced.

    Finished shards wait in ``.NAME.partial`` beside it; a run with the same ``plan`` keeps them, one with another plan
    is refused with a ValueError.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists: a conversion writes a new folder")
    staging = path.with_name(f".{path.name}.partial")
    sizes = [8 + len(header(shard)) + sum(source.spec.nbytes for source in shard) for shard in shards]
    with _claimed(staging, json.dumps(plan, sort_keys=True, default=str)):
        done = [(staging / name(n, len(shards))).is_file() for n in range(1, len(shards) + 1)]
        left = sum(size for size, there in zip(sizes, done) if not there)
        if (free := shutil.disk_usage(staging).free) < left:
            raise OSError(f"{path} needs {left:,} more bytes, its disk has {free:,}")
        with Progress(sum(sizes), "convert", "B", done=sum(sizes) - left) as bar:
            for number, shard in enumerate(shards, 1):
                file = staging / name(number, len(shards))
                if done[number - 1]:
                    continue
                fresh = file.with_suffix(".tmp")
                try:
                    write_shard(fresh, shard, bar.update)
                    sync(fresh)
                except BaseException:
                    fresh.unlink(missing_ok=True)
                    raise
                os.replace(fresh, file)
        try:
            if name is shard_name:
                write_index(staging, shards)
            finish(staging)
        except OSError as error:  # a disk that is full does not say where
            where = error.filename or staging
            raise OSError(
                error.errno, f"{error.strerror} while writing {where} (weights are kept; repeat it)"
            ) from error
        (staging / "plan.json").unlink()
        for entry in sorted(staging.rglob("*"), reverse=True):
            sync(entry)
        sync(staging)
        if path.exists():
            path.rmdir()  # empty
        os.rename(staging, path)
        sync(path.parent)


@contextmanager
def _claimed(staging: Path, plan: str) -> Iterator[None]:
    """One process at a time writes into ``staging``, and only what ``plan`` says."""
    file = staging / "plan.json"
    staging.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {staging}") from None
        stream.seek(0)
        begun = stream.read()
        if begun and begun != plan:
            raise ValueError(f"{staging} holds another conversion, unfinished: repeat that one, or delete it")
        if not begun:  # shards without a plan are from a run that was stopped in its last moment: nobody knows whose
            for file in staging.glob("*.safetensors"):
                file.unlink()
            stream.write(plan)
            stream.flush()
        yield
