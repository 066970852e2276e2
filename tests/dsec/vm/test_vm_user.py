"""A machine, its snapshot and its fork when all is an ordinary user's: no id of its own, no cgroup, no mounts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsec
from tests.dsec.conftest import ORDINARY

SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from dsec.substrates.microvm import MicroVMSubstrate
from dsec.types import Spec
top, spec = Path(sys.argv[1]), Spec(substrate="microvm", memory=128, disk=32)
async def machine(substrate, name, snapshot=None):
    (top / name).mkdir(mode=0o700)
    return await substrate.create(name, spec, top / name, snapshot)
async def run(machine, *words):
    said = []
    done = await machine.agent.exec(list(words), lambda kind, data: said.append(data.decode())).done
    return done.code, "".join(said)
async def main():
    substrate = MicroVMSubstrate(top / "home")
    first = await machine(substrate, "first")
    print(await run(first, "echo", "hello"))
    pid = first.machine.pid
    print(sorted(os.listdir(f"/proc/{pid}/root/proc")) == sorted([str(pid), "self"]), os.stat(f"/proc/{pid}").st_uid)
    await run(first, "touch", "/tmp/mark")
    await first.snapshot(top / "snapshot")
    fork = await machine(substrate, "fork", top / "snapshot")
    print(await run(fork, "ls", "/tmp"))
    for each in (first, fork):
        await each.destroy()
    await substrate.close()
asyncio.run(main())
"""


@pytest.fixture
def place(home: Path) -> Iterator[tuple[Path, str]]:
    """A folder of the ordinary user's with a copy of the package and the kernel, and the interpreter it can reach."""
    folder = Path(tempfile.mkdtemp(prefix="dsec-", dir="/tmp"))
    python = sys.executable
    if os.geteuid() == 0:
        python = "/usr/bin/python3"
        if not Path(python).exists():
            pytest.skip("an ordinary user needs an interpreter it can reach: apt-get install python3")
    shutil.copytree(Path(dsec.__file__).parent, folder / "src/dsec")
    for found in Path(sysconfig.get_path("platlib")).glob("google_crc32c*"):
        shutil.copytree(found, folder / "src" / found.name)
    shutil.copytree((home / "vm/kernel").resolve(), folder / "home/vm/kernel")
    (folder / "script.py").write_text(SCRIPT)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, ORDINARY if os.geteuid() == 0 else -1, -1, follow_symlinks=False)
    folder.chmod(0o755)
    yield folder, python
    shutil.rmtree(folder, ignore_errors=True)


def test_a_machine_of_an_ordinary_user(place: tuple[Path, str]) -> None:
    folder, python = place
    settings = {"PYTHONPATH": str(folder / "src"), "HOME": str(folder), "DSEC_ACCEL": "tcg", "PATH": os.defpath}
    ordinary = {"user": ORDINARY, "group": ORDINARY, "extra_groups": []} if os.geteuid() == 0 else {}
    command = [python, str(folder / "script.py"), str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        env=settings,
        cwd=folder,
        **ordinary,  # type: ignore[call-overload]
    )
    if "confine: namespaces" in done.stderr:
        pytest.skip("this kernel gives an ordinary user no namespaces")
    uid = ORDINARY if os.geteuid() == 0 else os.geteuid()
    assert done.stdout.splitlines() == ["(0, 'hello\\n')", f"True {uid}", "(0, 'mark\\n')"], done.stderr[-2000:]
