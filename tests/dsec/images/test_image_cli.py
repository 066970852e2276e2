"""`dsec image` as a user types it; the bootstrapped images where there is a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsec.images import lowers
from dsec.images.cli import app

pytestmark = pytest.mark.usefixtures("mountable")


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_build_push_pull_list_verify_rm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, store = tmp_path / "root", str(tmp_path / "store")
    root.mkdir()
    (root / "hello").write_bytes(os.urandom(600_000))
    monkeypatch.setenv("DSEC_HOME", str(tmp_path / "one"))
    assert "base" in run("build", "mine", str(root))
    assert "workspace" in run("build", "mine/two", str(root), "--base", "mine")
    rows = [json.loads(line) for line in run("list", "--json").splitlines()]
    assert [row["name"] for row in rows] == ["mine", "mine/two"] and rows[0]["here"] == rows[0]["bytes"]
    assert "bytes sent" in run("push", "mine", "--store", store)
    monkeypatch.setenv("DSEC_HOME", str(tmp_path / "two"))
    assert "no image 'mine'" in run("pull", "mine", code=1)
    run("pull", "mine", "--store", store)
    run("verify", "mine")
    (file,) = (tmp_path / "two/images/layers").glob("*.erofs")
    data = bytearray(file.read_bytes())
    data[300_000] ^= 1
    file.write_bytes(data)
    assert "1 chunks differ" in run("verify", "mine", code=1)
    assert run("rm", "mine") == "1 layers deleted\n" and run("list") == ""
    assert "needs a SOURCE" in run("build", "other", code=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_python_from_debians_packages(tmp_path: Path) -> None:
    """Built on first use; Python, pip and make start inside. Needs a mirror of Debian."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("needs mmdebstrap (apt-get install mmdebstrap)")
    if subprocess.run(["apt-get", "-qq", "--print-uris", "download", "base-files"], capture_output=True).returncode:
        pytest.skip("needs a mirror of Debian's packages")
    import asyncio

    chroot = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin") or "chroot"
    (top,) = asyncio.run(lowers(tmp_path, "python"))
    for command in (["python", "-c", "print(6 * 7)"], ["pip", "--version"], ["make", "--version"]):
        done = subprocess.run(
            [chroot, str(top), *command], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
        )
        assert done.returncode == 0 and done.stdout, done.stderr
    assert asyncio.run(lowers(tmp_path, "python")) == [top]
