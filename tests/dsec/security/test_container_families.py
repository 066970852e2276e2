"""Families of attacks on a container that no other test holds, with canaries on the host, as root and as an ordinary
user. The whole table is docs/dsec_security.md.

Every test here was seen to fail with its wall taken away; what was taken away stands in its docstring.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import DsecError, Timeout
from tests.dsec.conftest import PATIENCE, Host, until

PYTHON = "/usr/bin/python3"


def python(box: Any, script: str, **options: Any) -> Any:
    if not Path(PYTHON).exists():
        pytest.skip("the host image has no python3: apt-get install python3-minimal")
    return box.commands.run([PYTHON, "-c", script], check=False, timeout=40, **options)


def test_1_the_hosts_helpers_keep_their_names(box: Any) -> None:
    """Files through which a kernel starts programs as root. Each is written with what it holds, so that a hole does
    no harm. Two walls hold it, the id range and a read-only /proc/sys: it falls when both are gone."""
    names = ["/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug",
             "/proc/sys/fs/binfmt_misc/register", "/sys/kernel/uevent_helper", "/sys/fs/cgroup/release_agent",
             "/sys/fs/cgroup/memory/release_agent", "/proc/sys/kernel/poweroff_cmd"]  # fmt: skip
    before = {name: Path(name).read_bytes() for name in names if os.access(name, os.R_OK)}
    assert before, "nothing to look at"
    for name in names:
        same = before.get(name, b"").decode().strip()
        result = box.commands.run(["/bin/sh", "-c", f'printf "%s" "$1" > {name} && echo WROTE', "-", same], check=False)
        assert "WROTE" not in result.stdout, name
    assert before == {name: Path(name).read_bytes() for name in before}


def test_1_the_agents_program_cannot_be_overwritten(box: Any, host: Host) -> None:
    """runc's CVE-2019-5736: a program inside opens the one that the host started and writes to it. A box may spoil its
    own copy, never the host's or its neighbour's. Falls with the agent's layer bound from the host, writable."""
    names = [path for path in (host.home / "cache").rglob("*") if path.is_file() and not path.is_symlink()]
    built = [path for path in names if "host-" not in str(path)]
    assert any("agent" in path.name for path in built)
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in built}
    script = (
        "for p in /proc/[0-9]*/exe /.dsec/agent; do (printf x >> $p) 2>/dev/null; done;"
        " rm -f /.dsec/agent; printf x > /.dsec/agent; chmod 4777 /.dsec/agent; echo done"
    )
    assert box.commands.run(script).stdout == "done\n"
    assert before == {path: hashlib.sha256(path.read_bytes()).digest() for path in built}
    assert box.commands.run("echo alive").stdout == "alive\n"
    with host.create(timeout=60) as next_one:
        assert next_one.commands.run("echo well").stdout == "well\n"


def test_3_a_race_of_renames_never_shows_the_hosts_file(box: Any, host: Host) -> None:
    """A name is a file and a link to the host's canary by turns while the host reads and writes it. Falls when the Edge
    opens paths under the sandbox's root by itself instead of asking the agent inside."""
    secret = secrets.token_hex(8)
    canary = host.home.parent / f"canary-{secret}"
    canary.write_text(secret)
    canary.chmod(0o666)
    try:
        box.files.write("/root/plain", "inside")
        race = (
            f"cd /root; ln -s {canary} link; while :; do ln -f plain x 2>/dev/null; mv -f x name;"
            " cp -P link y; mv -f y name; done"
        )
        handle = box.commands.run(race, background=True)
        seen, turn, end = set(), 0, time.monotonic() + PATIENCE
        while turn < 60 or ("inside" not in seen and time.monotonic() < end):
            turn += 1
            try:
                seen.add(box.files.read("/root/name"))
                if turn % 3 == 0:
                    box.files.write("/root/name", "inside")
            except DsecError:
                continue
        handle.kill()
        assert secret not in seen and canary.read_text() == secret
        assert "inside" in seen, "the race was never on"
    finally:
        canary.unlink()


def test_3_pipes_devices_and_endless_files_do_not_hold_the_edge(box: Any) -> None:
    """Falls when the agent opens files without O_NONBLOCK or reads without a limit."""
    box.commands.run("mkfifo /tmp/pipe; ln -s /dev/zero /tmp/zero; truncate -s 1T /tmp/sparse 2>/dev/null; :")
    for name in ("/tmp/pipe", "/tmp/zero", "/tmp/sparse", "/proc/self/mem", "/proc/kmsg"):
        with contextlib.suppress(DsecError):
            assert len(box.files.read(name, format="bytes")) < 1 << 30
        assert box.commands.run("echo alive").stdout == "alive\n"


def test_4_threads_count_as_processes(host: Host) -> None:
    """The host's process numbers are few and shared. Falls without a limit on processes."""
    script = """
import threading, time
made = 0
try:
    for n in range(400):
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
        made += 1
except RuntimeError:
    pass
print(made, flush=True)
import os; os._exit(0)
"""
    with host.create(pids=50, memory=512, timeout=60) as box:
        made = int(python(box, script).stdout)
        assert made < 50, f"{made} threads under a limit of 50"


BOMBS = {
    "anonymous": "x = bytearray(300 << 20); print('HELD', len(x))",
    "shared": (
        "import mmap\nm = mmap.mmap(-1, 300 << 20)\nfor n in range(0, 300 << 20, 4096): m[n] = 1\nprint('HELD')"
    ),
    "memory file": (
        "import os\nfd = os.memfd_create('x')\nfor n in range(300): os.write(fd, bytes(1 << 20))\nprint('HELD')"
    ),
    "/dev/shm": "f = open('/dev/shm/x', 'wb')\nfor n in range(300): f.write(bytes(1 << 20))\nf.flush(); print('HELD')",
    "pipes": (
        "import os, fcntl\nkept, total = [], 0\nwhile total < 300 << 20:\n    r, w = os.pipe()\n"
        "    kept += [r, w]\n    fcntl.fcntl(w, 1031, 1 << 20)\n    os.set_blocking(w, False)\n"
        "    total += os.write(w, bytes(1 << 20))\nprint('HELD')"
    ),
    "sockets": (
        "import socket\nkept, total = [], 0\nwhile total < 300 << 20:\n    a, b = socket.socketpair()\n"
        "    kept += [a, b]\n    a.setblocking(False)\n    a.setsockopt(1, 7, 1 << 24)\n"
        "    total += a.send(bytes(1 << 20))\nprint('HELD')"
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_5_memory_of_every_kind_is_counted(root_host: Host, bomb: str) -> None:
    """300 MiB under a limit of 96. Only where there are cgroups: an ordinary user without them has a limit per process,
    and says so (`capabilities["limits"]`). Falls with the limit on memory raised."""
    with root_host.create(memory=96, disk=32, timeout=60) as box:
        if box.get_info().capabilities["limits"] == "rlimit":
            pytest.skip("no writable cgroups on this host")
        result = python(box, BOMBS[bomb])
        assert "HELD" not in result.stdout, result
        assert result.exit_code != 0
        assert box.commands.run("echo alive").stdout == "alive\n"


def test_5_inotify_bombs_take_the_boxes_own(host: Host) -> None:
    """The kernel counts inotify instances per user and charges a user namespace's to who made it. As root falls with a
    namespace made by root (one box's 128 instances were then all the host's root has), as an ordinary user without
    a limit in the namespace."""
    bomb = (
        "import ctypes, os, time\nlibc, said = ctypes.CDLL(None), open('/root/said', 'w')\n"
        "made = 0\nwhile libc.inotify_init1(0) >= 0: made += 1\n"
        "os.mkdir('/tmp/many')\nwatched = 0\n"
        "try:\n for i in range(100000):\n"
        "  os.mkdir(f'/tmp/many/{i}'); watched += libc.inotify_add_watch(4, f'/tmp/many/{i}'.encode(), 4095) > 0\n"
        "except OSError: pass\nprint(made, watched, file=said, flush=True)\ntime.sleep(600)"
    )
    one = "import ctypes; print(ctypes.CDLL(None).inotify_init1(0) >= 0)"
    with host.create(memory=64, disk=16, timeout=120) as box, host.create(timeout=120) as neighbour:
        if not Path(PYTHON).exists():
            pytest.skip("the host image has no python3: apt-get install python3-minimal")
        handle = box.commands.run([PYTHON, "-c", bomb], background=True)
        said = until(lambda: box.commands.run("cat said", check=False).stdout)
        made, watched = map(int, said.split())
        assert made > 10 and watched > 10, "the bomb went off"
        as_whom: dict[str, Any] = {"user": host.uid, "extra_groups": []} if host.uid != os.geteuid() else {}
        outside = subprocess.run([PYTHON, "-c", one], capture_output=True, text=True, cwd="/", **as_whom)
        assert outside.stdout == "True\n", f"{made} instances in a box, none left outside"
        assert python(neighbour, one).stdout == "True\n"
        handle.kill()
        assert python(box, one).stdout == "True\n", "they end with their process"


def test_7_space_of_deleted_files_and_holes_is_counted(host: Host) -> None:
    """Falls with a plain folder as the upper layer."""
    script = (
        'exec 9>/root/x; rm /root/x; head -c 64000000 /dev/zero >&9; echo "wrote $?"; exec 9>&-;'
        " truncate -s 500M /root/hole && for n in $(seq 0 40); do"
        " dd if=/dev/zero of=/root/hole bs=1M count=1 seek=$((n * 10)) conv=notrunc 2>/dev/null || break; done;"
        " du -m /root/hole | cut -f1"
    )
    with host.create(memory=256, disk=20, timeout=60) as box:
        result = box.commands.run(script, check=False)
        assert "No space" in result.stderr and "wrote 0" not in result.stdout, result
        assert int(result.stdout.splitlines()[-1]) <= 20


def test_8_lines_without_end_and_closed_outputs(box: Any) -> None:
    """Falls when output is split at newlines or kept whole."""
    result = box.commands.run("head -c 30000000 /dev/zero | tr '\\0' x", limit=5000, timeout=60)
    assert result.truncated and len(result.stdout) == 5000
    pieces: list[int] = []
    result = box.commands.run(
        "head -c 3000000 /dev/zero", limit=1000, timeout=60, on_stdout=lambda piece: pieces.append(len(piece))
    )
    assert len(result.stdout) == 1000 and max(pieces) < 1 << 21
    assert box.commands.run("exec 1>&- 2>&-; sleep 0.1; exit 3", check=False).exit_code == 3


def sleeping(mark: str) -> list[int]:
    """Processes of the host that sleep for ``mark`` seconds."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"sleep\0{mark}\0".encode() == (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_8_a_flood_that_is_killed_in_the_middle(host: Host) -> None:
    """Commands that write without end, killed while they do: by their handle, by a timeout, with their box. Falls
    without the kill of the group."""
    flood = "yes 0123456789012345678901234567890123456789 & yes err >&2 & head -c 100000000 /dev/zero; wait"
    with host.create(timeout=120) as box:
        for delay in (0.0, 0.02, 0.2):
            handle = box.commands.run(flood, background=True, limit=100_000)
            time.sleep(delay)
            handle.kill()
            result = handle.wait(check=False)
            assert result.exit_code == 137
            assert len(result.stdout) <= 100_000 and len(result.stderr) <= 100_000
        with pytest.raises(Timeout):
            box.commands.run(flood, timeout=0.3, limit=100_000)
        assert box.commands.run("echo well").stdout == "well\n"
        assert "yes" not in box.commands.run("cat /proc/[0-9]*/comm 2>/dev/null", check=False).stdout.split()
        floods = [box.commands.run(flood, background=True, limit=100_000) for _ in range(4)]
        time.sleep(0.1)
        box.kill()
        for handle in floods:
            with pytest.raises(DsecError):
                handle.wait(check=False)


def test_9_nothing_of_a_destroyed_box_is_left(host: Host) -> None:
    """Daemons that left their session, ignore every signal or stand still. Falls without the kill of the whole group
    or of the process namespace."""
    mark = f"300.{secrets.randbelow(10**6)}"
    box = host.create(timeout=60)
    box.commands.run(
        f"(setsid sh -c 'trap \"\" TERM INT HUP; sleep {mark}' >/dev/null 2>&1 &);"
        f" (setsid setsid sleep {mark} >/dev/null 2>&1 &);"
        f" sleep {mark} >/dev/null 2>&1 & until grep -q sleep /proc/$!/comm; do :; done; kill -STOP $!",
        check=False,
    )
    until(lambda: len(sleeping(mark)) == 3)
    status = [Path(f"/proc/{pid}/status").read_text() for pid in sleeping(mark)]
    owners = {re.findall(r"^Uid:\s+(\d+)", text, re.M)[0] for text in status}
    folder = next((host.home / "sandboxes").glob(f"*{box.id}*"))
    box.kill()
    until(lambda: not sleeping(mark) and not folder.exists())
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    if host.who == "root":
        assert all(int(uid) >= 100_000 for uid in owners)
        until(lambda: not holders(owners))  # or the id range is not free


def holders(owners: set[str]) -> list[str]:
    """Command lines of the host's processes that have one of these real user ids."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if re.findall(r"^Uid:\s+(\d+)", (folder / "status").read_text(), re.M)[0] in owners:
                found.append((folder / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
