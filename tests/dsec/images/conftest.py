"""Images are mounted for real: root, EROFS and FUSE, or a reason why not."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def missing() -> str:
    """Why images cannot be mounted here; empty if they can."""
    if os.geteuid() != 0:
        return "mounting images needs root"
    if shutil.which("mkfs.erofs") is None:
        return "needs mkfs.erofs (apt-get install erofs-utils)"
    if modprobe := shutil.which("modprobe"):
        subprocess.run([modprobe, "-q", "erofs"], check=False)
    if "erofs" not in Path("/proc/filesystems").read_text():
        return "this kernel has no EROFS"
    if not Path("/dev/fuse").exists():
        return "needs /dev/fuse"
    return ""


@pytest.fixture(autouse=True)
def unmounted(tmp_path: Path) -> Iterator[None]:
    """Whatever a test mounted under its folder goes away with it."""
    yield
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        if (target := line.split()[1]).startswith(str(tmp_path)):
            subprocess.run(["umount", "-l", target], check=False)


@pytest.fixture
def mountable() -> None:
    if reason := missing():
        pytest.skip(reason)
