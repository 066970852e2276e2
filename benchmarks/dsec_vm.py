"""How soon a machine runs its first command, and what memory it takes: ours beside bare QEMU, same kernel and initrd.

    python benchmarks/dsec_vm.py [--rounds 10] [--live 30] [--vm] [--busy-ok]

Peers in the same run, unconfined: QEMU's cold boot, and QEMU restoring its own saved state (memory and devices in one
stream). Rounds alternate. Each figure is from request to the first output of a command; medians, with load and peak.
--vm adds the full machine (Debian with systemd: its image is built on first use). Emulation unless DSEC_ACCEL=kvm.
Bars: microVM from template p50 <= 250 ms and <= 40 MiB each; full VM cold <= 30 s, from template <= 1.5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsec.guest.build import home
from dsec.guest.protocol import Agent
from dsec.substrates import linux
from dsec.substrates.microvm import MicroVMSubstrate, VirtualMachine
from dsec.substrates.qemu import BINARY, Qmp
from dsec.substrates.vm import VMSubstrate
from dsec.types import Spec

SPEC = Spec(substrate="microvm", memory=128, disk=32)


async def first_output(agent: Agent) -> None:
    out: list[bytes] = []
    process = agent.exec("echo ready", lambda kind, data: out.append(data))
    done = await process.done
    process.forget()  # what a saved agent remembers, its copy does
    assert done.code == 0 and b"".join(out) == b"ready\n"


def pss(pid: int) -> float:
    """MiB: private memory and a fair share of what is shared."""
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


class Bare:
    """QEMU as one would start it by hand."""

    def __init__(self, folder: Path, kernel: Path, initrd: Path, incoming: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir()
        command = [BINARY, "-M", "pc", "-accel", "tcg,thread=single,tb-size=32", "-cpu", "max", "-m", str(SPEC.memory)]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-kernel", str(kernel)]
        words = "console=ttyS0 quiet panic=-1 no_timer_check dsec.layers=0 dsec.size=32 dsec.boot=agent"
        command += ["-initrd", str(initrd), "-append", words, "-serial", "null"]
        for name in ("qmp", "agent"):
            command += ["-chardev", f"socket,id={name},path={folder / name},server=on,wait=off"]
        command += ["-mon", "chardev=qmp,mode=control", "-device", "virtio-serial-pci"]
        command += ["-device", "virtserialport,chardev=agent,name=dsec.agent", "-device", "virtio-rng-pci"]
        command += ["-incoming", f"exec:cat {incoming}"] if incoming else []
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    async def agent(self) -> Agent:
        while True:
            with socket.socket(socket.AF_UNIX) as trial:
                if trial.connect_ex(str(self.folder / "qmp")) == 0 and (self.folder / "agent").exists():
                    break
            await asyncio.sleep(0.002)
        return await Agent.connect(self.folder / "agent", serial=True)

    async def save(self, target: Path) -> None:
        qmp = await Qmp.connect(str(self.folder / "qmp"))
        await qmp.execute("migrate-set-parameters", max_bandwidth=1 << 34)
        await qmp.execute("migrate", uri=f"exec:cat > {target}")
        while (await qmp.execute("query-migrate"))["status"] != "completed":
            await asyncio.sleep(0.02)
        qmp.close()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


async def bare(folder: Path, kernel: Path, initrd: Path, incoming: Path | None, save: Path | None = None) -> float:
    begin = time.perf_counter()
    machine = Bare(folder, kernel, initrd, incoming)
    try:
        agent = await machine.agent()
        await first_output(agent)
        seconds = time.perf_counter() - begin
        agent.close()
        if save is not None:
            await machine.save(save)
        return seconds
    finally:
        machine.end()


async def ours(substrate: MicroVMSubstrate, spec: Spec, folder: Path) -> tuple[float, VirtualMachine]:
    folder.mkdir(mode=0o700)
    begin = time.perf_counter()
    machine = await substrate.create("bench", spec, folder)
    await first_output(machine.agent)
    return time.perf_counter() - begin, machine


async def measure(options: argparse.Namespace, scratch: Path) -> None:
    found: dict[str, list[float]] = {}
    count = iter(range(1 << 20))

    def note(label: str, value: float) -> None:
        found.setdefault(label, []).append(value)

    def folder() -> Path:
        return scratch / str(next(count))

    state = scratch / "state"
    state.mkdir(mode=0o711)
    (state / "vm").mkdir()
    (state / "vm/kernel").symlink_to(home() / "vm/kernel")
    kernel = linux.kernel(home())
    initrd = linux.initrd(state, kernel)
    substrate = MicroVMSubstrate(state)
    seconds, machine = await ours(substrate, SPEC, folder())
    note("microVM, first ever (boot, template, clone), s", seconds)
    await machine.destroy()
    saved = scratch / "saved"
    await bare(folder(), kernel.image, initrd, None, saved)
    for _ in range(options.rounds):
        note("bare QEMU cold boot, s", await bare(folder(), kernel.image, initrd, None))
        note("bare QEMU restore of saved state, ms", 1000 * await bare(folder(), kernel.image, initrd, saved))
        seconds, machine = await ours(substrate, SPEC, folder())
        note("microVM from template, ms", 1000 * seconds)
        begin = time.perf_counter()
        await machine.snapshot(snapshot := folder())
        fork_folder = folder()
        fork_folder.mkdir()
        fork = await substrate.create("fork", SPEC, fork_folder, snapshot)
        await first_output(fork.agent)
        note("microVM snapshot and fork, ms", 1000 * (time.perf_counter() - begin))
        await asyncio.gather(machine.destroy(), fork.destroy())
    live = []
    begin = time.perf_counter()
    for _ in range(options.live):
        live.append((await ours(substrate, SPEC, folder()))[1])
    note(f"{options.live} live microVMs one after another, s", time.perf_counter() - begin)
    note("microVM memory (PSS), MiB", statistics.mean(pss(each.machine.pid) for each in live))
    await asyncio.gather(*(each.destroy() for each in live))
    await substrate.close()
    if options.vm:
        full = VMSubstrate(home())
        spec = Spec(substrate="vm", memory=512, cpu=2, disk=256 - next(count) % 64)  # a template nobody has: cold
        seconds, machine = await ours(full, spec, folder())
        note("full VM cold (boot, template, clone), s", seconds)
        await machine.destroy()
        for _ in range(options.rounds):
            seconds, machine = await ours(full, spec, folder())
            note("full VM from template, s", seconds)
            note("full VM memory (PSS), MiB", pss(machine.machine.pid))
            await machine.destroy()
        await full.close()
    for label, values in found.items():
        spread = f"  (min {min(values):.3g}, max {max(values):.3g}, n {len(values)})" if len(values) > 1 else ""
        print(f"{label:50} {statistics.median(values):9.3g}{spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--live", type=int, default=30)
    parser.add_argument("--vm", action="store_true", help="the full machine too")
    parser.add_argument("--busy-ok", action="store_true", help="measure although the machine is busy")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5 and not options.busy_ok:
        sys.exit(f"load {load:.2f}: the machine is busy (--busy-ok measures anyway)")
    os.environ.setdefault("DSEC_ACCEL", "tcg")
    with tempfile.TemporaryDirectory(prefix="dsec-vm-") as scratch:
        Path(scratch).chmod(0o711)
        asyncio.run(measure(options, Path(scratch)))
    print(f"{os.environ['DSEC_ACCEL']}, {os.cpu_count()} cores, load {load:.2f} before, {os.getloadavg()[0]:.2f} after")


if __name__ == "__main__":
    main()
