"""A container on an image that this host does not have: its first command runs while almost all of it is elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsec.images.layers import Images
from tests.dsec.conftest import until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("mountable")]


def root_of(folder: Path, *programs: str) -> Path:
    """A root folder with some of the host's programs, the libraries they need, and 32 MiB that nothing needs."""
    for name in ("dev", "proc", "tmp", "root", "etc", "usr/bin", "data"):
        (folder / name).mkdir(parents=True)
    os.symlink("usr/bin", folder / "bin")
    files = {str(shutil.which(program)) for program in programs}
    for program in list(files):
        files |= set(re.findall(r"(/\S+)", subprocess.run(["ldd", program], capture_output=True, text=True).stdout))
    for file in files:
        target = folder / (f"usr/bin/{Path(file).name}" if Path(file).name in programs else file.lstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for i in range(32):
        (folder / f"data/{i}").write_bytes(os.urandom(1 << 20))
    return folder


def after(file: Path, number: int) -> int:
    """Waits until the file has been replaced by another one; returns its inode."""
    until(lambda: file.exists() and file.stat().st_ino != number)
    return file.stat().st_ino


def test_its_first_command_fetches_a_quarter_at_most(
    make_host: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = root_of(tmp_path / "root", "sh", "cat", "head", "sha256sum")
    here = Images(tmp_path / "here", str(tmp_path / "store"))
    image = here.add("tiny", root)
    here.push("tiny")
    monkeypatch.setenv("DSEC_STORE", str(tmp_path / "store"))
    host = make_host("root")
    box = host.create(image="tiny", substrate="container")
    try:
        assert box.commands.run("echo started; cat /proc/mounts | head -n 1").stdout.startswith("started\n")
        (folder,) = (host.home / "images" / "lazy").iterdir()
        first = after(folder / "status", 0)
        after(folder / "status", first)  # written after the command had ended
        status = json.loads((folder / "status").read_text())
        assert folder.name == image.layers[0][1] and 0 < status["fetched"] <= 0.25 * status["size"], status
        sums = box.commands.run("sha256sum /data/7 /data/31; echo new > /data/7; cat /data/7").stdout.split()
        wanted = subprocess.run(["sha256sum", root / "data/7", root / "data/31"], capture_output=True, text=True).stdout
        assert [sums[0], sums[2], sums[4]] == [wanted.split()[0], wanted.split()[2], "new"]
    finally:
        box.kill()
        Images(host.home).unmount("tiny")
