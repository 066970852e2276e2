"""microVMs: a machine is booted once, stopped, and its memory kept; every sandbox is a copy-on-write clone of that.

A clone has the clock and the random generator of its checkpoint, so before anything else runs in it the host sends it
the time and 64 random bytes (wake.c). What user programs had drawn before a snapshot they still have: that cannot be
taken back. Isolation is 3 under emulation, 4 under KVM. Writable files live in the machine's memory: `disk` caps them,
and so does `memory`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from dsec.errors import DsecError, InvalidRequest, NotFound, SandboxFailed, SubstrateUnavailable, Timeout
from dsec.guest import build
from dsec.launch import cgroups
from dsec.launch.cgroups import Cgroup, started
from dsec.substrates import engines, linux, qemu
from dsec.substrates.base import Probe
from dsec.substrates.checkpoint import NAME, Checkpoint, Root, disk_size, file_system, qcow2
from dsec.substrates.monitor import GuestAgent, Monitor
from dsec.substrates.qemu import Disk, Machine, Qemu, Ram
from dsec.types import Capabilities, Spec, Stats

log = logging.getLogger("dsec.vm")
WAKE_DEADLINE = 30.0
"""Seconds a clone has until its first command has run; it needs about 0.1."""
KVM_DEADLINE = 15.0
KEEP = 4
"""Checkpoints whose memory stays open between clones."""


SYSTEMD = " systemd.firstboot=off systemd.show_status=no" + "".join(
    f" systemd.mask={unit}"
    for unit in "serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer "
    "dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-random-seed.service "
    "systemd-modules-load.service modprobe@configfs.service modprobe@dm_mod.service modprobe@drm.service "
    "modprobe@efi_pstore.service modprobe@fuse.service modprobe@loop.service systemd-journal-flush.service "
    "systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-pstore.service "
    "dev-hugepages.mount sys-kernel-debug.mount sys-kernel-tracing.mount".split()
)
"""What a machine that lives for minutes has no use for, or cannot do: its image has none of its kernel's modules. First
boot would ask its console for a time zone."""
_Boot = tuple[linux.Kernel, Path]


def capabilities(accel: str, forks: bool = True) -> Capabilities:
    """Of a machine that runs on "kvm" or "tcg"."""
    return Capabilities(4 if accel == "kvm" else 3, fork_memory=forks, network=True, snapshots=forks, limits="machine")


class MicroVMSubstrate:
    """See base.Substrate."""

    name = "microvm"
    runtimes: tuple[str, ...] = tuple(engines.RUNTIMES)
    boot_deadline = 120.0
    code = 32

    def __init__(self, home: Path) -> None:
        self.home = home
        self.groups = cgroups.detect()
        self._accel = os.environ.get("DSEC_ACCEL") or self._remembered()
        self._points: OrderedDict[str, Checkpoint] = OrderedDict()
        self._building: dict[str, asyncio.Lock] = {}
        self._burials: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        """Of machines made now; level 4 only after KVM has booted one."""
        return capabilities(self._accel)

    def isolation(self, spec: Spec) -> int:
        """What the runtime that `spec` names gives: all but QEMU need KVM."""
        return 4 if spec.runtime else self.capabilities.isolation

    async def probe(self, runtime: str = "") -> Probe:
        begin = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(prefix="dsec-probe-") as scratch:
                running = await self.create("probe", Spec(substrate=self.name, runtime=runtime), Path(scratch))  # type: ignore[arg-type]
                try:
                    done = await asyncio.wait_for(running.agent.exec(["true"], lambda kind, data: None).done, 30)
                finally:
                    await running.destroy()
            how = f"{runtime}, KVM" if runtime else "KVM" if self._accel == "kvm" else "software emulation"
            return Probe(done.code == 0, how, "", time.perf_counter() - begin)
        except SubstrateUnavailable as error:
            return Probe(False, error.reason, error.fix)
        except (DsecError, TimeoutError) as error:
            return Probe(False, str(error) or "no answer", qemu.FIX)

    async def create(self, id: str, spec: Spec, folder: Path, snapshot: Path | None = None) -> VirtualMachine:
        if spec.runtime and spec.runtime not in self.runtimes:
            known = ", ".join(self.runtimes) or "nothing else"
            raise InvalidRequest(f'a {self.name} has the runtime "" (QEMU) or {known}, not {spec.runtime!r}')
        if spec.runtime:
            return await self._create_on(spec, folder, snapshot)
        point = await self._opened(snapshot) if snapshot is not None else await self._template(spec)
        await asyncio.to_thread(point.load)
        group = self._claim(point.memory, spec.cpu, folder)
        running: VirtualMachine | None = None
        try:
            machine = self._start(point, folder, group, spec.disk)
            running = VirtualMachine(self, machine, point, await machine.agent(10.0))
            await running.wake(WAKE_DEADLINE, known=snapshot is not None)
        except BaseException:
            if running is not None:
                await running.destroy()
            elif group is not None:
                group.kill()
                self.bury(group, folder)
            raise
        return running

    async def _create_on(self, spec: Spec, folder: Path, snapshot: Path | None) -> VirtualMachine:
        """A machine of another monitor: cloned from a template where that can be, else booted."""
        if snapshot is not None:
            raise InvalidRequest(f"{spec.runtime} starts from no snapshot of a machine here")
        if spec.snapshot_steps or spec.snapshot_seconds:
            raise InvalidRequest(f'{spec.runtime} cannot be captured here, so not on a schedule either: runtime=""')
        engines.needed(spec.runtime)
        root = await self.root(spec)
        point = Checkpoint(folder, max(64, spec.memory), max(1, math.ceil(spec.cpu)), "kvm", root, monitor=spec.runtime)
        engine = engines.Engine(self.home, point, spec.disk)
        if spec.runtime == "firecracker":
            what = [point.describe(), await asyncio.to_thread(engine.files), spec.disk]
            target = (
                self.home / "vm/templates" / hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:24]
            )
            async with self._building.setdefault(target.name, asyncio.Lock()):
                if not (target / NAME).exists():
                    await self._save_template(engine, target)
            engine.template = target
        return await self._run(engine, folder)

    async def _run(self, engine: engines.Engine, folder: Path) -> VirtualMachine:
        group = self._claim(engine.point.memory, engine.point.cpus, folder)
        running: VirtualMachine | None = None
        machine: Monitor | None = None
        try:
            machine = await engine.start(folder, group)
            running = VirtualMachine(self, machine, engine.point, await machine.agent(engines.BOOT_DEADLINE))
            await running.wake(WAKE_DEADLINE)
        except BaseException:
            if running is not None:
                await running.destroy()
            else:
                if machine is not None:
                    await machine.kill()
                self.bury(group, folder)
            raise
        return running

    async def _save_template(self, engine: engines.Engine, target: Path) -> None:
        """Boots a machine and saves it, once. (Saving ends its connections, so a sandbox that lives is not saved.)"""
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".boot-"))
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
        running = await self._run(engine, scratch)
        try:
            await running.agent.ping()
            await running.machine.stop()
            await running.machine.save(made)
            (made / NAME).write_text(json.dumps(engine.point.describe()))
            made.chmod(0o711)
            os.rename(made, target)
        finally:
            await running.destroy()
            await asyncio.to_thread(shutil.rmtree, made, True)

    async def adopt(self, id: str, spec: Spec, folder: Path, state: dict[str, Any]) -> VirtualMachine:
        if not state["started"] or started(int(state["pid"])) != state["started"]:
            raise NotFound(f"sandbox {id} ended while no Edge was running")
        group = Cgroup(self.groups, state["slot"]) if state["slot"] is not None else None
        if group is not None:
            group.own(folder)
        point = Checkpoint.known(folder, state["point"])
        kind = engines.RUNTIMES[spec.runtime] if spec.runtime else Qemu
        machine = kind(int(state["pid"]), folder, group)
        return VirtualMachine(self, machine, point, await machine.agent(10.0))

    async def close(self) -> None:
        if self._burials:
            await asyncio.wait(self._burials, timeout=5)
        for point in self._points.values():
            if point.ram is not None:
                point.ram.close()
                point.ram = None
        self._points.clear()

    # what the full machine does otherwise

    async def root(self, spec: Spec) -> Root:
        """What `spec.image` boots from. "host" is what every substrate has at once: here the initrd's busybox."""
        return Root() if spec.image == "host" else await file_system(self.home, spec.image)

    # templates

    async def _opened(self, folder: Path) -> Checkpoint:
        """The checkpoint in a folder; its memory stays open for the next clone."""
        key = f"{folder}:{(folder / 'meta.json').stat().st_ino if (folder / 'meta.json').exists() else 0}"
        if key not in self._points:
            self._points[key] = await asyncio.to_thread(Checkpoint.read, folder)
        self._points.move_to_end(key)
        while len(self._points) > KEEP:
            _, old = self._points.popitem(last=False)
            if old.ram is not None:
                old.ram.close()
                old.ram = None
        return self._points[key]

    async def _template(self, spec: Spec) -> Checkpoint:
        root = await self.root(spec)
        if root.format == "erofs" and spec.disk > spec.memory:
            raise InvalidRequest(f"files live in the machine's memory: disk {spec.disk} MiB > memory {spec.memory} MiB")
        kernel = await asyncio.to_thread(linux.kernel, self.home)
        initrd = await asyncio.to_thread(linux.initrd, self.home, kernel)
        if not self._accel:
            await self._choose(kernel, initrd)
        point = Checkpoint(Path(), max(64, spec.memory), max(1, math.ceil(spec.cpu)), self._accel or "tcg", root)
        what = [point.describe(), initrd.name, kernel.release, spec.disk]
        folder = self.home / "vm/templates" / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
        async with self._building.setdefault(folder.name, asyncio.Lock()):
            if not (folder / NAME).exists():
                lock = linux.locked(folder.with_suffix(".lock"))
                await asyncio.to_thread(lock.__enter__)  # another process may be building the same one
                try:
                    if not (folder / NAME).exists():
                        await self._build(point, folder, kernel, initrd, spec.disk)
                finally:
                    lock.__exit__()
            return await self._opened(folder)

    async def _build(self, point: Checkpoint, target: Path, kernel: linux.Kernel, initrd: Path, disk: int) -> None:
        """Boots a machine, waits until it is idle, and makes the checkpoint `target` of it."""
        log.info("booting a %s of %d MiB to clone it from (once)", self.name, point.memory)
        begin = time.monotonic()
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".boot-"))
        group = self._claim(point.memory, max(2, point.cpus))
        booting = Checkpoint(scratch, point.memory, point.cpus, point.accel, point.root, Ram(point.memory << 20))
        running: VirtualMachine | None = None
        try:
            if point.root.format != "erofs":
                size = disk_size(point.root.disks[0], point.root.format)
                (scratch / "disk.qcow2").write_bytes(qcow2(size))
            machine = self._start(booting, scratch, group, disk, boot=(kernel, initrd))
            running = VirtualMachine(self, machine, booting, await machine.agent(10.0))
            await running.settle(self.boot_deadline)
            await running.snapshot(target)
        finally:
            if running is not None:
                await running.destroy()
            assert booting.ram is not None
            booting.ram.close()
            if running is None:
                self.bury(group, scratch)
        log.info("%s ready to be cloned after %.1f s", self.name, time.monotonic() - begin)

    # machines

    def _start(
        self,
        point: Checkpoint,
        folder: Path,
        group: Cgroup | None,
        disk: int,
        boot: tuple[linux.Kernel, Path] | None = None,
    ) -> Qemu:
        """Starts QEMU on a checkpoint; with `boot`, from power-on in the checkpoint's shared memory."""
        assert point.ram is not None
        with contextlib.ExitStack() as stack:

            def opened(path: Path, flags: int = os.O_RDONLY) -> int:
                fd = os.open(path, flags | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                return fd

            shape: dict[str, Any] = {"memory": point.memory, "ram": point.ram, "cpus": point.cpus, "accel": point.accel}
            shape["code"] = self.code
            root = point.root
            if root.format != "erofs":
                if boot is None:
                    shutil.copyfile(point.folder / "disk.qcow2", folder / "disk.qcow2")
                top = opened(folder / "disk.qcow2", os.O_RDWR)
                shape["disks"] = (Disk(top, "qcow2", False, (opened(root.disks[0]), root.format)),)
                shape["agent"] = opened(build.agent(self.home))
            else:
                shape["disks"] = tuple(Disk(opened(path)) for path in root.disks)
            if boot is None:
                shape["device"] = opened(point.folder / "device")
            elif root.format == "erofs":
                words = f"dsec.size={disk} dsec.boot={root.boot} dsec.layers={len(root.disks)}"
                words += SYSTEMD if root.boot == "systemd" else ""
                shape |= {"kernel": opened(boot[0].image), "initrd": opened(boot[1]), "cmdline": words}
            written = disk if root.format != "erofs" else 0
            return Qemu.start(Machine(**shape), folder, self.home, group, files=written)

    def _claim(self, memory: int, cpu: float, folder: Path | None = None) -> Cgroup | None:
        """`folder`: a sandbox's, in which the next Edge finds what was not ready when this one was killed."""
        if not self.groups.limits and os.geteuid() != 0:
            return None
        group = Cgroup.claim(self.groups)
        if folder is not None:
            group.note(folder)
        group.limit(cpu, memory + self.code + qemu.OVERHEAD, 96)  # 96: QEMU's own threads
        return group

    def bury(self, group: Cgroup | None, folder: Path) -> None:
        """Frees what a dead machine held, off the request's path."""
        task = asyncio.ensure_future(_bury(group, folder))
        self._burials.add(task)
        task.add_done_callback(self._burials.discard)

    # acceleration: only what really boots

    def _memo(self) -> Path:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return self.home / "vm" / f"accel-{boot}"

    def _remembered(self) -> str:
        with contextlib.suppress(OSError):
            return self._memo().read_text()
        return "" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"

    async def _choose(self, kernel: linux.Kernel, initrd: Path) -> None:
        """Boots a machine with KVM; what does not say hello by the deadline is not used. /dev/kvm proves nothing."""
        point = Checkpoint(Path(), 128, 1, "kvm", Root(), Ram(128 << 20))
        scratch = Path(tempfile.mkdtemp(dir=self.home / "vm", prefix=".kvm-"))
        group = self._claim(128, 2)
        machine: Qemu | None = None
        try:
            machine = self._start(point, scratch, group, 16, boot=(kernel, initrd))
            agent = await machine.agent(10.0)
            await asyncio.wait_for(asyncio.shield(agent.hello), KVM_DEADLINE)
            agent.close()
            self._accel = "kvm"
        except (DsecError, TimeoutError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            self._accel = "tcg"
            log.info("KVM boots no machine here within %.0f s: software emulation", KVM_DEADLINE)
        finally:
            if machine is not None:
                await machine.kill()
            assert point.ram is not None
            point.ram.close()
            self.bury(group, scratch)
        linux.publish(self._memo(), self._accel.encode())


async def _bury(group: Cgroup | None, folder: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    for _ in range(100):
        if group is None or group.remove():
            return
        await asyncio.sleep(0.05)
    log.warning("cgroup %s could not be removed", group)


class VirtualMachine:
    """See base.Running."""

    def __init__(self, of: MicroVMSubstrate, machine: Monitor, point: Checkpoint, agent: GuestAgent) -> None:
        self.agent, self.machine, self.point = agent, machine, point
        self.capabilities = capabilities(point.accel, machine.forks)
        self._of, self._frozen, self._gone, self._lock = of, False, False, asyncio.Lock()
        agent.failed.add_done_callback(
            lambda failed: agent.closed or asyncio.ensure_future(self._lost(failed.result()))
        )

    async def _lost(self, reason: str) -> None:
        """A machine whose agent lied, hung or left is destroyed at once, for that reason."""
        await asyncio.wait([self.machine.end], timeout=0.2)  # if it was the machine that left, that says more
        self.machine.blame = self.machine.blame or reason
        await self.machine.kill()

    def state(self) -> dict[str, Any]:
        slot = self.machine.group.slot if self.machine.group is not None else None
        return {"pid": self.machine.pid, "started": self.machine.started, "slot": slot, "point": self.point.describe()}

    async def died(self) -> str:
        return await asyncio.shield(self.machine.end)

    async def wake(self, deadline: float, known: bool = False) -> None:
        """Gives the machine the time and fresh randomness. `known`: its agent may remember commands of another life.
        Raises Timeout or SandboxFailed."""
        try:
            async with asyncio.timeout(deadline):
                if known:
                    await self.agent.journal()  # moves our ids past theirs
                process = self.agent.exec(["/run/dsec/wake"], lambda kind, data: None, stdin=True)
                process.send(time.time_ns().to_bytes(8, "little") + os.urandom(64))
                process.close_stdin()
                done = await process.done
                process.forget()
        except TimeoutError:
            raise Timeout(f"the machine did not wake within {deadline} s; {await self._console()}") from None
        except SandboxFailed as error:
            raise SandboxFailed(f"{error.message}; {await self._console()}") from None
        if done.code:
            raise SandboxFailed(f"the machine did not take the time and randomness: exit {done.code}")

    async def settle(self, deadline: float) -> None:
        """Waits until a booting machine's agent and services are up, and warms what every command needs."""
        try:
            async with asyncio.timeout(deadline):
                either: set[asyncio.Future[Any]] = {self.agent.hello, self.agent.failed}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if self.agent.failed.done():
                    await self.died()
                    raise SandboxFailed(f"it did not boot; {await self._console()}")
                commands: list[str | list[str]] = ["true"]
                if self.point.root.boot == "systemd":
                    commands.insert(0, ["systemctl", "is-system-running", "--wait"])
                for command in commands:
                    process = self.agent.exec(command, lambda kind, data: None)
                    await process.done
                    process.forget()  # a clone's commands begin at number one
                await self.agent.ping()
        except TimeoutError:
            raise Timeout(f"it did not boot within {deadline} s; {await self._console()}") from None

    async def _console(self) -> str:
        return f"the end of its console: {(await self.machine.console())[-400:]!r}"

    async def freeze(self) -> None:
        await self.machine.stop()
        self._frozen = True

    async def thaw(self) -> None:
        await self.machine.cont()
        self._frozen = False
        await self.wake(WAKE_DEADLINE)  # its clock stood still

    async def snapshot(self, target: Path) -> None:
        if self.machine.end.done():
            raise SandboxFailed(f"it is dead: {self.machine.end.result()}")
        if target.exists():
            raise FileExistsError(f"{target} is there already")
        if not self.machine.forks:
            raise InvalidRequest(f'{self.machine.name} has no snapshots of running machines here: runtime=""')
        async with self._lock:
            scratch = target.with_name(target.name + ".part")
            await asyncio.to_thread(shutil.rmtree, scratch, True)
            scratch.mkdir(parents=True)
            frozen = self._frozen
            if not frozen:
                await self.freeze()
            try:
                await self.machine.save(scratch)
                await asyncio.to_thread(self._copy, scratch, target)
            finally:
                if not frozen and not self.machine.end.done():
                    await self.thaw()

    def _copy(self, scratch: Path, target: Path) -> None:
        if (self.machine.folder / "disk.qcow2").exists():
            shutil.copyfile(self.machine.folder / "disk.qcow2", scratch / "disk.qcow2")
        (scratch / NAME).write_text(json.dumps(self.point.describe()))
        os.rename(scratch, target)

    async def stats(self) -> Stats:
        stats = self.machine.group.stats() if self.machine.group is not None else Stats()
        disk = 0
        with contextlib.suppress(OSError):
            disk = (self.machine.folder / "disk.qcow2").stat().st_blocks * 512
        return Stats(**{**stats.as_dict(), "disk_bytes": disk})

    async def destroy(self) -> None:
        if self._gone:
            return
        self._gone = True
        self.agent.close()
        await self.machine.kill()
        self._of.bury(self.machine.group, self.machine.folder)
