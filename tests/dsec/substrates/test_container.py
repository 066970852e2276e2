"""Containers as their users see them, and what hostile ones cannot do; as root and as an ordinary user."""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import (
    CommandFailed,
    DsecError,
    ImageError,
    InvalidRequest,
    NotFound,
    SandboxFailed,
    SubstrateUnavailable,
    Timeout,
)
from tests.dsec.conftest import ORDINARY, Host, reachable, until


def test_commands_and_files(box: Any) -> None:
    result = box.commands.run("echo out; echo err >&2; echo $HOME $PWD; id -u", env={"A": "b"})
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n/root /root\n0\n", "err\n", 0)
    assert not result.truncated and not result.replayed and result.duration > 0
    with pytest.raises(CommandFailed) as caught:
        box.commands.run("echo why >&2; exit 3")
    assert caught.value.result.exit_code == 3 and "why" in str(caught.value)
    assert box.commands.run("exit 3", check=False).exit_code == 3
    assert box.commands.run(["printf", "%s", "a b"]).stdout == "a b"
    assert box.commands.run("cat", stdin="grüße").stdout == "grüße"
    box.files.write("deep/er/file.txt", "text")
    assert box.files.read("/root/deep/er/file.txt") == "text" and box.files.exists("deep")
    assert box.commands.run("cat deep/er/file.txt").stdout == "text"
    assert [entry.name for entry in box.files.list("deep")] == ["er"]
    box.files.rename("deep/er/file.txt", "moved")
    box.files.remove("deep")
    assert not box.files.exists("deep") and box.files.read("moved", format="bytes") == b"text"
    with pytest.raises(NotFound):
        box.files.read("/no/such")
    with pytest.raises(InvalidRequest):
        box.files.read("/dev/zero")


def test_streaming_background_and_terminal(box: Any) -> None:
    seen: list[str] = []
    box.commands.run(
        "for i in 1 2 3; do echo $i; sleep 0.05; done; echo e >&2", on_stdout=seen.append, on_stderr=seen.append
    )
    assert "".join(seen) == "1\n2\n3\ne\n" and len(seen) >= 3
    handle = box.commands.run("read x; echo got $x; sleep 0.1; exit 4", background=True, stdin=True)
    assert [c["exit_code"] for c in box.commands.list() if c["id"] == handle.id] == [None]
    handle.send_stdin("line\n")
    assert box.commands.connect(handle.id).wait(check=False).stdout == "got line\n"
    assert handle.wait(check=False).exit_code == 4, "a result may be asked for twice"
    terminal = box.pty.create("tty; stty size; read x", rows=40, columns=90)
    terminal.send_stdin("\n")
    shown = terminal.wait()
    assert "/dev/pts/" in shown.stdout and "40 90" in shown.stdout
    # a callback may use the sandbox: it runs in the caller's thread
    box.commands.run("echo x", on_stdout=lambda text: box.files.write("from-callback", text))
    assert box.files.read("from-callback") == "x\n"


def test_devices(box: Any) -> None:
    links = "core fd ptmx stderr stdin stdout"
    there = box.commands.run(f"cd /dev; ls; readlink {links}; stat -c '%t %T %a' null zero full random urandom tty")
    names = set(f"{links} null zero full random urandom tty pts shm".split())
    listed, nodes = there.stdout.split("\n")[: len(names)], there.stdout.split("\n")[-7:-1]
    assert set(listed) - {"console"} == names
    assert nodes == ["1 3 666", "1 5 666", "1 7 666", "1 8 666", "1 9 666", "5 0 666"]
    script = "echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c 3 /dev/urandom | wc -c; echo > /dev/full"
    assert box.commands.run(script, check=False).stdout == "3\n3\n"
    assert box.commands.run("hostname; echo x > /dev/shm/x; cat /dev/shm/x").stdout == "sandbox\nx\n"
    changes = ["rm /dev/null", "mv /dev/null /dev/x", "chmod 0 /dev/null", "mknod /dev/sda b 8 0"]
    assert all(box.commands.run(change, check=False).exit_code for change in changes)
    with pytest.raises(DsecError):
        box.files.remove("/dev/null")
    assert box.commands.run("stat -c %a /dev/null").stdout == "666\n"


def test_timeouts_kill_and_say_so(box: Any) -> None:
    with pytest.raises(Timeout, match=r"0\.3 s"):
        box.commands.run("trap '' TERM INT; while :; do :; done", timeout=0.3)
    assert box.commands.run("echo alive").stdout == "alive\n"


def test_a_sandbox_ends_on_time_with_all_it_started(host: Host) -> None:
    box = host.create(timeout=60)
    mark = f"100{secrets.randbelow(10**6)}"
    box.commands.run(f"(setsid sleep {mark} &) ; (trap '' TERM; sleep {mark}) & true", check=False)
    until(lambda: running(mark) >= 2)
    box.set_timeout(0.5)
    until(lambda: running(mark) == 0 and not box.is_running())
    with pytest.raises(NotFound):
        box.commands.run("true")


def running(mark: str) -> int:
    """How many processes of the host sleep for that long."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            count += f"sleep\0{mark}\0".encode() == (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return count


def test_output_floods_are_cut_in_the_middle(box: Any) -> None:
    result = box.commands.run("yes | head -c 50000000; echo END", limit=10_000, timeout=60)
    assert result.truncated and len(result.stdout) == 10_000 and result.stdout.endswith("END\n")
    assert box.commands.run("head -c 300 /dev/urandom; printf '\\0\\377'").stdout.count("\ufffd") > 0


def test_fork_bombs_stop_at_the_limit(host: Host) -> None:
    with host.create(pids=40, timeout=60) as box:
        bomb = ["/bin/sh", "-c", "for i in $(seq 100); do sleep 60 & done"]
        result = box.commands.run(bomb, check=False, timeout=20)
        assert "fork" in result.stderr, result
        with pytest.raises((InvalidRequest, CommandFailed)):
            box.commands.run(["/bin/sh", "-c", "true & true & true"])  # full: it says so (bash would try for 15 s)
        assert box.kill() and not box.is_running(), "and it ends"


def test_memory_bombs_end_inside(host: Host) -> None:
    with host.create(memory=64, disk=16, timeout=60) as box:
        result = box.commands.run("head -c 400000000 /dev/zero | tail -c 399000000 | wc -c", check=False, timeout=40)
        assert result.stdout.strip() != "399000000", "it had 400 MB under a limit of 64 MiB"
        assert box.commands.run("echo alive").stdout == "alive\n", "the agent outlives the bomb"


def test_the_disk_is_capped_in_bytes_and_files(host: Host) -> None:
    with host.create(memory=256, disk=20, timeout=60) as box:
        for folder in ("/tmp", "/root", "/var/tmp"):
            result = box.commands.run(
                f"head -c 64000000 /dev/zero > {folder}/x; stat -c %s {folder}/x; rm {folder}/x", check=False
            )
            assert "No space" in result.stderr and int(result.stdout) <= 20 << 20, result
        many = box.commands.run(
            "head -c 1000000 /dev/zero > /tmp/y; mkdir m; cd m; seq 20000 | xargs touch", check=False
        )
        assert many.exit_code and "No space" in many.stderr
        assert 1_000_000 <= box.get_metrics().disk_bytes <= 20 << 20


def test_a_disk_larger_than_memory_is_a_file(root_host: Host) -> None:
    with root_host.create(memory=128, disk=300, timeout=60) as box:
        assert box.commands.run("head -c 200000000 /dev/zero > big; stat -c %s big").stdout == "200000000\n"
        result = box.commands.run("head -c 200000000 /dev/zero > more", check=False)
        assert "No space" in result.stderr


def test_cpu_is_shared_as_asked(root_host: Host) -> None:
    with root_host.create(cpu=0.2, timeout=60) as box:
        script = "end=$((SECONDS+1)); while [ $SECONDS -lt $end ]; do :; done"
        before = box.get_metrics().cpu_seconds
        start = time.monotonic()
        box.commands.run(f"{script} & {script} & wait")
        used, passed = box.get_metrics().cpu_seconds - before, time.monotonic() - start
        assert 0 < used < 0.2 * passed + 0.25, (used, passed)


def test_no_network(box: Any, host: Host) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        script = f"exec 3<>/dev/tcp/127.0.0.1/{port}"
        assert box.commands.run(["/bin/bash", "-c", script], check=False).exit_code != 0
    names = box.commands.run("cat /proc/net/dev; cat /proc/net/unix").stdout
    assert "eth" not in names and str(host.home) not in names
    for address in ("169.254.169.254/80", "8.8.8.8/53"):
        result = box.commands.run(["/bin/bash", "-c", f"exec 3<>/dev/tcp/{address}"], check=False, timeout=5)
        assert result.exit_code != 0 and "unreachable" in result.stderr.lower()


def test_links_inside_never_reach_the_hosts_files(box: Any, host: Host) -> None:
    canary = host.home.parent / "canary"
    secret = secrets.token_hex(8)
    canary.write_text(secret)
    canary.chmod(0o666)
    try:
        for link in (f"{canary}", f"/proc/1/root{canary}", f"../../../../../..{canary}", f"/proc/self/root{canary}"):
            box.commands.run(["ln", "-sf", link, "/root/link"])
            for path in ("/root/link", f"/proc/1/root{canary}", str(canary)):
                try:
                    assert box.files.read(path) != secret
                except (NotFound, InvalidRequest):
                    continue
            for path in ("/root/link", str(canary)):
                try:
                    box.files.write(path, "overwritten", append=True)
                except (NotFound, InvalidRequest):
                    continue
        assert canary.read_text() == secret
    finally:
        canary.unlink()


def test_a_setuid_file_made_inside_is_out_of_everybodys_reach_outside(root_host: Host) -> None:
    with root_host.create() as box:
        box.commands.run("cp /usr/bin/id /root/mine; chmod 4777 /root/mine")
        name = box.snapshot()
        kept = root_host.home / "snapshots" / name / "layers" / "0000" / "root" / "mine"
        assert kept.exists()
        with pytest.raises(PermissionError):
            subprocess.run([str(kept)], user=ORDINARY, group=ORDINARY, extra_groups=[], check=False)


def test_pause_snapshot_and_fork(box: Any, host: Host) -> None:
    box.commands.run("echo one > file; rm -rf /srv; (while :; do date +%s%N > tick; sleep 0.02; done) & sleep 0.1")
    box.pause()
    assert box.get_info().state == "paused"
    with pytest.raises(InvalidRequest, match="paused"):
        box.commands.run("true")
    assert host.sync("connect", box.id).get_info().state == "running"
    name = box.snapshot()
    box.commands.run("echo two > file")
    with host.create(image=f"snapshot:{name}") as old:
        assert old.files.read("file") == "one\n" and not old.files.exists("/srv"), "deletions are kept too"
        assert old.commands.run("touch /root/file && stat -c %u /root/file").stdout == "0\n"
        (again,) = old.fork()
        assert again.files.read("file") == "one\n"
        again.kill()
    forks = box.fork(3)
    assert [fork.files.read("file") for fork in forks] == ["two\n"] * 3
    forks[0].files.write("file", "three")
    assert forks[1].files.read("file") == "two\n" and box.files.read("file") == "two\n"
    for fork in forks:
        fork.kill()
    with pytest.raises(NotFound):
        host.create(image="snapshot:../../etc")


def test_images_from_a_folder(host: Host, tmp_path: Path) -> None:
    reachable(tmp_path)
    busybox = Path("/usr/bin/busybox") if Path("/usr/bin/busybox").exists() else Path("/bin/busybox")
    if not busybox.exists():
        pytest.skip("no busybox: apt-get install busybox-static")
    (tmp_path / "bin").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "bin" / "busybox").write_bytes(busybox.read_bytes())
    (tmp_path / "bin" / "busybox").chmod(0o755)
    (tmp_path / "bin" / "sh").symlink_to("busybox")
    (tmp_path / "marker").write_text("of the image")
    if host.uid != os.geteuid():
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, host.uid, host.uid, follow_symlinks=False)
    with host.create(image=str(tmp_path)) as box:
        assert box.commands.run("busybox cat /marker; busybox ls /").stdout.startswith("of the image")
        box.commands.run("echo changed > /marker")
        assert box.files.read("/marker") == "changed\n"
    assert (tmp_path / "marker").read_text() == "of the image", "an image is never written"
    with pytest.raises(ImageError):
        host.create(image="/no/such/folder")


def test_users(root_host: Host, host: Host) -> None:
    with root_host.create(user="user") as box:
        assert box.commands.run("id -un; id -u; pwd; touch /root/x", check=False).stdout == "user\n1000\n/home/user\n"
        assert box.commands.run("id -u; touch /root/y", user="root").stdout == "0\n"
        with pytest.raises(InvalidRequest, match="no user"):
            box.commands.run("true", user="nobodyatall")


def test_what_is_asked_for_is_never_lowered(host: Host) -> None:
    with pytest.raises(SubstrateUnavailable, match="isolation level 2"):
        host.create(isolation_min=4)
    with pytest.raises(SubstrateUnavailable, match="no network"):
        host.create(substrate="function", network=["example.org"])
    with pytest.raises(InvalidRequest, match="did you mean 'memory'"):
        host.create(memroy=100)
    with pytest.raises(InvalidRequest):
        host.create(memory=-1)


def test_a_sandbox_whose_agent_is_killed_fails_with_a_reason(root_host: Host) -> None:
    box = root_host.create()
    box.commands.run("true")
    # from outside: nothing inside can
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"/.dsec/agent\0"):
                base = int((folder / "uid_map").read_text().split()[1])
                if str(base) in box.commands.run("cat /proc/self/uid_map").stdout.split():
                    os.kill(int(folder.name), 9)
                    break
        except (FileNotFoundError, ProcessLookupError):
            continue
    with pytest.raises((SandboxFailed, NotFound)):
        box.commands.run("true")
    until(lambda: not box.is_running())  # the Edge may still be clearing up behind it


DAEMON = """
import os, sys, time
def away(name, *, session):
    if os.fork(): return
    if session: os.setsid()
    if os.fork(): os._exit(0)
    for number in range(1, 32):
        try: __import__("signal").signal(number, __import__("signal").SIG_IGN)
        except OSError: pass
    while True:
        open("/tmp/beat-" + name, "a").write("x"); time.sleep(0.02)
away(sys.argv[1] + "-session", session=True)
away(sys.argv[1] + "-group", session=False)
if sys.argv[1] == "late": time.sleep(60)
"""


def beats(box: Any) -> dict[str, int]:
    """How often each daemon has written."""
    lines = box.commands.run("cd /tmp; stat -c '%n %s' beat-*", check=False).stdout
    return {name.removeprefix("beat-"): int(size) for name, size in map(str.split, lines.splitlines())}


def test_a_command_past_its_time_takes_along_all_it_started_and_nothing_else(box: Any) -> None:
    """Double-forked, in sessions of their own, deaf to signals: dead when it says so. Daemons of an earlier command,
    other commands and the sandbox live on."""
    box.files.write("daemon.py", DAEMON)
    box.commands.run("python3 daemon.py early")
    other = box.commands.run("read line; echo fine", background=True, stdin=True)
    until(lambda: len(beats(box)) == 2)
    for seconds in (0.6, 3, 15):  # until the daemons of this one were there before it ended
        with pytest.raises(Timeout):
            box.commands.run("setsid sleep 77 & python3 daemon.py late", timeout=seconds)
        before = beats(box)
        if len(before) == 4:
            break
    later = until(lambda: (now := beats(box))["early-session"] > before["early-session"] + 9 and now)
    assert later["early-group"] > before["early-group"]
    assert {name: later[name] for name in later if name.startswith("late")} == {
        name: before[name] for name in ("late-session", "late-group")
    }, "they write on"
    assert box.commands.run("pgrep -f 'sleep 7[7]'", check=False).exit_code == 1
    other.send_stdin("\n")
    assert other.wait().stdout == "fine\n"


def test_standard_input_of_any_size(host: Host) -> None:
    """50 MiB in windows into 64 MiB of memory; a command that does not read stops nobody."""
    data = os.urandom(1 << 20) * 50
    with host.create(timeout=120, memory=64, disk=16) as box:
        want = hashlib.sha256(data).hexdigest()
        assert box.commands.run("sha256sum", stdin=data).stdout.split()[0] == want
        assert box.commands.run("head -c 5", stdin=data).stdout == data[:5].decode("utf-8", "replace")
        deaf = box.commands.run("exec 0<&-; sleep 0.2; echo closed", stdin=data)
        assert deaf.stdout == "closed\n"
        with pytest.raises(Timeout):
            box.commands.run("sleep 30", stdin=data, timeout=0.5)
        handle = box.commands.run("sleep 0.3; sha256sum", background=True, stdin=data)
        assert handle.wait().stdout.split()[0] == want
        assert box.commands.run("cat", stdin="").stdout == ""
        assert box.get_metrics().oom_kills == 0
        assert box.commands.run("echo alive").stdout == "alive\n"
