"""Outputs too long for a frame: one file each, named by its SHA-256, durable before any record names it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Container
from pathlib import Path

from dsec.trajectory.failpoint import crash, die, reached
from dsec.trajectory.segment import NO_ROOM, LogFailed, LogFull, corrupt, sync_folder


class Blobs:
    """A folder `aa/<sha256>`. A record is written only after `put` returned, so none can name a missing blob."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest

    def put(self, data: bytes) -> str:
        """Stores `data` durably and returns its digest; LogFull or LogFailed otherwise, with nothing left behind."""
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # whoever sweeps sees that it is wanted again
            return digest
        try:
            if not path.parent.exists():
                path.parent.mkdir(exist_ok=True)
                sync_folder(self.folder)
            fd, name = tempfile.mkstemp(dir=path.parent, prefix="new.")
            try:
                with open(fd, "wb") as file:
                    if reached("blob.torn"):
                        os.write(file.fileno(), data[: len(data) // 2])
                        die()
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(name, path)
            except OSError:
                Path(name).unlink()
                raise
            sync_folder(path.parent)
        except OSError as problem:
            kind = LogFull if problem.errno in NO_ROOM else LogFailed
            raise kind(f"an output of {len(data)} bytes could not be stored: {problem}") from problem
        crash("blob.stored")
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes, checked against their name; LogCorrupt if they are missing or differ."""
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if self._back(path):
                return self.get(digest)
            raise corrupt(path, 0, "the blob is missing") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise corrupt(path, 0, "the blob's SHA-256 differs from its name")
        return data

    def sweep(self, wanted: Container[str], age: float) -> int:
        """Drops blobs that no record names and nobody has stored for `age` seconds -> bytes. A blob is renamed first:
        whoever stores it then writes it anew, and one that was stored just before is put back."""
        dropped = 0
        for path in sorted(self.folder.glob("??/*")):
            if path.name.startswith("gone."):
                self._back(path.with_name(path.name.partition(".")[2]))
            elif path.name not in wanted and path.stat().st_mtime < time.time() - age:
                gone = path.with_name(f"gone.{path.name}")
                os.rename(path, gone)
                crash("blob.gone")
                found = gone.stat()
                if found.st_mtime >= time.time() - age:
                    self._back(path)
                else:
                    gone.unlink()
                    dropped += found.st_size
        return dropped

    def _back(self, path: Path) -> bool:
        """Undoes the renaming of a sweep that was killed."""
        gone = path.with_name(f"gone.{path.name}")
        if not path.exists():
            with contextlib.suppress(FileNotFoundError):
                os.rename(gone, path)
                return True
        gone.unlink(missing_ok=True)
        return path.exists()
