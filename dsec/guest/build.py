"""Compiles our C programs on first use: static, small, kept in the state folder under a hash of their source."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from dsec.errors import SubstrateUnavailable

_INCLUDED = re.compile(rb'^#include "([a-z_]+\.h)"', re.M)
FLAGS = ("-static", "-Os", "-Wall", "-Wextra", "-Werror", "-fstack-protector-strong", "-s")


def home() -> Path:
    """The state folder: DSEC_HOME, else /var/lib/dsec for root, else ~/.local/share/dsec. Made when missing, 0700."""
    given = os.environ.get("DSEC_HOME")
    default = Path("/var/lib/dsec") if os.geteuid() == 0 else Path.home() / ".local/share/dsec"
    folder = Path(given) if given else default
    folder.mkdir(parents=True, exist_ok=True, mode=0o711)
    return folder.resolve()


@cache
def program(source: Path, folder: Path, static: bool = True) -> Path:
    """The program made from a C file, built in `folder` unless it is there. Raises SubstrateUnavailable. One that loads
    libraries at run time is not static."""
    flags = FLAGS if static else FLAGS[1:]
    text = source.read_bytes()
    text += b"".join((source.parent / os.fsdecode(name)).read_bytes() for name in _INCLUDED.findall(text))
    target = folder / f"{source.stem}-{hashlib.sha256(text + ' '.join(flags).encode()).hexdigest()[:16]}"
    if target.exists():
        return target
    carried = source.with_suffix("")  # a wheel may carry it prebuilt
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if carried.exists() or compiler is None:
        if carried.exists():
            return carried
        raise SubstrateUnavailable(
            f"{source.name} must be compiled once and there is no C compiler",
            reason="no C compiler (cc)",
            fix="apt-get install gcc libc6-dev",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "program"
        done = subprocess.run([compiler, *flags, "-o", built, source], capture_output=True, text=True)
        if done.returncode:
            raise SubstrateUnavailable(
                f"{source.name} does not compile",
                reason=f"{compiler} failed: {done.stderr.strip()[:300]}",
                fix="apt-get install gcc libc6-dev linux-libc-dev",
            )
        built.chmod(0o755)
        os.replace(built, target)
    return target


def agent(folder: Path | None = None) -> Path:
    """The guest agent's program (see agent.c)."""
    return program(Path(__file__).with_name("agent.c"), (folder or home()) / "cache")
