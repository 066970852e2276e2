"""What machines start from: a root file system or a disk, and stopped machines that clones are made of.

A checkpoint is a folder with `ram` (sparse), `device` (a few KiB), perhaps `disk.qcow2`, and `meta.json`. Templates and
snapshots are both checkpoints, so forking a running machine is a snapshot and as many clones as wanted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsec.errors import ImageError, NotFound, SubstrateUnavailable
from dsec.substrates import qemu
from dsec.substrates.qemu import Ram

LAYERS = 20


@dataclass(frozen=True)
class Root:
    """What a machine starts from: nothing (the initrd's busybox), read-only file systems, or one bootable disk."""

    disks: tuple[Path, ...] = ()
    """Layers of a root file system, the lowest first; or the bootable disk."""
    format: str = "erofs"
    """"erofs" (layers), "raw" or "qcow2" (a bootable disk, written through an overlay)."""
    boot: str = "agent"
    """PID 1: "agent" or "systemd"; a bootable disk brings its own."""

    def describe(self) -> dict[str, Any]:
        """JSON, with what changes when a file does."""
        stats = [path.stat() for path in self.disks]
        files = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(self.disks, stats, strict=True)]
        return {"files": files, "format": self.format, "boot": self.boot}

    @classmethod
    def read(cls, meta: dict[str, Any]) -> Root:
        """Raises ImageError when a file is gone or another."""
        root = cls(tuple(Path(file[0]) for file in meta["files"]), meta["format"], meta["boot"])
        try:
            now = root.describe()
        except FileNotFoundError as error:
            raise ImageError(f"a disk of the machine is gone: {error}") from None
        if now != meta:
            raise ImageError(f"a disk of the machine is not what it was: {meta['files']}")
        return root


@dataclass
class Checkpoint:
    """A stopped machine that clones start from; see the top of this file."""

    folder: Path
    memory: int
    cpus: int
    accel: str
    root: Root
    ram: Ram | None = field(default=None, repr=False)

    @classmethod
    def read(cls, folder: Path, meta: dict[str, Any] | None = None) -> Checkpoint:
        """From its folder, or from what `describe` gave. Raises NotFound or ImageError."""
        try:
            meta = json.loads((folder / "meta.json").read_text()) if meta is None else meta
            if meta["qemu"] != qemu_identity():
                raise ImageError(f"{folder} was made by another QEMU")
            root = Root.read(meta["root"])
            return cls(folder, int(meta["memory"]), int(meta["cpus"]), str(meta["accel"]), root)
        except FileNotFoundError as error:
            raise NotFound(f"no checkpoint at {folder}: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(f"{folder} is no checkpoint of a machine: {error!r}") from None

    def describe(self) -> dict[str, Any]:
        """All but the memory, as JSON."""
        shape = {"memory": self.memory, "cpus": self.cpus, "accel": self.accel}
        return {**shape, "root": self.root.describe(), "qemu": qemu_identity()}

    def load(self) -> Ram:
        """Its memory, sealed; read from the folder the first time."""
        if self.ram is None:
            ram = Ram(self.memory << 20)
            ram.load(self.folder / "ram")
            ram.seal()
            self.ram = ram
        return self.ram


def qemu_identity() -> list[Any]:
    program = shutil.which(qemu.BINARY)
    if program is None:
        raise SubstrateUnavailable(f"no {qemu.BINARY}", reason=f"{qemu.BINARY} is not installed", fix=qemu.FIX)
    stat = os.stat(program)
    return [stat.st_size, stat.st_mtime_ns]


async def file_system(home: Path, image: str, boot: str = "agent") -> Root:
    """An image as a read-only root: an EROFS file or a root folder by path (packed once), or an image's name. It is the
    guest's kernel that parses it, so here a tenant's own EROFS file does no harm."""
    if not image.startswith("/"):
        return Root(await asyncio.to_thread(_layers, home, image), boot=boot)
    from dsec.images import erofs

    path = Path(image)
    if not path.is_dir():
        if not await asyncio.to_thread(erofs.is_erofs, path):
            raise ImageError(f"{image} is neither an EROFS file nor a root folder")
        return Root((path,), boot=boot)
    stat = path.stat()
    name = hashlib.sha256(f"{path}:{stat.st_ino}:{stat.st_mtime_ns}".encode()).hexdigest()[:24]
    target = home / "vm/roots" / f"{name}.erofs"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        await asyncio.to_thread(erofs.pack, path, target)
    return Root((target,), boot=boot)


def _layers(home: Path, name: str) -> tuple[Path, ...]:
    from dsec.images.debian import ensure
    from dsec.images.layers import Images

    images = Images(home)
    ensure(images, name)
    image = images.get(name) if name in images.names() else images.pull(name)
    if not all(images.present(digest) for _, digest, _ in image.layers):
        images.pull(name)
    if len(image.layers) > LAYERS:
        raise ImageError(f"image {name!r} has {len(image.layers)} layers; a machine takes {LAYERS} disks")
    return tuple(images.file(digest) for _, digest, _ in image.layers)


async def qcow2(path: Path, root: Root, size: int) -> None:
    """An empty overlay as large as the disk it lies on; how much of it may be written is the file-size limit."""
    (disk,) = root.disks
    program = shutil.which("qemu-img")
    if program is None:
        raise SubstrateUnavailable("no qemu-img", reason="qemu-img is not installed", fix="apt-get install qemu-utils")
    if root.format == "raw":
        bytes_ = disk.stat().st_size
    else:
        bytes_ = json.loads(await _run(program, "info", "--output=json", "-f", root.format, str(disk)))["virtual-size"]
    await _run(program, "create", "-q", "-f", "qcow2", str(path), str(bytes_))


async def _run(*command: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, stdin=asyncio.subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise ImageError(f"{Path(command[0]).name} failed: {out[-400:].decode(errors='replace').strip()}")
    return out
