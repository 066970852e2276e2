"""Firecracker: one process per machine, driven by HTTP over a unix socket; the agent is reached through its vsock.

Facts: Firecracker's own firecracker.yaml (1.17), docs/vsock.md, docs/snapshotting and docs/kernel-policy.md. A
machine is configured before InstanceStart; a snapshot is made of a paused one and loaded by a fresh process before
anything else; memory is then mapped privately from its file. Paths are those of the process's own root (confine.c):
every machine has its socket at /box/v.sock, its layers at /disk0 and on, so that a snapshot, which holds these names,
fits every clone.

No machine was booted with it: the host at hand has no KVM that boots. What is tested is the order and the bodies of the
requests, and the way through vsock, against a server that checks both (tests/dsec/vm/test_firecracker.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from dsec.errors import SandboxFailed, SubstrateUnavailable, Timeout
from dsec.launch.cgroups import Cgroup
from dsec.substrates.monitor import PORT, GuestAgent, Monitor, box_of, confined, socket_in, taken, until

BINARY = "firecracker"
FIX = "put a release of github.com/firecracker-microvm/firecracker on PATH, on a host with KVM"
CID = 3
"""Of every guest: each has a socket of its own on the host, so they need not differ."""
CMDLINE = "console=ttyS0 reboot=k panic=-1 quiet"
OLDEST = (1, 8)
ANSWER = 1 << 20
"""Bytes an answer may have."""


def find() -> Path:
    """The program. SubstrateUnavailable if there is none."""
    program = shutil.which(BINARY)
    if program is None:
        raise SubstrateUnavailable("no Firecracker", reason=f"{BINARY} is not installed", fix=FIX)
    return Path(program).resolve()


def release(text: str) -> tuple[int, ...]:
    """ "1.17.0-dev" as (1, 17, 0)."""
    return tuple(int(part) for part in text.partition("-")[0].split(".") if part.isdecimal())


class Api:
    """The requests that a machine needs. Each raises SandboxFailed with Firecracker's words when it is refused."""

    def __init__(self, box: Path) -> None:
        self.box = box

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = 30.0) -> Any:
        """One request over a connection of its own; its JSON answer, or None for 204."""
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        try:
            async with asyncio.timeout(timeout):
                with socket_in(self.box, "api.sock") as control:
                    reader, writer = await asyncio.open_unix_connection(control, limit=ANSWER)
                try:
                    writer.write(head.encode() + data)
                    status, answer = await _answer(reader)
                finally:
                    writer.close()
        except TimeoutError:
            raise Timeout(f"Firecracker did not answer {method} {path} within {timeout} s") from None
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise SandboxFailed(f"Firecracker, {method} {path}: {error!r}") from None
        if status not in (200, 204):
            fault = answer.get("fault_message") if isinstance(answer, dict) else answer
            raise SandboxFailed(f"Firecracker refused {method} {path} ({status}): {fault}")
        return answer

    async def boot(self, memory: int, cpus: int, disks: int, words: str) -> None:
        """Configures a machine that boots /kernel and /initrd, and starts it. `memory` in MiB."""
        await self.request("PUT", "/machine-config", {"vcpu_count": cpus, "mem_size_mib": memory, "smt": False})
        source = {"kernel_image_path": "/kernel", "initrd_path": "/initrd", "boot_args": f"{CMDLINE} {words}"}
        await self.request("PUT", "/boot-source", source)
        for n in range(disks):
            drive = {"drive_id": f"disk{n}", "path_on_host": f"/disk{n}", "is_root_device": False, "is_read_only": True}
            await self.request("PUT", f"/drives/disk{n}", drive)
        await self.request("PUT", "/entropy", {})
        await self.request("PUT", "/vsock", {"guest_cid": CID, "uds_path": "/box/v.sock"})
        await self.request("PUT", "/actions", {"action_type": "InstanceStart"})

    async def load(self) -> None:
        """Makes a fresh process the machine whose snapshot is /device and /ram, and lets it run."""
        backend = {"backend_type": "File", "backend_path": "/ram"}
        await self.request(
            "PUT", "/snapshot/load", {"snapshot_path": "/device", "mem_backend": backend, "resume_vm": True}
        )

    async def state(self, wanted: str) -> None:
        """ "Paused" or "Resumed"."""
        await self.request("PATCH", "/vm", {"state": wanted})

    async def save(self) -> None:
        """Writes a paused machine to /box/device and /box/ram."""
        wanted = {"snapshot_type": "Full", "snapshot_path": "/box/device", "mem_file_path": "/box/ram"}
        await self.request("PUT", "/snapshot/create", wanted, timeout=300.0)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    version, _, rest = (await reader.readline()).decode("latin-1").partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"not HTTP: {version[:40]!r}")
    length = 0
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        if name.lower() == "content-length":
            length = int(value)
    if not 0 <= length <= ANSWER:
        raise ValueError(f"an answer of {length} bytes")
    data = await reader.readexactly(length)
    return int(rest.split()[0]), json.loads(data) if data.strip() else None


class Firecracker(Monitor):
    """A running one. Files of `folder`: box/api.sock, box/v.sock, log."""

    name = "Firecracker"

    def __init__(self, pid: int, folder: Path, group: Cgroup | None) -> None:
        super().__init__(pid, folder, group)
        self.box = folder / "box"
        self.api = Api(self.box)

    @classmethod
    async def start(
        cls, home: Path, folder: Path, group: Cgroup | None, memory: int, shown: list[tuple[Path, str]]
    ) -> Firecracker:
        """A process with nothing in it yet, that answers. `shown`: what it is to find in its root."""
        box = box_of(folder, group)
        program = [f"/{BINARY}", "--api-sock", "/box/api.sock", "--id", "dsec", "--level", "Error"]
        files = [(find(), BINARY), *shown]
        kvm = Path("/dev/kvm").exists()
        made = cls(confined(home, folder, group, program, files=memory, kvm=kvm, shown=files, box=box), folder, group)
        try:
            deadline = asyncio.get_running_loop().time() + 10
            while True:
                try:
                    said = (await made.api.request("GET", "/version") or {}).get("firecracker_version", "")
                    break
                except SandboxFailed:  # not there yet, or bound and not yet listening
                    await until(made, deadline, "its control socket")
            if release(said) < OLDEST and not os.environ.get("DSEC_VMLINUX"):
                reason = f"Firecracker {said} names no devices in ACPI, and Debian's kernel finds them nowhere else"
                raise SubstrateUnavailable(reason, reason=reason, fix="Firecracker 1.8 or later, or DSEC_VMLINUX")
            return made
        except BaseException:
            await made.kill()
            raise

    async def agent(self, deadline: float) -> GuestAgent:
        loop = asyncio.get_running_loop()
        over = loop.time() + deadline
        while True:
            try:
                with socket_in(self.box, "v.sock") as path:
                    return await _through_vsock(path, max(over - loop.time(), 0.1))
            except (OSError, TimeoutError, SandboxFailed):  # its guest does not listen yet
                await until(self, over, "the guest's agent", 0.02)

    async def stop(self) -> None:
        await self.api.state("Paused")

    async def cont(self) -> None:
        await self.api.state("Resumed")

    async def save(self, target: Path) -> None:
        await self.api.save()
        for name in ("device", "ram"):
            await asyncio.to_thread(taken, self.box, name, target / name)
            os.chmod(target / name, 0o444)  # the id of the next machine is another


async def _through_vsock(path: str, seconds: float) -> GuestAgent:
    """A connection to the guest's port: CONNECT and its answer, a byte at a time, then the agent's frames."""
    loop = asyncio.get_running_loop()
    link = socket.socket(socket.AF_UNIX)
    try:
        link.setblocking(False)
        async with asyncio.timeout(seconds):
            await loop.sock_connect(link, path)
            await loop.sock_sendall(link, f"CONNECT {PORT}\n".encode())
            line = b""
            while not line.endswith(b"\n"):
                byte = await loop.sock_recv(link, 1)
                line += byte
                if not byte or len(line) > 32:
                    raise SandboxFailed(f"Firecracker did not connect to the guest: {line!r}")
        if not line.startswith(b"OK "):
            raise SandboxFailed(f"Firecracker did not connect to the guest: {line!r}")
        _, agent = await loop.create_unix_connection(GuestAgent, sock=link)
    except BaseException:
        link.close()
        raise
    return agent
