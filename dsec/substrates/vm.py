"""Full machines: Debian with systemd, or any disk that boots; cloned from a booted one like microVMs.

"host" (every substrate's default) is here the image "systemd", built from Debian's packages on first use. A root
folder, an EROFS file or a named image must hold an init; a path that ends in .raw, .img or .qcow2 is a disk that boots.
Such a disk must start the agent, which the firmware hands it (no copying into the image, always the right version):

    [Service]
    ExecStart=/bin/sh -c 'modprobe qemu_fw_cfg; install -m 700 /sys/firmware/qemu_fw_cfg/by_name/opt/dsec/agent/raw \
        /run/dsec-agent && exec /run/dsec-agent --device /dev/virtio-ports/dsec.agent'
"""

from __future__ import annotations

from pathlib import Path

from dsec.errors import ImageError
from dsec.images.debian import PACKAGES
from dsec.substrates.checkpoint import Root, file_system
from dsec.substrates.microvm import MicroVMSubstrate
from dsec.types import Spec

FORMATS = {".raw": "raw", ".img": "raw", ".qcow2": "qcow2"}
IMAGE = "systemd"
PACKAGES.setdefault(IMAGE, ("systemd-sysv", "udev", "dbus", "procps", "iproute2", "ca-certificates"))


class VMSubstrate(MicroVMSubstrate):
    """See base.Substrate."""

    name = "vm"
    runtimes = ()
    boot_deadline = 240.0
    code = 256

    async def root(self, spec: Spec) -> Root:
        """What `spec.image` boots from."""
        format = FORMATS.get(Path(spec.image).suffix) if spec.image.startswith("/") else None
        if format is None:
            return await file_system(self.home, IMAGE if spec.image == "host" else spec.image, "systemd")
        disk = Path(spec.image)
        if not disk.is_file():
            raise ImageError(f"no disk image at {disk}")
        return Root((disk,), format, "disk")
