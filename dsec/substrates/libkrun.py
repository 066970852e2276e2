"""libkrun: a machine is a process that has called a C library (krun.c; facts from libkrun.h).

It names its devices on the kernel's command line, which Debian's kernel does not read, so it needs a kernel of the
user's (DSEC_VMLINUX). libkrun has no snapshots: every machine boots, pausing one stops its process, and fork and
snapshot are refused. No machine was booted with it (see firecracker.py); what is tested is which functions are
called, in which order and how.
"""

from __future__ import annotations

import asyncio
import os
from ctypes.util import find_library
from pathlib import Path

from dsec.errors import SubstrateUnavailable
from dsec.guest import build
from dsec.launch.cgroups import Cgroup
from dsec.substrates.monitor import PORT, GuestAgent, Monitor, box_of, confined, socket_in, until

FIX = "install libkrun.so (github.com/containers/libkrun) where the linker finds it, on a host with KVM"
CMDLINE = "reboot=k panic=-1 quiet"
KERNEL = "a kernel (ELF) with CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, virtio-blk, vsock, erofs and overlay built in"


def find() -> str:
    """What the linker calls the library, or DSEC_LIBKRUN. SubstrateUnavailable if there is none."""
    name = os.environ.get("DSEC_LIBKRUN") or find_library("krun")
    if name is None:
        raise SubstrateUnavailable("no libkrun", reason="libkrun is not installed", fix=FIX)
    return name


class Libkrun(Monitor):
    """A running one. Files of `folder`: box/v.sock, box/console, log."""

    name = "libkrun"

    @classmethod
    async def start(
        cls, home: Path, folder: Path, group: Cgroup | None, memory: int, cpus: int, words: str,
        shown: list[tuple[Path, str]],
    ) -> Libkrun:  # fmt: skip
        """Boots a machine. `shown`: kernel, initrd and disks, as it finds them in its root."""
        library, box = find(), box_of(folder, group)
        if "/" in library:  # not where the linker looks, so perhaps not in the root it will have
            shown, library = [*shown, (Path(library), "libkrun.so")], "/libkrun.so"
        krun = build.program(Path(__file__).with_name("krun.c"), home / "cache", static=False)
        disks = sum(name.startswith("disk") for _, name in shown)
        program = ["/krun", library, str(cpus), str(memory), str(disks), str(PORT), f"{CMDLINE} {words}"]
        kvm = Path("/dev/kvm").exists()
        pid = confined(home, folder, group, program, files=16, kvm=kvm, shown=[(krun, "krun"), *shown], box=box)
        return cls(pid, folder, group)

    async def agent(self, deadline: float) -> GuestAgent:
        """The library takes a connection before its guest listens, and then ends it: only a greeting counts."""
        loop = asyncio.get_running_loop()
        over = loop.time() + deadline
        while True:
            try:
                with socket_in(self.folder / "box", "v.sock") as path:
                    _, agent = await loop.create_unix_connection(GuestAgent, path)
            except OSError:
                await until(self, over, "the guest's agent", 0.02)
                continue
            either: set[asyncio.Future[object]] = {agent.hello, agent.failed}  # type: ignore[arg-type]
            await asyncio.wait(either, timeout=max(over - loop.time(), 0.1), return_when=asyncio.FIRST_COMPLETED)
            if agent.hello.done() and not agent.hello.cancelled():
                return agent
            agent.close()
            await until(self, over, "the guest's agent", 0.02)

    async def console(self) -> str:
        try:
            fd = os.open(self.folder / "box/console", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return self._log()
        with open(fd, "rb") as file:
            file.seek(max(os.fstat(fd).st_size - 2000, 0))
            return file.read(2000).decode(errors="replace")
