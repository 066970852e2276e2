"""OCI runtimes in bubblewrap's place: runc, crun, and gVisor's runsc, whose sandboxes have a kernel of their own.

A runtime is started by the same launcher, at the same place of the same order (launch/launch.c): it is root of nothing
but the sandbox's own id range, in the sandbox's cgroup, on the sandbox's overlay. So no runtime is trusted with the
host, and none is asked to make cgroups, id maps or filters: the agent puts the system call filter on itself before it
runs anything.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsec.errors import SubstrateUnavailable


@dataclass(frozen=True)
class Runtime:
    """How one is called and what it costs beside the sandbox itself."""

    options: tuple[str, ...] = ()
    isolation: int = 2
    memory: int = 32
    """MiB."""
    pids: int = 32
    """Processes and threads; Go programs start a dozen."""
    nested: bool = False
    """Needs a user namespace of its own below ours."""
    tty: bool = True
    """Has terminals. gVisor's of 2022 cannot unlock one."""
    serial: bool = False
    """Passes no descriptors on: the agent speaks on its standard input, with relay.c before it."""


RUNTIMES = {
    "runc": Runtime(),
    "crun": Runtime(memory=8, pids=8),
    "runsc": Runtime(
        ("--network=none", "--ignore-cgroups", "--platform=ptrace", "--file-access=shared"),
        isolation=3, memory=96, pids=96, nested=True, tty=False, serial=True,
    ),
}  # fmt: skip
_READ_ONLY = ["/proc/sys", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger"]


def find(name: str, root: bool) -> str:
    """The runtime's program. Raises SubstrateUnavailable with what to do."""
    if not root:  # without cgroups nothing ends what a runtime leaves behind
        text = f"{name} needs an Edge that runs as root"
        raise SubstrateUnavailable(text, reason=text, fix='start the Edge as root, or runtime="" (bubblewrap)')
    program = shutil.which(name)
    if program is None:
        reason = f"{name} is not installed"
        raise SubstrateUnavailable(reason, reason=reason, fix=f"apt-get install {name}")
    return program


def command(name: str, root: bool, folder: Path, mounts: list[str], masked: list[str], caps: list[str]) -> list[str]:
    """The launcher's further options and, after "--", the runtime's command line. Writes the bundle's config.json into
    `folder`. `mounts` are bubblewrap's: --ro-bind, source, target."""
    runtime, program = RUNTIMES[name], find(name, root)
    (folder / "config.json").write_text(json.dumps(config(runtime, mounts, masked, caps)))
    run = [program, "--root", "/run/state", *runtime.options, "run", "--bundle", "/run"]
    if runtime.serial:
        run = ["/mnt/.dsec/relay", "3", *run]
    else:
        run += ["--preserve-fds", "1"]
    return [
        "--oci",
        str(folder / "config.json"),
        *(["--nested", "1"] if runtime.nested else []),
        "--",
        *run,
        folder.name,
    ]


def config(runtime: Runtime, mounts: list[str], masked: list[str], caps: list[str]) -> dict[str, Any]:
    """The bundle: OCI runtime specification 1.0."""

    def tmpfs(target: str, *options: str) -> dict[str, Any]:
        return {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", *options]}

    agent = ["/.dsec/agent", *(["--device", "-"] if runtime.serial else ["--listen", "3"]), "--drop"]
    agent += ["--wall", "/", "--filter", "/.dsec/seccomp.bpf"]
    inside: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]},
        tmpfs("/dev", "noexec", "mode=755", "size=1m"),
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
        tmpfs("/dev/shm", "nodev", "noexec", "mode=1777", "size=64m"),
    ]  # fmt: skip
    for source, target in zip(mounts[1::3], mounts[2::3], strict=True):
        options = ["rbind", "ro", "nosuid", "nodev"]
        inside.append({"destination": target, "type": "bind", "source": source, "options": options})
    spaces = ["pid", "network", "ipc", "uts", "mount"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False, "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": agent, "noNewPrivileges": True,
            "env": ["HOME=/root"], "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), caps),
        },
        "root": {"path": "/mnt"},
        "hostname": "sandbox",
        "mounts": inside,
        "linux": {
            "namespaces": [{"type": space} for space in spaces],
            "maskedPaths": masked, "readonlyPaths": _READ_ONLY,
        },
    }  # fmt: skip
