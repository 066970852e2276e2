"""Images are mounted for real: root, EROFS and FUSE, or a reason why not."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.dsec.conftest import until


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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of nanio, started for these tests."""
    if find_spec("nanio") is None:
        pytest.skip("needs an S3 server: pip install nanio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("s3")
    keys = {"NANIO_ACCESS_KEY": "tester", "NANIO_SECRET_KEY": "a-secret-of-tests"}
    command = [sys.executable, "-m", "nanio", "serve", "--port", str(port), "--data-dir", str(folder)]
    log = open(folder / "server.log", "wb")  # noqa: SIM115
    process = subprocess.Popen(command, env={**os.environ, **keys}, stdout=log, stderr=log)

    def answers() -> bool:
        assert process.poll() is None, (folder / "server.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(answers)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()
