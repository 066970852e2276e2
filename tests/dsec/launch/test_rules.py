"""The launch rules, one by one, with canaries on the host; and that the self-test sees each that is missing."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import SubstrateUnavailable
from dsec.guest import build
from dsec.guest.protocol import Agent
from dsec.launch import cgroups, seccomp, selftest
from tests.dsec.conftest import IS_ROOT, Host, until

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")


def inside(box: Any, command: str) -> str:
    result = box.commands.run(command, check=False, timeout=30)
    return str(result.stdout + result.stderr)


def test_number_one_core_pattern_cannot_be_written(box: Any) -> None:
    before = CORE_PATTERN.read_text()
    script = f"printf '%s' '{before.strip()}' > {CORE_PATTERN} && echo WROTE"  # the value that is there: harmless
    assert "WROTE" not in inside(box, script)
    assert "WROTE" not in inside(box, f"echo -n x | dd of={CORE_PATTERN} conv=notrunc 2>/dev/null && echo WROTE")
    assert CORE_PATTERN.read_text() == before


def owners_of(command: bytes) -> set[str]:
    """Real user ids, as the host sees them, of the processes with that command line."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if command in (folder / "cmdline").read_bytes():
                found.add(re.findall(r"^Uid:\s+(\d+)", (folder / "status").read_text(), re.M)[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_nothing_inside_is_root_outside(box: Any, host: Host) -> None:
    mark = f"600.{secrets.randbelow(10**6)}"
    handle = box.commands.run(f"exec sleep {mark}", background=True)
    try:
        owners = until(lambda: owners_of(f"sleep\0{mark}\0".encode()))
        assert all(int(uid) >= cgroups.FIRST_ID or (host.who == "user" and int(uid) == host.uid) for uid in owners)
        assert "0" not in owners
    finally:
        handle.kill()


def test_two_sandboxes_share_no_id(root_host: Host) -> None:
    with root_host.create() as one, root_host.create() as two:
        bases = [int(inside(each, "cat /proc/self/uid_map").split()[1]) for each in (one, two)]
    assert abs(bases[0] - bases[1]) >= cgroups.RANGE and min(bases) >= cgroups.FIRST_ID


def test_commands_have_no_privilege_and_no_way_to_one(box: Any) -> None:
    status = inside(box, "cat /proc/self/status")
    assert len(re.findall(r"Cap(?:Inh|Prm|Eff|Bnd|Amb):\s+0{16}\n", status)) == 5
    assert re.search(r"NoNewPrivs:\s+1", status) and re.search(r"Seccomp:\s+2", status)
    suid = inside(box, "cp /usr/bin/id /tmp/id; chmod u+s /tmp/id; /tmp/id -u; cat /proc/self/mounts")
    assert not re.search(r"^\S+ / \S+ (?!.*nosuid)", suid, re.M), "the writable layer honours setuid"


@pytest.mark.parametrize(
    "command",
    [
        "unshare -U true", "unshare -m true", "unshare -n true", "mount -t tmpfs x /mnt", "mount --bind / /mnt",
        "umount /proc", "chroot / true", "mknod /tmp/d b 8 0", "mknod /tmp/d c 1 1", "dmesg", "hostname other",
        "nsenter -t 1 -m true", "cat /proc/1/environ", "cat /proc/1/mem", "ls /proc/1/root/", "ls /proc/1/cwd/",
        "cat /proc/kcore",
        "cat /proc/kmsg", "cat /proc/timer_list", "cat /proc/keys | grep .", "echo b > /proc/sysrq-trigger",
        "echo 1 > /proc/sys/vm/drop_caches", "echo 1 > /proc/sys/user/max_user_namespaces", "ls /sys/kernel",
        "ls /sys/fs/cgroup", "cat /dev/mem", "ls /dev/vda /dev/sda /dev/kvm /dev/loop0 /dev/fuse", "touch /usr/x",
        "echo -1000 > /proc/self/oom_score_adj", "kill -9 1 && sleep 0.2 && kill -0 1 && false", "readlink /proc/1/exe",
        "cat /proc/1/fd/3", "echo x > /proc/1/oom_score_adj && false",
    ],
)  # fmt: skip
def test_what_must_fail_fails(host: Host, command: str, shared: dict[str, Any]) -> None:
    if host.who not in shared:
        shared[host.who] = host.create(timeout=300)
    result = shared[host.who].commands.run(command, check=False, timeout=20)
    assert result.exit_code not in (0, 127), result
    assert shared[host.who].is_running()


@pytest.fixture(scope="module")
def shared() -> Any:
    boxes: dict[str, Any] = {}
    yield boxes
    for box in boxes.values():
        box.kill()


CALLS = r"""
import ctypes, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    return libc.syscall(*args), ctypes.get_errno()
import platform
n = {"x86_64": 0, "aarch64": 1}[platform.machine()]
table = %r
for name, numbers in table.items():
    if numbers[n] is not None:
        result, error = call(numbers[n], -1, 0, 0, 0, 0)
        assert result == -1 and error in (1, 38), (name, result, error)
clone = {0: 56, 1: 220}[n]
for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x02000000):
    result, error = call(clone, flag | 17, 0, 0, 0, 0)
    assert (result, error) == (-1, 1), (hex(flag), result, error)
for family in (38, 40, 17, 3, 9, 29):
    try:
        socket.socket(family, socket.SOCK_DGRAM)
        raise SystemExit(f"family {family} opened")
    except OSError as error:
        assert error.errno == 97, (family, error)
for request in (0x5412, 0x541C):
    result, error = call({0: 16, 1: 29}[n], 0, request, 0)
    assert (result, error) == (-1, 1), (request, error)
socket.socket(socket.AF_INET); socket.socket(socket.AF_UNIX)
print("all refused")
"""


def test_the_filter_refuses_each_call_of_its_list(box: Any) -> None:
    if not Path("/usr/bin/python3").exists():
        pytest.skip("the host image has no python3: apt-get install python3-minimal")
    result = box.commands.run(["/usr/bin/python3", "-c", CALLS % (seccomp.DENIED,)], check=False)
    assert result.stdout == "all refused\n", result


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_call_numbers_are_the_kernels(column: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"no {header}: apt-get install linux-libc-dev")
    numbers = {
        name: int(n) for name, n in re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    }
    for name, pair in {**seccomp.DENIED, **seccomp._CHECKED}.items():
        assert pair[column] == numbers.get(name, pair[column] if name in ("memfd_secret", "quotactl_fd") else None), (
            name
        )


def test_a_machine_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="sparc"):
        seccomp.program("sparc")


def test_no_descriptor_of_the_host_leaks(box: Any) -> None:
    names = inside(box, "for f in /proc/self/fd/*; do readlink $f; done")
    assert all(re.match(r"^(/dev/null|pipe:.*|/proc/.*|)$", line) for line in names.splitlines()), names


def test_it_is_a_member_of_its_cgroup_before_it_runs(root_host: Host) -> None:
    where = cgroups.detect()
    if not where.limits:
        pytest.skip("no writable cgroups on this host")
    with root_host.create(pids=64, memory=256, cpu=0.5) as box:
        base = int(inside(box, "cat /proc/self/uid_map").split()[1])
        group = cgroups.Cgroup(where, (base - cgroups.FIRST_ID) // cgroups.RANGE)
        assert len(group.pids()) >= 2
        memory = "memory.limit_in_bytes" if where.v1 else "memory.max"
        folder = (where.v1["memory"] if where.v1 else where.unified or Path()) / str(group.slot)
        assert int((folder / memory).read_text()) == 256 << 20
        for pid in group.pids():
            assert f"/dsec/{group.slot}" in Path(f"/proc/{pid}/cgroup").read_text()
    until(lambda: not folder.exists())  # the cgroup does not outlive its sandbox


def test_v2_limits_freezing_and_killing_write_the_right_files(tmp_path: Path) -> None:
    folder = tmp_path / "dsec" / "7"
    folder.mkdir(parents=True)
    for name in "memory.max memory.swap.max memory.oom.group pids.max cpu.max cgroup.kill cgroup.freeze".split():
        (folder / name).write_text("")
    (folder / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    (folder / "cpu.stat").write_text("usage_usec 2500000\n")
    (folder / "memory.current").write_text("4096\n")
    (folder / "memory.events").write_text("oom 1\noom_kill 3\n")
    group = cgroups.Cgroup(cgroups.Hierarchy(tmp_path / "dsec", {}), 7)
    group.limit(1.5, 64, 9)
    values = {p.name: p.read_text() for p in folder.iterdir()}
    assert (
        values["memory.max"] == str(64 << 20) and values["memory.swap.max"] == "0" and values["memory.oom.group"] == "1"
    )
    assert values["pids.max"] == "9" and values["cpu.max"] == "150000 100000"
    group.freeze(True)
    group.kill()
    assert (folder / "cgroup.freeze").read_text() == "1" and (folder / "cgroup.kill").read_text() == "1"
    stats = group.stats()
    assert (stats.cpu_seconds, stats.memory_bytes, stats.oom_kills) == (2.5, 4096, 3)
    assert group.joins == [folder / "cgroup.procs"]


# The self-test must see a wall that is missing.

WALLS = ["--die-with-parent", "--unshare-all", "--as-pid-1"]
WALLS += "--dev /dev --proc /proc --ro-bind /usr /usr --symlink usr/bin /bin".split()
WALLS += "--symlink usr/lib /lib --symlink usr/lib64 /lib64 --symlink usr/sbin /sbin".split()
WALLS += " --tmpfs /tmp --dir /root --dir /mnt".split()


def run_self_test(extra: list[str], tmp_path: Path, agent: Path) -> str:
    """The self-test in a bare bubblewrap, started by whoever runs the tests; the reason why it refuses."""
    with socket.socket(socket.AF_UNIX) as listener, selftest.canary(tmp_path) as canary:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        fd = listener.fileno()
        command = [
            "bwrap",
            *WALLS,
            *extra,
            "--ro-bind",
            str(agent),
            "/tmp/agent",
            "--",
            "/tmp/agent",
            "--listen",
            str(fd),
        ]
        process = subprocess.Popen([*command, "--drop"], pass_fds=[fd])

        async def main() -> str:
            try:
                await selftest.check(await Agent.connect(tmp_path / "s"), canary, IS_ROOT)
            except SubstrateUnavailable as error:
                return error.reason
            return ""

        try:
            return asyncio.run(main())
        finally:
            process.kill()
            process.wait()


def test_the_self_test_sees_each_missing_wall(tmp_path: Path, programs: Path) -> None:
    agent = build.agent(programs)
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    before = CORE_PATTERN.read_text()
    (tmp_path / "a").mkdir()
    bare = run_self_test([], tmp_path / "a", agent)
    assert "no seccomp filter" in bare
    if IS_ROOT:
        assert "maps id 0 to the host's 0" in bare, "bubblewrap started by root maps root to root"
        (tmp_path / "b").mkdir()
        assert "/proc/sys/kernel/core_pattern" in run_self_test(
            ["--bind", "/proc/sys", "/proc/sys"], tmp_path / "b", agent
        )
    (tmp_path / "c").mkdir()
    shown = run_self_test(["--bind", "/var/tmp", "/var/tmp", "--ro-bind", "/sys", "/sys"], tmp_path / "c", agent)
    assert "read the host's canary" in shown and "sees /sys/" in shown
    assert CORE_PATTERN.read_text() == before


def test_the_launcher_refuses_root_without_a_range(tmp_path: Path, programs: Path) -> None:
    if not IS_ROOT:
        pytest.skip("needs root: sudo script/test tests/dsec")
    launcher = build.program(Path(seccomp.__file__).with_name("launch.c"), programs / "cache")
    for base in ([], ["--base", "0"], ["--base", "1000"]):
        command = [
            launcher,
            "--keep",
            "2",
            *base,
            "--root",
            tmp_path,
            "--size",
            "4096",
            "--lower",
            "/",
            "--",
            "/bin/true",
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 125 and "range" in done.stderr, done
    assert os.listdir(tmp_path) == [], "nothing was mounted or made"
