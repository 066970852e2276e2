"""Outputs too long for a frame: one file each, named by its SHA-256, durable before any record names it."""

from __future__ import annotations

import hashlib
import os
import tempfile
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
        if path.exists():
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
            raise corrupt(path, 0, "the blob is missing") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise corrupt(path, 0, "the blob's SHA-256 differs from its name")
        return data
