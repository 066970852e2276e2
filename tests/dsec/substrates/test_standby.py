"""Launchers that wait for a sandbox: they become it, they see the host as it is then, and none is ever lost or left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsec.launch import cgroups
from dsec.substrates import container
from tests.dsec.conftest import Host, lives, until


def waiting(host: Host) -> dict[str, int]:
    """Launchers of a host that wait: the names of their folders and their pids."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"--wait" in words and words[0].startswith(os.fsencode(host.home)):
                found[Path(os.readlink(entry / "fd" / "1")).parent.name] = int(entry.name)
        except OSError:
            continue
    return found


def ready(host: Host) -> dict[str, int]:
    """Those of a host that has had time to begin them."""
    host.create().kill()
    until(lambda: len(waiting(host)) == container.STANDBY)
    return waiting(host)


def test_a_launcher_that_waits_becomes_the_sandbox(host: Host) -> None:
    before = ready(host)
    for name, pid in before.items():
        there = {path.name for path in (host.home / "sandboxes" / name).iterdir()}
        assert there - {"slot"} == {"agent.sock", "log", "disk", "state.jsonl"}
        if host.who == "root":  # before it waits: in its cgroups, with a session of its own
            slot = (host.home / "sandboxes" / name / "slot").read_text()
            assert f"/dsec/{slot}\n" in Path(f"/proc/{pid}/cgroup").read_text()
        assert os.getsid(pid) == pid
        extra = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if int(fd.name) > 5]
        assert all(link.startswith("user:") for link in extra), f"descriptors of the Edge: {extra}"
    for memory in (64, 2048):  # less than what a waiting one is limited to, and more
        with host.create(memory=memory, pids=40) as box:
            assert box.id in before, "it was made from one that waited"
            assert box.commands.run("echo hello; ls -l /proc/self/fd | wc -l; cat /proc/1/cmdline").exit_code == 0
            if host.who == "root":
                slot = (host.home / "sandboxes" / box.id / "slot").read_text()
                for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
                    limit = Path("/sys/fs/cgroup/memory/dsec", slot, name)
                    assert not limit.exists() or limit.read_text() == f"{memory << 20}\n"


def test_it_sees_what_the_host_has_mounted_since(root_host: Host, tmp_path: Path) -> None:
    ready(root_host)
    image = tmp_path / "image"
    image.mkdir()
    tmp_path.chmod(0o755)
    subprocess.run(["mount", "-t", "tmpfs", "none", image], check=True)
    try:
        for name in ("bin", "proc", "dev", "tmp", "root"):
            (image / name).mkdir()
        (image / "bin/sh").write_bytes(Path("/bin/busybox").read_bytes()) if Path("/bin/busybox").exists() else None
        if not (image / "bin/sh").exists():
            pytest.skip("needs a static shell: apt-get install busybox-static")
        (image / "bin/sh").chmod(0o755)
        before = waiting(root_host)
        with root_host.create(image=str(image)) as box:
            assert box.id in before
            assert box.commands.run(["/bin/sh", "-c", "echo here"]).stdout == "here\n"
    finally:
        subprocess.run(["umount", "-l", image], check=True)


def test_one_that_died_waiting_costs_nobody_a_sandbox(host: Host) -> None:
    pids = list(ready(host).values())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(lives, pids)))  # what is being killed may be taken for one that lives
    for _ in range(container.STANDBY + 1):
        with host.create() as box:
            assert box.commands.run("echo alive").stdout == "alive\n"


def test_a_killed_edge_leaves_none_behind(make_host: Callable[[str], Host]) -> None:
    host = make_host("root")
    with host.create(timeout=600) as box:
        before = ready(host)
        slots = [(host.home / "sandboxes" / name / "slot").read_text() for name in before]
        host.kill()
        until(lambda: not waiting(host))
        host.start()
        until(lambda: not any((host.home / "sandboxes" / name).exists() for name in before))
        for slot in slots:
            assert not any(folder.exists() for folder in cgroups.Cgroup(cgroups.detect(), int(slot)).folders)
        assert host.sync("connect", box.id).commands.run("echo still").stdout == "still\n"


def test_an_edge_that_died_while_it_cleaned_leaves_no_range_taken(make_host: Callable[[str], Host]) -> None:
    """The sandbox was dead, its folder still there: the next Edge frees what its number stands for, and only that."""
    host = make_host("root")
    box = host.create(timeout=600)
    folder = host.home / "sandboxes" / box.id
    slot = int((folder / "slot").read_text())
    group = cgroups.Cgroup(cgroups.detect(), slot)
    host.kill()
    group.kill()
    until(lambda: not group.pids())
    host.start()
    until(lambda: not folder.exists())
    assert not any(path.exists() for path in group.folders)
    box = host.create(timeout=600)  # a reaper that died between the number and the folder
    folder = host.home / "sandboxes" / box.id
    group = cgroups.Cgroup(cgroups.detect(), int((folder / "slot").read_text()))
    host.kill()  # it would free the number as well
    assert not group.free(folder) and (folder / "slot").exists(), "it lived, so its number stays"
    until(lambda: group.free(folder))
    assert not (folder / "slot").exists()
    for path in group.folders:  # somebody else has the number now
        path.mkdir()
    try:
        cgroups.abandon(folder)
        assert all(path.exists() for path in group.folders)
    finally:
        group.remove()
    host.start()


def test_arguments_that_never_come_end_it(programs: Path, tmp_path: Path) -> None:
    """Half a message, a lie about its length, or nothing: the launcher ends and makes nothing."""
    from dsec.guest import build

    launcher = build.program(Path(cgroups.__file__).with_name("launch.c"), programs / "cache")
    base = ["--base", "131072"] if os.geteuid() == 0 else []
    for sent in (b"", b"\x05", b"\x40\0\0\0--root\0", b"\xff\xff\xff\xff--root\0", b"\x07\0\0\0--wait\0"):
        ours, theirs = socket.socketpair()
        with theirs:
            with ours:
                ours.sendall(sent)
            fd = theirs.fileno()
            command = [str(launcher), "--keep", str(fd), *base, "--wait", str(fd)]
            done = subprocess.run(command, pass_fds=[fd], cwd=tmp_path, capture_output=True, text=True, timeout=20)
        assert done.returncode in (0, 2) and os.listdir(tmp_path) == [], done


def agents(host: Host) -> set[int]:
    """Pids of what runs in a host's sandboxes, also in those whose folder is gone."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"/.dsec/agent\0" in (entry / "cmdline").read_bytes():
                found |= {int(entry.name)} if os.readlink(entry / "fd" / "1").startswith(str(host.home)) else set()
        except OSError:
            continue
    return found


def test_one_that_is_killed_while_it_starts_leaves_nothing(host: Host) -> None:
    """The kill may come just before bubblewrap's child is there."""
    until(lambda: not agents(host))
    groups = []

    def one(number: int) -> None:
        box = host.create(timeout=120)
        if (slot := host.home / "sandboxes" / box.id / "slot").exists():
            groups.append(cgroups.Cgroup(cgroups.detect(), int(slot.read_text())))
        time.sleep(number % 10 / 2000)
        box.kill()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(100)))
    until(lambda: not agents(host))
    until(lambda: not any(path.exists() for group in groups for path in group.folders))


def test_what_a_dead_edge_left_is_swept_unless_its_folder_still_claims_it(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: sudo script/test tests/dsec")
    where = cgroups.detect()
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # an Edge that dies with four of them
        groups = [cgroups.Cgroup.claim(where) for _ in range(4)]
        groups[1].note(tmp_path)
        os.write(write, " ".join(str(group.slot) for group in groups).encode())
        os._exit(0)
    os.waitpid(child, 0)
    plain, noted, busy, adopted = (cgroups.Cgroup(where, int(slot)) for slot in os.read(read, 100).split())
    adopted.own()
    sleeper = subprocess.Popen(["sleep", "60"])
    for path in busy.joins:
        path.write_text(str(sleeper.pid))
    there = lambda group: [path.exists() for path in group.folders]  # noqa: E731
    try:
        cgroups.sweep(where)
        assert not any(there(plain)) and all(there(noted) + there(adopted))
        assert sleeper.wait() == -signal.SIGKILL, "what nobody will ask for again does not live on"
        (tmp_path / "slot").unlink()
        until(lambda: (cgroups.sweep(where), not any(there(noted) + there(busy)))[1])
        assert all(there(adopted)), "it has a living owner"
    finally:
        sleeper.kill()
        adopted.remove()


def test_what_joined_while_its_box_was_killed_is_killed_too(tmp_path: Path) -> None:
    """A process of the cgroup that the kill did not see: the reaper does not wait for it for ever."""
    if os.geteuid() != 0:
        pytest.skip("needs root: sudo script/test tests/dsec")
    group = cgroups.Cgroup.claim(cgroups.detect())
    late = subprocess.Popen(["sleep", "60"])
    for path in group.joins:
        path.write_text(str(late.pid))

    async def bury() -> None:
        substrate = container.ContainerSubstrate(tmp_path)
        substrate._bury(group, tmp_path / "folder")
        await substrate.close()

    try:
        asyncio.run(bury())
        assert late.wait(60) == -signal.SIGKILL
        assert not any(folder.exists() for folder in group.folders)
    finally:
        late.kill()
        late.wait()
        until(group.remove)


def hunt(host: Host, count: int, flight: int) -> None:
    """Every sandbox answers its first and its second command, whatever way it was started."""

    def one(number: int) -> str:
        with host.create(timeout=120, memory=64, disk=16, pids=32) as box:
            assert box.commands.run(f"echo {number}").stdout == f"{number}\n"
            assert box.files.read("/etc/hostname") == "sandbox\n"
            return str(box.id)

    with ThreadPoolExecutor(flight) as pool:
        assert len(set(pool.map(one, range(count)))) == count


def test_none_of_many_vanishes(host: Host) -> None:
    hunt(host, 30, 1)
    hunt(host, 30, 4)


@pytest.mark.slow
def test_none_of_hundreds_vanishes(host: Host) -> None:
    hunt(host, 300, 1)
    hunt(host, 300, 6)
