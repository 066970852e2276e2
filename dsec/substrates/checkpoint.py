"""What machines start from: a root file system or a disk, and stopped machines that clones are made of.

A checkpoint is a folder with `ram` (sparse), `device` (a few KiB), perhaps `disk.qcow2`, and `checkpoint.json`.
Templates and snapshots are both checkpoints, so forking a running machine is a snapshot and as many clones as wanted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsec.errors import ImageError, NotFound, SubstrateUnavailable
from dsec.guest.protocol import VERSION
from dsec.substrates import engines, qemu
from dsec.substrates.qemu import Ram

LAYERS = 20
NAME = "checkpoint.json"


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


@dataclass
class Checkpoint:
    """A stopped machine that clones start from; see the top of this file."""

    folder: Path
    memory: int
    cpus: int
    accel: str
    root: Root
    ram: Ram | None = field(default=None, repr=False)
    monitor: str = ""
    """What it ran in: "" is QEMU."""

    @classmethod
    def known(cls, folder: Path, meta: dict[str, Any]) -> Checkpoint:
        """From what `describe` gave; nothing is checked."""
        files = tuple(Path(file[0]) for file in meta["root"]["files"])
        root = Root(files, meta["root"]["format"], meta["root"]["boot"])
        monitor = meta.get("monitor", [""])[0]
        return cls(folder, int(meta["memory"]), int(meta["cpus"]), str(meta["accel"]), root, monitor=monitor)

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """From its folder. Raises NotFound, or ImageError if QEMU or a disk is not what it was: such a machine would
        wake up with another body."""
        try:
            meta = json.loads((folder / NAME).read_text())
            point = cls.known(folder, meta)
            now = point.describe()
        except FileNotFoundError as error:
            raise NotFound(f"no checkpoint at {folder}, or its disk is gone: {error}") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ImageError(f"{folder} is no checkpoint of a machine: {error!r}") from None
        if (agent := meta.get("agent", 1)) != VERSION:  # it runs in there, and nobody can exchange it
            text = f"the agent in the checkpoint {folder} speaks version {agent}, this host version {VERSION}"
            raise ImageError(f"{text}: snapshots of machines do not outlive a change of that; boot a new one")
        if now != meta:
            changed = [key for key in now if now[key] != meta.get(key)]
            raise ImageError(f"the checkpoint {folder} does not fit this host any more: {', '.join(changed)} changed")
        return point

    def describe(self) -> dict[str, Any]:
        """All but the memory, as JSON."""
        shape = {"memory": self.memory, "cpus": self.cpus, "accel": self.accel}
        program = (
            {"monitor": [self.monitor, *engines.identity(self.monitor)]} if self.monitor else {"qemu": qemu_identity()}
        )
        return {**shape, "root": self.root.describe(), **program, "agent": VERSION}

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


def disk_size(path: Path, format: str) -> int:
    """Bytes of a raw or qcow2 disk as the machine sees it. ImageError if the qcow2 names other files."""
    if format == "raw":
        return path.stat().st_size
    with path.open("rb") as file:
        head = file.read(104)
    if len(head) < 72 or head[:4] != b"QFI\xfb":
        raise ImageError(f"{path} is no qcow2 disk")
    version, backing = struct.unpack_from(">IQ", head, 4)
    features = int.from_bytes(head[72:80], "big") if version >= 3 else 0
    if backing or features & 4:
        raise ImageError(f"{path} names other files of the host; flatten it: qemu-img convert -O qcow2")
    return int.from_bytes(head[24:32], "big")


def qcow2(size: int) -> bytes:
    """An empty qcow2 overlay over a disk of `size` bytes (version 3, clusters of 64 KiB): header, a table and a block
    of reference counts, and the first-level table. What it lies over is said on QEMU's command line, not here."""
    cluster, entries = 1 << 16, -(-size // (1 << 29))
    table = -(-entries * 8 // cluster)
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, size, 0, entries, 3 * cluster, cluster, 1, 0, 0)
    head += struct.pack(">QQQII", 0, 0, 0, 4, 104)  # features, then 16-bit counts
    counts = b"\0\1" * (3 + table)
    blocks = (head, (2 * cluster).to_bytes(8, "big"), counts, bytes(table * cluster))
    return b"".join(block.ljust(cluster, b"\0") for block in blocks)
