"""Which monitors beside QEMU a microVM can have, and what each is started with. All of them need a KVM that boots."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsec.errors import SubstrateUnavailable
from dsec.launch.cgroups import Cgroup
from dsec.substrates import firecracker, libkrun, linux
from dsec.substrates.firecracker import Firecracker
from dsec.substrates.libkrun import Libkrun
from dsec.substrates.monitor import PORT, Monitor

if TYPE_CHECKING:
    from dsec.substrates.checkpoint import Checkpoint

RUNTIMES: dict[str, type[Monitor]] = {"firecracker": Firecracker, "libkrun": Libkrun}
KVM = "/dev/kvm"
BOOT_DEADLINE = 20.0
"""Seconds until a booting machine's agent answers. A /dev/kvm that boots nothing must not hold anybody longer."""


def needed(runtime: str) -> None:
    """Raises SubstrateUnavailable, naming the first thing that is missing."""
    firecracker.find() if runtime == "firecracker" else libkrun.find()
    if not os.access(KVM, os.R_OK | os.W_OK):
        reason = f"{runtime} needs KVM, and {KVM} cannot be opened"
        raise SubstrateUnavailable(reason, reason=reason, fix='a host with KVM, or runtime="" (QEMU emulates)')
    if runtime == "libkrun" and not os.environ.get("DSEC_VMLINUX"):
        reason = "libkrun names its devices on the kernel's command line, which Debian's kernel does not read"
        raise SubstrateUnavailable(reason, reason=reason, fix=f"set DSEC_VMLINUX to {libkrun.KERNEL}")


def identity(runtime: str) -> list[Any]:
    """What changes when another release is installed: snapshots fit only the one that made them."""
    program = shutil.which(firecracker.BINARY) if runtime == "firecracker" else None
    return [os.stat(program).st_size, os.stat(program).st_mtime_ns] if program else []


@dataclass
class Engine:
    """How machines of one shape are started: from a template's folder if there is one, else from power-on."""

    home: Path
    point: Checkpoint
    disk: int
    template: Path | None = None

    def files(self) -> list[tuple[Path, str]]:
        """Kernel, initrd and layers, and the names they have in the machine's root. DSEC_VMLINUX is another kernel,
        with virtio-mmio and vsock built in or as Debian's modules."""
        found = linux.kernel(self.home)
        kernel = Path(given) if (given := os.environ.get("DSEC_VMLINUX")) else linux.elf(self.home, found)
        layers = [(path, f"disk{n}") for n, path in enumerate(self.point.root.disks)]
        return [(kernel, "kernel"), (linux.initrd(self.home, found, True), "initrd"), *layers]

    async def start(self, folder: Path, group: Cgroup | None) -> Monitor:
        """Starts one in `folder`."""
        point, files = self.point, self.files()
        root = point.root
        words = f"dsec.size={self.disk} dsec.boot={root.boot} dsec.layers={len(root.disks)} dsec.vsock={PORT}"
        if point.monitor == "libkrun":
            return await Libkrun.start(self.home, folder, group, point.memory, point.cpus, words, files)
        if self.template is not None:
            files += [(self.template / name, name) for name in ("device", "ram")]
        machine = await Firecracker.start(self.home, folder, group, point.memory, files)
        try:
            if self.template is not None:
                await machine.api.load()
            else:
                await machine.api.boot(point.memory, point.cpus, len(root.disks), words)
        except BaseException:
            await machine.kill()
            raise
        return machine
