"""Before a host serves: tries from inside what must not be possible, and refuses to serve when any of it is.

Every write puts back the value that is there, so a wall that is missing is noticed without the host being changed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsec.errors import SubstrateUnavailable
from dsec.guest.protocol import Agent

# Each line of output names a wall that is missing. No program of the sandbox is trusted with more than that.
SCRIPT = r"""
same() { [ -e "$1" ] || return; v=$(cat "$1" 2>/dev/null); (printf '%s' "$v" > "$1") 2>/dev/null && echo "wrote $1"; }
for f in core_pattern modprobe hotplug poweroff_cmd sysrq core_pipe_limit; do same /proc/sys/kernel/$f; done
same /proc/sys/fs/binfmt_misc/register; same /proc/sys/vm/panic_on_oom; same /sys/kernel/uevent_helper
(printf '' > /proc/sysrq-trigger) 2>/dev/null && echo "opened /proc/sysrq-trigger"
for f in $(find /sys -name release_agent -o -name cgroup.procs 2>/dev/null | head -5); do echo "sees $f"; done
for f in kcore keys kmsg timer_list; do # masked by a file that is empty, it may be opened
  [ -n "$(head -c 1 /proc/$f 2>/dev/null | tr '\0' x)" ] && echo "read /proc/$f"; done
for f in root cwd; do ls /proc/1/$f/ >/dev/null 2>&1 && echo "entered /proc/1/$f"; done
cat "$1" 2>/dev/null && echo "read the host's canary"
(mkdir -p /mnt/x && mount -t tmpfs x /mnt/x) 2>/dev/null && echo "mounted"
mknod /tmp/sda b 8 0 2>/dev/null && [ "$2" != own ] && echo "made a device"
head -c 1 /tmp/sda >/dev/null 2>&1 && echo "read a device"
unshare -Ur true 2>/dev/null && echo "made a user namespace"
[ "$2" != own ] && dmesg >/dev/null 2>&1 && echo "read the kernel log"
while read -r key value rest; do case $key in
  CapEff:|CapPrm:|CapBnd:|CapInh:|CapAmb:) [ "$value" = 0000000000000000 ] || echo "has capabilities $key $value";;
  NoNewPrivs:) [ "$value" = 1 ] || echo "may gain privileges";;
  Seccomp:) [ "$value" = 2 ] || echo "no seccomp filter";;
esac; done < /proc/self/status
while read -r inside outside count; do
  [ "$2" = root ] && [ "$outside" -lt 65536 ] && echo "maps id $inside to the host's $outside"
done < /proc/self/uid_map
for fd in /proc/self/fd/*; do case $(readlink "$fd") in /dev/null|pipe:*|/proc/*|'') ;; *)
  echo "holds $(readlink "$fd")";; esac; done
echo done
"""


@contextmanager
def canary(home: Path) -> Iterator[Path]:
    """A file of the host, readable by everybody there, that no sandbox may see."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp" if os.access("/var/tmp", os.W_OK) else home))
    folder.chmod(0o755)
    path = folder / "canary"
    path.write_text(secrets.token_hex(8))
    path.chmod(0o666)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        folder.rmdir()


async def check(agent: Agent, canary: Path, root: bool, own_kernel: bool = False, timeout: float = 30.0) -> None:
    """Raises SubstrateUnavailable naming every wall that is missing, or when the test itself cannot be run. A sandbox
    with a kernel of its own (gVisor) has that kernel's log, id map and device nodes, which are not the host's."""
    before = canary.read_text()
    said: list[bytes] = []
    command = ["/bin/sh", "-c", SCRIPT, "selftest", str(canary), "own" if own_kernel else "root" if root else "user"]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = agent.exec(command, lambda kind, data: said.append(data) if kind == b"O" else None, env=env).done
    try:
        await asyncio.wait_for(done, timeout)
    except TimeoutError:
        raise SubstrateUnavailable(
            "self-test", reason=f"the self-test took over {timeout} s", fix="dsec doctor"
        ) from None
    lines = b"".join(said).decode(errors="replace").splitlines()
    holes = [line for line in lines if line != "done"]
    if canary.read_text() != before:
        holes.append("changed the host's canary")
    if holes or lines[-1:] != ["done"]:
        reason = "; ".join(holes) or "the self-test did not run to its end"
        raise SubstrateUnavailable(
            f"this host is not safe to serve from: {reason}",
            reason=reason,
            fix="report it; do not run untrusted code here",
        )
