"""Full machines: Debian with systemd, and a disk that boots by itself. Minutes under emulation."""

import asyncio
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm_bench import Bench, shell

from dsec.errors import ImageError
from dsec.substrates import linux
from dsec.substrates.vm import VMSubstrate
from dsec.types import Spec

SPEC = Spec(substrate="vm", memory=512, disk=64, cpu=2)


@pytest.fixture(scope="module")
def full(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(VMSubstrate(home), tmp_path_factory.mktemp("full"))
    yield bench
    bench.close()


def test_a_disk_that_is_not_there_is_refused(full: Bench, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no disk image"):
        full.run(full.create(SPEC.but(image=str(tmp_path / "none.qcow2"))))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_debian_with_systemd(full: Bench) -> None:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("no mmdebstrap: apt-get install mmdebstrap")

    async def work() -> None:
        try:
            machine = await full.create(SPEC)
        except ImageError as error:
            if "mmdebstrap failed" in str(error):
                pytest.skip(f"the image cannot be built here: {error}")
            raise
        code, out = await shell(machine, "cat /proc/1/comm; systemctl is-system-running; . /etc/os-release; echo $ID")
        assert (code, out.split()) == (0, ["systemd", "running", "debian"])
        unit = "[Service]\nExecStart=/bin/sh -c 'echo service > /run/it-ran'\n"
        await machine.agent.write("/etc/systemd/system/mine.service", unit.encode())
        code, out = await shell(machine, "systemctl start mine && sleep 1 && cat /run/it-ran")
        assert (code, out) == (0, "service\n")
        fork = await full.create(snapshot=await _snapshot(machine, full.folder() / "snap"))
        assert (await shell(fork, "cat /run/it-ran; systemctl is-system-running"))[1] == "service\nrunning\n"
        await asyncio.gather(machine.destroy(), fork.destroy())

    full.run(work(), 800)


async def _snapshot(machine: object, folder: Path) -> Path:
    await machine.snapshot(folder)  # type: ignore[attr-defined]
    return folder


INIT = """#!/bin/sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /run/dsec /root /tmp /disk
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
for m in $(cat /modules/order); do insmod /modules/$m; done
cp /bin/wake /run/dsec/
cp /sys/firmware/qemu_fw_cfg/by_name/opt/dsec/agent/raw /run/agent; chmod 700 /run/agent
mount -t vfat /dev/vda /disk
while ! grep -q dsec.agent /sys/class/virtio-ports/vport0p1/name; do sleep 0.05; done
/run/agent --device /dev/vport0p1
reboot -f
"""


@pytest.mark.slow
def test_a_disk_boots_by_itself_and_is_written_through_an_overlay(
    full: Bench, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SYSLINUX on a FAT file system, which the firmware starts; the agent comes out of the firmware's configuration."""
    if not all(shutil.which(name) for name in ("syslinux", "mkfs.vfat", "mcopy")):
        pytest.skip("no boot loader: apt-get install syslinux mtools dosfstools")
    kernel = linux.kernel(home)
    monkeypatch.setattr(linux, "INIT", INIT)
    monkeypatch.setattr(
        linux, "MODULES", [*linux.MODULES, "qemu_fw_cfg", "vfat", "nls_cp437", "nls_ascii", "nls_iso8859-1"]
    )
    linux.initrd.cache_clear()
    initrd = linux.initrd(home, kernel)
    linux.initrd.cache_clear()
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(48 << 20)
    config = tmp_path / "syslinux.cfg"
    config.write_text("default linux\nlabel linux\nkernel vmlinuz\nappend initrd=initrd console=ttyS0 quiet panic=-1\n")
    for command in (
        ["mkfs.vfat", disk],
        ["mcopy", "-i", disk, kernel.image, "::vmlinuz"],
        ["mcopy", "-i", disk, initrd, "::initrd"],
        ["mcopy", "-i", disk, config, "::syslinux.cfg"],
        ["syslinux", "--install", disk],
    ):
        subprocess.run(command, check=True, capture_output=True)
    before = disk.read_bytes()

    async def work() -> None:
        spec = SPEC.but(image=str(disk), memory=192, cpu=1)
        one, two = await full.create(spec), await full.create(spec)
        assert (await shell(one, "ls /disk"))[1].split() == [
            "initrd",
            "ldlinux.c32",
            "ldlinux.sys",
            "syslinux.cfg",
            "vmlinuz",
        ]
        assert (await shell(one, "echo mine > /disk/mine; sync; cat /disk/mine"))[1] == "mine\n"
        assert (await shell(two, "cat /disk/mine"))[0] != 0
        fork = await full.create(snapshot=await _snapshot(one, tmp_path / "snap"))
        assert (await shell(fork, "echo 3 > /proc/sys/vm/drop_caches; cat /disk/mine"))[1] == "mine\n"
        await asyncio.gather(one.destroy(), two.destroy(), fork.destroy())

    full.run(work(), 300)
    assert disk.read_bytes() == before, "the image itself was written"
    assert stat.S_ISREG(disk.stat().st_mode)
