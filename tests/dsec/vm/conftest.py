"""One template for all tests of virtual machines; skipped, with what to install, where none can boot."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm_bench import Bench

from dsec.errors import SubstrateUnavailable
from dsec.guest import build
from dsec.substrates import linux, qemu
from dsec.substrates.microvm import MicroVMSubstrate, VirtualMachine


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a kernel in it: the installed one, the one an earlier run kept, or a fresh download."""
    if shutil.which(qemu.BINARY) is None:
        pytest.skip(f"no QEMU: {qemu.FIX}")
    os.environ["DSEC_ACCEL"] = "tcg"  # what every machine has; KVM is chosen by `dsec doctor`'s boot, not here
    folder = tmp_path_factory.mktemp("dsec", numbered=True)
    folder.chmod(0o711)
    kept = build.home() / "vm/kernel"
    kept.mkdir(parents=True, exist_ok=True)
    try:
        linux.kernel(build.home())
        (folder / "vm").mkdir()
        (folder / "vm/kernel").symlink_to(kept)
        linux.initrd(folder, linux.kernel(folder))
    except SubstrateUnavailable as error:
        pytest.skip(f"{error.reason}: {error.fix}")
    return folder


@pytest.fixture(scope="session")
def bench(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(MicroVMSubstrate(home), tmp_path_factory.mktemp("machines"))
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def machine(bench: Bench) -> VirtualMachine:
    """A machine for tests that leave it as it was."""
    return bench.run(bench.create())
