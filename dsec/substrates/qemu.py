"""One QEMU process: its command line, its confinement, its control socket (QMP), and its end.

The guest is untrusted, and so is QEMU once a guest has broken into it: it runs as a host id that owns nothing, in an
empty network namespace, under QEMU's seccomp filter (no exec, no fork, no setuid), without new privileges, with
rlimits, and in a cgroup joined before exec (confine.c). It is handed open files, so no path of ours need be readable to
it. Emulation (TCG) is what runs where KVM does not really boot, and QEMU does not call emulation a security boundary:
these walls are for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsec.errors import SandboxFailed, SubstrateUnavailable, Timeout
from dsec.launch.cgroups import Cgroup
from dsec.substrates.monitor import GuestAgent, Monitor, _printable, confined, reachable

BINARY = "qemu-system-x86_64"
FIX = "apt-get install qemu-system-x86"
OVERHEAD = 128
"""MiB a QEMU process may use beside the guest's memory and its translated code: device models, libraries."""
_F_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4 | 0x8  # seal, shrink, grow, write
_PAGE = os.sysconf("SC_PAGE_SIZE")
_STATE = 9  # the fdset that device state is saved to


class Ram:
    """Guest memory in a memfd. While shared the guest writes it; once sealed nobody ever can, not even a QEMU that a
    guest has taken over, and any number of machines map it copy-on-write. `size` in bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("dsec-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)

    def seal(self) -> None:
        """Raises BlockingIOError while a machine still has it mapped shared."""
        fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEALS)  # a private writable mapping stays allowed

    def load(self, path: Path) -> None:
        """Fills it from a sparse file of the same size; holes stay holes."""
        copy_sparse(path, self.fd)

    def close(self) -> None:
        os.close(self.fd)


def copy_sparse(source: Path | int, target: int) -> None:
    """Copies the data extents of a file (path or descriptor) into descriptor `target`, same offsets."""
    fd = os.open(source, os.O_RDONLY) if isinstance(source, Path) else source
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole from here on
                break
            at = os.lseek(fd, start, os.SEEK_HOLE)
            while start < at:
                start += os.pwrite(target, os.pread(fd, min(at - start, 1 << 22), start), start)
    finally:
        if isinstance(source, Path):
            os.close(fd)


@dataclass(frozen=True)
class Disk:
    """A virtio disk from an open file. Its format is said, never guessed: a raw disk could pose as a qcow2 that names
    files of the host. `base` is a raw or qcow2 file below a qcow2 one."""

    fd: int
    format: str = "raw"
    readonly: bool = True
    base: tuple[int, str] | None = None

    def node(self, first: int) -> tuple[dict[str, Any], list[int]]:
        """QEMU's description of it, over fdsets numbered from `first`, and the descriptors of those. What a qcow2 says
        lies below it is never followed."""
        layers = ([(*self.base, True)] if self.base else []) + [(self.fd, self.format, self.readonly)]
        node: dict[str, Any] = {}
        for n, (_, format, readonly) in enumerate(layers, first):
            file = {"driver": "file", "filename": f"/dev/fdset/{n}", "locking": "off"}
            below = {"backing": node or None} if format == "qcow2" else {}
            node = {"driver": format, "read-only": readonly, "file": file, **below}
        return node, [fd for fd, _, _ in layers]


@dataclass(frozen=True)
class Machine:
    """What QEMU is to be; memory in MiB. With `device` (a device state file) it is a clone of a stopped machine, and
    its memory is mapped private; otherwise it boots `kernel` and `initrd`, or its first disk, in shared memory.

    The machine is QEMU's "pc": the emulated "microvm" machine finds its virtio devices only with ACPI (Debian's kernel
    takes none from its command line), and with ACPI it loses its timer and hangs (0 of 8 boots on a busy host).
    """

    memory: int
    ram: Ram
    cpus: int = 1
    device: int | None = None
    kernel: int | None = None
    initrd: int | None = None
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    accel: str = "tcg"
    code: int = 32
    """MiB of translated code kept under emulation: too little and a big guest is translated over and over."""
    agent: int | None = None
    """The agent's program, for a disk image to pick up from firmware configuration as opt/dsec/agent."""

    def argv(self, qmp: int, port: int, state: int, log: int) -> tuple[list[str], list[int]]:
        """The command line, and the descriptors it names. `qmp` and `port` are listening unix sockets, `state` the file
        that device state will be saved to, `log` the one that a booting machine's console goes to."""
        fds = [qmp, port, state, self.ram.fd]
        accel = (
            "kvm" if self.accel == "kvm" else f"tcg,thread={'multi' if self.cpus > 1 else 'single'},tb-size={self.code}"
        )
        args = ["-M", "pc,memory-backend=ram,vmport=off,usb=off,suppress-vmdesc=on", "-accel", accel]
        args += ["-cpu", "host" if self.accel == "kvm" else "max", "-m", str(self.memory), "-smp", str(self.cpus)]
        args += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        args += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
        share = "on" if self.device is None else "off"
        memory = f"id=ram,size={self.memory}M,mem-path=/proc/self/fd/{self.ram.fd},share={share}"
        args += ["-object", f"memory-backend-file,{memory}"]
        args += ["-chardev", f"socket,id=qmp,fd={qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
        args += ["-chardev", f"socket,id=agent,fd={port},server=on,wait=off", "-device", "virtio-serial-pci"]
        args += ["-device", "virtserialport,chardev=agent,name=dsec.agent", "-add-fd", f"fd={state},set={_STATE}"]
        if self.device is None:  # only our own boot code speaks there before the machine is cloned
            console = f"file,id=console,path=/dev/fdset/{_STATE - 1},append=on"
            args += ["-add-fd", f"fd={log},set={_STATE - 1}"]
            fds.append(log)
        else:
            console = "ringbuf,id=console,size=65536"
        args += ["-chardev", console, "-serial", "chardev:console"]
        args += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
        # Device state is saved without the memory, and without the section that says how it was configured.
        args += ["-global", "migration.send-configuration=off"]
        if self.device is not None:
            args += ["-incoming", f"fd:{self.device}"]
            fds.append(self.device)
        elif self.kernel is not None and self.initrd is not None:
            args += ["-kernel", f"/proc/self/fd/{self.kernel}", "-initrd", f"/proc/self/fd/{self.initrd}"]
            # no_timer_check: on a busy host an emulated timer may miss the window in which the kernel tests it: a panic
            args += ["-append", f"console=ttyS0 quiet panic=-1 no_timer_check {self.cmdline}"]
            fds += [self.kernel, self.initrd]
        if self.agent is not None:
            args += ["-fw_cfg", f"name=opt/dsec/agent,file=/proc/self/fd/{self.agent}"]
            fds.append(self.agent)
        first = _STATE + 1
        for disk in self.disks:
            node, files = disk.node(first)
            args += [part for n, fd in enumerate(files, first) for part in ("-add-fd", f"fd={fd},set={n}")]
            args += ["-blockdev", json.dumps({**node, "node-name": f"disk{first}"})]
            args += ["-device", f"virtio-blk-pci,drive=disk{first}"]
            first += len(files)
            fds += files
        program = shutil.which(BINARY)
        if program is None:
            raise SubstrateUnavailable(f"no {BINARY}", reason=f"{BINARY} is not installed", fix=FIX)
        return [program, *args], fds


class Qmp:
    """QEMU's control protocol: one JSON object a line. QEMU is believed no further than its syntax."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer, self._lock = reader, writer, asyncio.Lock()

    @classmethod
    async def connect(cls, path: str, timeout: float = 30.0) -> Qmp:
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
                qmp = cls(reader, writer)
                await qmp._read()
                await qmp.execute("qmp_capabilities")
                return qmp
        except TimeoutError:
            raise Timeout(f"QEMU did not greet within {timeout} s") from None
        except OSError as error:
            raise SandboxFailed(f"cannot reach QEMU: {error}") from None

    async def _read(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
            value = json.loads(line) if line else None
        except (ValueError, OSError) as error:
            raise SandboxFailed(f"QEMU's control socket: {error}") from None
        if not isinstance(value, dict):
            raise SandboxFailed("QEMU is gone")
        return value

    async def execute(self, command: str, timeout: float = 30.0, **arguments: Any) -> Any:
        """The command's answer; SandboxFailed with QEMU's words if it refuses, Timeout if it does not answer."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            async with self._lock, asyncio.timeout(timeout):
                self._writer.write(json.dumps(request).encode() + b"\n")
                while "event" in (answer := await self._read()):
                    pass
        except TimeoutError:
            raise Timeout(f"QEMU did not answer {command} within {timeout} s") from None
        if "return" not in answer:
            raise SandboxFailed(f"QEMU refused {command}: {answer.get('error')}")
        return answer["return"]

    def close(self) -> None:
        self._writer.close()


class Qemu(Monitor):
    """A running QEMU. Files of `folder`: agent.sock, qmp.sock, device (saved state), log."""

    name = "QEMU"
    forks = True

    def __init__(self, pid: int, folder: Path, group: Cgroup | None) -> None:
        super().__init__(pid, folder, group)
        self._qmp: Qmp | None = None
        self._connecting = asyncio.Lock()

    @classmethod
    def start(cls, machine: Machine, folder: Path, home: Path, group: Cgroup | None, files: int = 0) -> Qemu:
        """Starts it confined. `files`: MiB its own files may grow to. Raises SubstrateUnavailable or Capacity."""
        with contextlib.ExitStack() as stack:
            qmp, port = (stack.enter_context(_listen(folder, name)) for name in ("qmp.sock", "agent.sock"))
            state = os.open(folder / "device", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, state)
            log = stack.enter_context((folder / "log").open("wb"))
            command, fds = machine.argv(qmp.fileno(), port.fileno(), state, log.fileno())
            pid = confined(home, folder, group, command, files=files, kvm=machine.accel == "kvm", fds=fds)
        return cls(pid, folder, group)

    async def agent(self, deadline: float) -> GuestAgent:
        with reachable(self.folder, "agent.sock") as path:
            agent = await GuestAgent.connect(path, deadline, serial=True)
        assert isinstance(agent, GuestAgent)
        return agent

    async def stop(self) -> None:
        await (await self.qmp()).execute("stop")

    async def cont(self) -> None:
        await (await self.qmp()).execute("cont")

    async def save(self, target: Path) -> None:
        await self.save_devices(target / "device")
        await asyncio.to_thread(self.save_memory, target / "ram")

    async def qmp(self) -> Qmp:
        """The control socket, connected when first needed."""
        async with self._connecting:
            if self._qmp is None:
                with reachable(self.folder, "qmp.sock") as path:
                    self._qmp = await Qmp.connect(path)
        return self._qmp

    async def console(self) -> str:
        """The last lines the guest wrote to its console, for error messages; "" when QEMU does not tell."""
        if text := self._log():
            return text
        try:
            text = await (await self.qmp()).execute("ringbuf-read", 2.0, device="console", size=65536)
        except (SandboxFailed, Timeout):
            return ""
        return _printable(str(text))

    def save_memory(self, target: Path) -> None:
        """Copies a stopped machine's memory, as it sees it, into the sparse file `target`: what it shares with its
        checkpoint, then the pages it has written since. Untouched pages are not read: that would make them real."""
        process = Path(f"/proc/{self.pid}")
        shared = next((fd for fd in (process / "fd").iterdir() if _link(fd).startswith("/memfd:dsec-ram")), None)
        if shared is None:
            raise SandboxFailed("QEMU has let go of its memory")
        with shared.open("rb") as base, target.open("xb") as file:
            size = os.fstat(base.fileno()).st_size
            file.truncate(size)
            copy_sparse(base.fileno(), file.fileno())
            for line in (process / "maps").read_text().splitlines():
                if "/memfd:dsec-ram" in line:
                    span, _, offset, *_ = line.split()
                    start, end = (int(part, 16) for part in span.split("-"))
                    if int(offset, 16) + end - start > size:
                        raise SandboxFailed(f"QEMU maps more memory than it has: {line}")
                    self._save_written(file.fileno(), start, end, int(offset, 16) - start)

    def _save_written(self, file: int, start: int, end: int, shift: int) -> None:
        """Writes the private pages of a mapping at their address plus `shift`."""
        with open(f"/proc/{self.pid}/pagemap", "rb", 0) as map, open(f"/proc/{self.pid}/mem", "rb", 0) as memory:
            pages = array("Q", os.pread(map.fileno(), (end - start) // _PAGE * 8, start // _PAGE * 8))
            # bit 63: in memory, 62: in swap, 61: a page of the file
            written = [n for n, entry in enumerate(pages) if entry >> 61 in (2, 4, 6)] + [len(pages) + 1]
            first = 0
            for k, n in enumerate(written[:-1]):
                if written[k + 1] != n + 1 or n - written[first] == 1023:
                    at = start + written[first] * _PAGE
                    os.pwrite(file, os.pread(memory.fileno(), (n + 1 - written[first]) * _PAGE, at), at + shift)
                    first = k + 1

    async def save_devices(self, target: Path) -> None:
        """Writes a stopped machine's device state to `target`."""
        self.process.rewind(self.folder / "device")  # QEMU goes on where its last one ended
        os.truncate(self.folder / "device", 0)
        await (await self.qmp()).execute("xen-save-devices-state", filename=f"/dev/fdset/{_STATE}", live=False)
        await asyncio.to_thread(shutil.copyfile, self.folder / "device", target)

    async def kill(self) -> None:
        await super().kill()
        if self._qmp is not None:
            self._qmp.close()


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def _listen(folder: Path, name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    with reachable(folder, name) as path:
        listener.bind(path)
    listener.listen(4)
    return listener
