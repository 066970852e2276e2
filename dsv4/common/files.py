"""Files that are complete or absent: write under a temporary name, fsync, rename.

A reader never meets half a file or half a folder, whatever kills the writer and whenever.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _clear_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"disk full while writing {path}; what was there before is untouched"
        raise OSError(error.errno, message) from error


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replaces `path` by `data` (text as UTF-8) in one step; parents are made. The old content survives any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _clear_disk_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp's 0600 would make a checkpoint unreadable to a server under another user
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `path` when the block ends well and vanishes when it does not.

    A folder already at `path` is moved aside, then removed; a kill between those two renames leaves the old one under
    ``.NAME.*.old``. All files are fsynced before the rename.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _clear_disk_errors(path):
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield fresh
            for entry in sorted(fresh.rglob("*"), reverse=True):  # children before their folders
                sync(entry)
            os.chmod(fresh, 0o755)
            sync(fresh)
            old = fresh.with_suffix(".old")
            if path.exists():
                os.rename(path, old)
            os.rename(fresh, path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
