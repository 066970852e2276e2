"""What a hostile guest, and a QEMU that a guest has taken over, cannot do. Numbers are the specification's families.

1 escape, 2 ids, 3 file calls, 4 processes, 5 memory, 7 disk, 8 output, 9 daemons, 10 network, 11 agent, 13 images,
15 time. (6, CPU, is a cgroup quota, seen here by its value; 12 is the API's; 14 is the function substrate's.)
"""

import asyncio
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from vm_bench import SPEC, Bench, shell

from dsec.errors import ImageError, InvalidRequest, NotFound, SandboxFailed
from dsec.guest import build
from dsec.guest.protocol import MAGIC, MAX_FRAME, VERSION, fields, frame
from dsec.substrates.checkpoint import disk_size, qcow2
from dsec.substrates.microvm import VirtualMachine
from dsec.substrates.monitor import HANG, GuestAgent
from dsec.substrates.qemu import Qemu, Ram
from tests.dsec.conftest import ORDINARY, reachable, soon

HELLO = MAGIC + frame(b"H", 0, fields([("version", VERSION), ("pid", 1)]))
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the host id is changed only then")


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


@root_only
def test_2_qemu_owns_nothing(machine: VirtualMachine) -> None:
    status = _status(machine.machine.pid)
    assert machine.machine.group is not None
    assert set(status["Uid"].split()) == {str(machine.machine.group.base)} == set(status["Gid"].split())
    assert status["Groups"] == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[name], 16) == 0


def test_1_qemu_is_walled_in(machine: VirtualMachine) -> None:
    pid = machine.machine.pid
    status = _status(pid)
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    for space in ("net", "ipc", "uts", "mnt"):
        assert os.readlink(f"/proc/{pid}/ns/{space}") != os.readlink(f"/proc/self/ns/{space}")
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits) and re.search(r"Max open files\s+256\s+256", limits)
    assert re.search(r"Max file size\s+16777216\s+16777216", limits)
    held = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    known = re.compile(
        r"(socket|pipe):|anon_inode:|/dev/(null|urandom)$|/memfd:dsec-ram|.*/(device|log)$|.*/templates/[0-9a-f]+/device$"
    )
    assert not [name for name in held if not known.match(name)], held


@root_only
def test_1_qemu_sees_no_file_of_the_host_but_programs(machine: VirtualMachine, tmp_path: Path) -> None:
    """A guest that has taken QEMU over finds no configuration, no home, no key, no other process."""
    root = Path(f"/proc/{machine.machine.pid}/root")
    names = {path.name for path in root.iterdir()}
    assert {"usr", "dev", "proc"} <= names <= set("usr dev proc bin sbin lib lib32 lib64 libx32".split())
    canary = tmp_path / "canary"
    canary.write_text("the host's")
    for path in (canary, Path("/etc/passwd"), Path("/root"), Path("/tmp"), Path("/sys/kernel")):
        assert path.exists() and not (root / path.relative_to("/")).exists(), path
    id = _status(machine.machine.pid)["Uid"].split()[0]
    enter = ["nsenter", "-t", str(machine.machine.pid), "-m", "-S", id, "-G", id]
    seen = subprocess.run([*enter, "/usr/bin/ls", "/proc"], capture_output=True, text=True, check=True).stdout.split()
    assert "1" not in seen and str(os.getpid()) not in seen and "sys" not in seen and "kcore" not in seen, seen
    assert {path.name for path in (root / "dev").iterdir()} <= {"null", "zero", "urandom", "kvm"}
    for folder in ("", "usr", "dev"):
        with pytest.raises(OSError, match="Read-only"):
            (root / folder / "x").write_text("")


def test_1_and_3_what_the_guest_writes_is_the_guests(bench: Bench, tmp_path: Path) -> None:
    """Root in the guest may do all of this, to its own kernel."""
    hosts = [Path(f"/proc/sys/kernel/{name}") for name in ("core_pattern", "hostname", "domainname")]
    before = [path.read_text() for path in hosts]
    canary = tmp_path / "canary"
    canary.write_text("the host's")

    async def work() -> None:
        machine = await bench.create()
        code, _ = await shell(
            machine, "for n in core_pattern hostname modprobe; do echo evil > /proc/sys/kernel/$n; done"
        )
        assert code == 0
        assert (await shell(machine, "cat /proc/sys/kernel/core_pattern"))[1] == "evil\n"
        assert (await shell(machine, f"cat {canary}"))[0] != 0
        await shell(machine, f"ln -s {canary} /tmp/link; ln -s / /tmp/top")
        for path in ("/tmp/link", f"/tmp/top{canary}", f"/tmp/../../../..{canary}", f"/proc/1/root{canary}"):
            with pytest.raises((NotFound, InvalidRequest)):
                await machine.agent.read(path)
        await machine.agent.write(str(canary), b"the guest's")
        await machine.destroy()

    bench.run(work())
    assert [path.read_text() for path in hosts] == before
    assert canary.read_text() == "the host's"


def test_1_a_template_cannot_be_poisoned() -> None:
    """A taken-over QEMU holds the template's memory open for writing; the seal is what protects the other machines."""
    ram = Ram(1 << 20)
    os.pwrite(ram.fd, b"clean", 0)
    ram.seal()
    again = os.open(f"/proc/self/fd/{ram.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"dirty", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(again, 0)
    import mmap

    with pytest.raises(PermissionError):
        mmap.mmap(again, 1 << 20)
    private = mmap.mmap(again, 1 << 20, flags=mmap.MAP_PRIVATE)
    private[:5] = b"dirty"
    assert os.pread(ram.fd, 5, 0) == b"clean"
    os.close(again)
    ram.close()


def test_4_5_9_bombs_and_daemons_end_with_the_machine(bench: Bench) -> None:
    def ours(pid: int) -> int:
        return len(list(Path(f"/proc/{pid}/task").iterdir()))

    async def work() -> None:
        victim, bomb = await bench.create(), await bench.create()
        group = bomb.machine.group
        hogs = ["b() { b | b & }; b", "trap '' TERM HUP; setsid sh -c 'while :; do :; done' &", "tail /dev/zero"]
        for hog in hogs:
            bomb.agent.exec(hog, lambda kind, data: None)
        await asyncio.sleep(2)
        assert (await shell(victim, "echo alive"))[1] == "alive\n"
        if not bomb.machine.end.done():
            assert ours(bomb.machine.pid) < 96
        if group is not None and group.where.limits:
            assert group.stats().memory_peak_bytes <= (128 + 32 + 128 + 1) << 20  # a dying task may pass by pages
        await bomb.destroy()
        assert not Path(f"/proc/{bomb.machine.pid}").exists()
        await victim.destroy()

    bench.run(work())


def test_7_the_disk_is_capped(bench: Bench) -> None:
    async def work() -> None:
        machine = await bench.create()
        _, out = await shell(machine, "dd if=/dev/zero of=/fill bs=1M count=40; wc -c < /fill")
        assert "No space left" in out and int(out.split()[-1]) <= SPEC.disk << 20
        await machine.destroy()

    bench.run(work())


def test_8_a_flood_of_output_keeps_head_and_tail(bench: Bench, machine: VirtualMachine) -> None:
    async def work() -> None:
        got: list[bytes] = []
        command = "echo first; head -c 3000000 /dev/zero; printf 'last\\377'"
        process = machine.agent.exec(command, lambda kind, data: got.append(data), limit=1 << 16)
        done = await process.done
        process.forget()
        text = b"".join(got)
        assert text.startswith(b"first\n") and text.endswith(b"last\xff")
        assert len(text) <= 1 << 16 and done.dropped_out >= 3_000_000 - (1 << 16)

    bench.run(work())


def test_10_there_is_no_network(bench: Bench, machine: VirtualMachine) -> None:
    code, out = bench.run(shell(machine, "ls /sys/class/net; ls /sys/bus/pci/devices/*/net 2>/dev/null; ip route"))
    assert out.split() == ["lo"]
    code, _ = bench.run(shell(machine, "nc -w 2 169.254.169.254 80 < /dev/null"))
    assert code != 0
    devices = Path(f"/proc/{machine.machine.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]


class Liar:
    """A hostile agent at the other end of a machine's port; the machine's process is a stand-in."""

    def __init__(self, bench: Bench) -> None:
        self.process = subprocess.Popen(["sleep", "100"])
        self.folder = bench.folder()
        self.bench = bench

    async def meet(self, machine: VirtualMachine) -> tuple[VirtualMachine, socket.socket]:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, agent = await loop.create_unix_connection(lambda: GuestAgent(serial=True), sock=ours)
        fake = VirtualMachine(self.bench.substrate, Qemu(self.process.pid, self.folder, None), machine.point, agent)
        return fake, theirs


def _head(length: int, kind: bytes = b"O", id: int = 1) -> bytes:
    return struct.pack("<IBI", length, kind[0], id)


LIES = {
    "huge length": _head(MAX_FRAME + 1),
    "negative length": _head(0xFFFFFFFF),
    "short length": _head(4),
    "output of a command that is not": frame(b"O", 77, b"x"),
    "end of a command that is not": frame(b"D", 2, fields([("code", 0)])),
    "answer to nothing": frame(b"A", 9, b"x"),
    "unknown kind": frame(b"?", 1, b"x"),
    "second hello": HELLO,
    "a stream under a number of ours": frame(b"o", 5),
    "not numbers": frame(b"D", 1, fields([("code", "many"), ("signal", 0), ("seconds", 1), ("out", 0), ("err", 0)])),
    "infinite number": frame(
        b"D", 1, fields([("code", "1e999"), ("signal", 0), ("seconds", 1), ("out", 0), ("err", 0)])
    ),
    "not fields": frame(b"D", 1, b"no end"),
    "more than the cap": frame(b"O", 1, b"x" * 2000),
    "a pickle": frame(b"D", 1, b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94"),
}


@pytest.mark.parametrize("lie", LIES)
def test_11_a_lying_agent_costs_its_machine(bench: Bench, machine: VirtualMachine, lie: str) -> None:
    async def work() -> None:
        liar = Liar(bench)
        fake, theirs = await liar.meet(machine)
        theirs.sendall(HELLO)
        await fake.agent.hello
        process = fake.agent.exec("true", lambda kind, data: None, limit=1000)
        assert process.id == 1
        theirs.sendall(LIES[lie])
        with pytest.raises(SandboxFailed):
            await asyncio.wait_for(process.done, 60)
        reason = await asyncio.wait_for(fake.died(), 60)
        assert reason and "connection" not in reason, reason
        assert not Path(f"/proc/{liar.process.pid}").exists()
        await fake.destroy()
        theirs.close()

    bench.run(work())


def test_11_noise_before_the_greeting_is_not_kept(bench: Bench, machine: VirtualMachine) -> None:
    """A guest may write for ever without greeting; the host must not hold on to it."""

    async def work() -> None:
        liar = Liar(bench)
        fake, theirs = await liar.meet(machine)
        theirs.setblocking(False)
        for _ in range(64):
            await asyncio.get_running_loop().sock_sendall(theirs, b"\x93dsec" * 20000)
        await soon(lambda: fake.agent._hunt is None or fake.agent._hunt)  # some of it has come
        assert len(fake.agent._hunt or b"") <= 1 << 20
        await fake.destroy()
        theirs.close()

    bench.run(work())


def test_15_a_guest_that_hangs_is_killed_after_its_timeout(bench: Bench) -> None:
    async def work() -> None:
        machine = await bench.create()
        command = "kill -STOP $(pidof agent); echo it stands > /dev/console; sleep 600"
        process = machine.agent.exec(command, lambda kind, data: None)

        async def stands() -> bool:
            return "it stands" in await machine.machine.console()

        await soon(stands)
        begin = time.monotonic()
        process.signal(9)  # what the Edge does when a command's time is over
        with pytest.raises(SandboxFailed, match="did not end"):
            await asyncio.wait_for(process.done, 60)
        assert "did not end" in await asyncio.wait_for(machine.died(), 60)
        assert time.monotonic() - begin >= HANG, "it was given its time"
        await machine.destroy()

    bench.run(work())


def test_15_a_kill_that_works_leaves_the_machine_alone(bench: Bench, machine: VirtualMachine) -> None:
    async def work() -> None:
        said: list[bytes] = []
        process = machine.agent.exec("trap '' TERM; echo now; sleep 100", lambda kind, data: said.append(data))
        await soon(lambda: said)
        process.signal(9)
        assert (await asyncio.wait_for(process.done, 60)).code == 137
        process.forget()
        await asyncio.sleep(HANG + 0.2)
        assert (await shell(machine, "echo still here"))[1] == "still here\n"

    bench.run(work())


def test_13_a_disk_image_cannot_name_files_of_the_host(tmp_path: Path) -> None:
    """A qcow2 may say that what it lacks is in another file; QEMU would open that one too."""
    image, top = tmp_path / "image.qcow2", tmp_path / "top.qcow2"
    image.write_bytes(qcow2(5 << 30))
    assert disk_size(image, "qcow2") == 5 << 30
    top.write_bytes(image.read_bytes())
    for at, value in ((8, 512), (72, 1 << 2)):  # a backing file's name; the feature "data in an external file"
        evil = bytearray(image.read_bytes())
        evil[at : at + 8] = value.to_bytes(8, "big")
        image.write_bytes(evil)
        with pytest.raises(ImageError, match="other files"):
            disk_size(image, "qcow2")
        image.write_bytes(top.read_bytes())
    image.write_bytes(b"QFI\xfb")
    with pytest.raises(ImageError, match="no qcow2"):
        disk_size(image, "qcow2")


def test_1_an_ordinary_users_qemu_sees_only_itself(tmp_path: Path) -> None:
    """What becomes QEMU, with a shell in its place: an ordinary user may mount no /proc of its own there."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    reachable(tmp_path)
    confine = build.program(Path(build.__file__).parents[1] / "substrates" / "confine.c", tmp_path)
    script = "cd /proc; for f in *; do echo $f; done; echo $$ $(readlink self); ls -d self/fd /proc/1 /proc/sys"
    command = [str(confine), "--files", "65536", "--", "/bin/sh", "-c", script]
    ordinary: dict[str, Any] = {"user": ORDINARY, "group": ORDINARY, "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd="/", **ordinary)
    if "namespaces" in done.stderr:
        pytest.skip(f"this kernel gives an ordinary user no namespaces: {done.stderr}")
    *names, who, own = done.stdout.splitlines()
    pid, itself = who.split()
    assert (pid, own) == (itself, "self/fd") and names == [pid, "self"], done
    assert "/proc/1" in done.stderr and "/proc/sys" in done.stderr, "neither is there"
