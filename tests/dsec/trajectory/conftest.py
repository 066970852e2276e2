"""Thousands of fsyncs: on a memory disk where there is one. What a killed process leaves behind is the same there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dsec-test-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    yield folder
    assert not (left := files_open_below(folder)), f"never closed: {left}"
    shutil.rmtree(folder)


def files_open_below(folder: Path) -> list[str]:
    """The files below a folder that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(link))
    return [name for name in found if name.startswith(f"{folder}/")]
