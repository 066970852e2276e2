"""The images that are built on first use: `debian` and `python`, from Debian's packages by mmdebstrap."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from dsec.errors import ImageError, SubstrateUnavailable

if TYPE_CHECKING:
    from dsec.images.layers import Images, Say

PACKAGES = {
    "debian": ("ca-certificates",),
    "python": ("python3", "python3-venv", "python3-pip", "python-is-python3", "git", "ca-certificates", "make"),
}
SUITE = "bookworm"
DROP = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/var/cache/apt/*", "/var/lib/apt/lists/*")
"""Left out of the image: a sandbox reads none of it."""


def say_on_stderr(line: str) -> None:
    print(f"dsec: {line}", file=sys.stderr, flush=True)


def ensure(images: Images, name: str, say: Say = say_on_stderr) -> None:
    """Builds `debian` or `python` unless it is here or in the store; any other name is left alone.

    Takes a minute or two and the network, once a host (once a cluster with a store). SubstrateUnavailable says what to
    install.
    """
    if name not in PACKAGES or name in images.names():
        return
    if images.url and images.store.has(f"images/{name}.json"):
        return
    with open(images.folder / "locks" / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if name not in images.names():
            build(images, name, say)


def build(images: Images, name: str, say: Say = say_on_stderr) -> None:
    """Bootstraps the packages into a folder and packs it."""
    program = shutil.which("mmdebstrap")
    if program is None:
        raise SubstrateUnavailable(
            "mmdebstrap is missing", reason=f"image {name!r} is built from packages", fix="apt-get install mmdebstrap"
        )
    with tempfile.TemporaryDirectory(prefix="build-", dir=images.folder) as scratch:
        root = Path(scratch) / "root"
        command = [program, "--variant=minbase", f"--include={','.join(PACKAGES[name])}"]
        command += [] if os.geteuid() == 0 else ["--mode=unshare"]
        command += [f"--dpkgopt=path-exclude={pattern}" for pattern in DROP[:3]]
        command += [f"--customize-hook=rm -rf $1{pattern}" for pattern in DROP[3:]]
        command += [SUITE, str(root), *_sources()]
        say(f"building image {name!r} from Debian's packages, once: a minute or two")
        tail: deque[str] = deque(maxlen=8)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                tail.append(line.strip())
                if line.startswith("I: "):
                    say(line[3:].strip())
        if process.returncode:
            raise ImageError(f"mmdebstrap failed for {name!r}: {' | '.join(tail)}")
        config = {"env": {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}}
        image = images.add(name, root, config=config)
        say(f"image {name!r}: {image.layers[0][2] >> 20} MiB")


def _sources() -> list[str]:
    """The host's own package sources where it runs the same suite, so that its mirror is used."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    return [str(sources)] if sources.exists() and SUITE in sources.read_text() else []
