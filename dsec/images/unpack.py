"""Tar files and OCI layouts from strangers, unpacked into a folder of ours. Nothing may land outside it.

A member's path is taken apart and every folder on it must be a real folder made by us: no "..", no way through a link.
Devices are left out; sizes, members and expansion are limited while reading, not after.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dsec.errors import ImageError

OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")
"""How overlayfs marks a folder that hides the one below: for root, and for user namespaces (userxattr)."""
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")


@dataclass
class Limits:
    """What an archive may hold before it is refused."""

    bytes: int = 32 << 30
    members: int = 4_000_000
    ratio: int = 200
    """Times its own size that a compressed archive may grow to (beyond the first 64 MiB)."""


Folder = tuple[Path, tarfile.TarInfo]


class _Metered:
    """Reads of a file object, counted."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count = file, 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.count += len(data)
        return data


def unpack_tar(file: IO[bytes], root: Path, limits: Limits | None = None, whiteouts: bool = False) -> int:
    """Unpacks a tar (plain, gzip, bzip2 or xz) into `root`, an empty folder; returns the bytes of its files.

    With `whiteouts`, OCI's `.wh.name` and `.wh..wh..opq` become overlayfs's own marks. ImageError for anything that is
    no honest archive: the folder is then half filled, and the caller's to throw away.
    """
    limits, source, total, members = limits or Limits(), _Metered(file), 0, 0
    folders: list[Folder] = []
    try:
        with tarfile.open(fileobj=source, mode="r|*") as archive:  # type: ignore[call-overload]
            for member in archive:
                members += 1
                total += member.size if member.isreg() else 0
                allowed = min(limits.bytes, max(64 << 20, source.count * limits.ratio))
                if members > limits.members or total > allowed:
                    raise ImageError(f"the archive holds more than {members - 1} members or {allowed} bytes: refused")
                _member(archive, member, root, folders, whiteouts)
    except (tarfile.TarError, EOFError, OSError) as problem:
        raise ImageError(f"the archive cannot be unpacked: {problem}") from problem
    for folder, _, _ in os.walk(root):
        os.utime(folder, (0, 0))  # stays for those that the archive does not list
    for path, member in reversed(folders):  # last, because filling a folder changes its time
        os.chmod(path, member.mode & 0o7777)
        os.utime(path, (member.mtime, member.mtime))
    return total


def _inside(root: Path, name: str) -> Path:
    """The place of a member. Folders on the way are made; links on the way are refused."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise ImageError(f"member {name!r} leaves the archive")
    path = root
    for part in parts[:-1]:
        path = path / part
        try:
            if not stat.S_ISDIR(path.lstat().st_mode):
                raise ImageError(f"member {name!r} goes through {path.name!r}, which is no folder")
        except FileNotFoundError:
            path.mkdir(0o755)
    return path / parts[-1] if parts else root


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, root: Path, folders: list[Folder], wh: bool) -> None:
    path = _inside(root, member.name)
    if wh and path.name == ".wh..wh..opq":
        for name in OPAQUE[: 1 if os.geteuid() == 0 else 2]:
            os.setxattr(path.parent, name, b"y")
        return
    if wh and path.name.startswith(".wh."):
        path = path.with_name(path.name.removeprefix(".wh."))
        os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        os.utime(path, (0, 0))
        return
    if path != root and (path.is_symlink() or (path.exists() and not (member.isdir() and path.is_dir()))):
        if path.is_dir() and not path.is_symlink():
            raise ImageError(f"member {member.name!r} replaces a folder")
        path.unlink()  # a later member of the same name wins
    if member.isdir():
        path.mkdir(exist_ok=True)
        folders.append((path, member))
    elif member.issym():
        os.symlink(member.linkname, path)
    elif member.islnk():
        target = _inside(root, member.linkname)
        if not stat.S_ISREG(target.lstat().st_mode):
            raise ImageError(f"member {member.name!r} links to {member.linkname!r}, which is no file")
        os.link(target, path, follow_symlinks=False)
        return
    elif member.isreg():
        _copy(archive, member, path)
    elif member.isfifo():
        os.mkfifo(path)
    else:
        return  # a device: sandboxes have their own /dev
    if os.geteuid() == 0:
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
    for key, value in member.pax_headers.items():
        if key.startswith("SCHILY.xattr.security.capability"):  # what `ping` has instead of setuid
            os.setxattr(path, "security.capability", value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
    if not member.issym():
        os.chmod(path, member.mode & 0o7777)
    os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
        if target.tell() != member.size:
            raise ImageError(f"member {member.name!r} ends after {target.tell()} of {member.size} bytes")


# OCI layouts


class OciLayout:
    """A folder with `oci-layout`, `index.json` and blobs; each blob is checked against its digest before it is used."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        if not (folder / "oci-layout").is_file():
            raise ImageError(f"{folder} is no OCI layout: it has no oci-layout file")
        self.folder, self.limits = folder, limits or Limits()

    def manifest(self, machine: str = "amd64") -> dict[str, Any]:
        """The first image for `machine` under the index; indexes may hold indexes, four deep."""
        found = self._find(json.loads((self.folder / "index.json").read_bytes()), machine, 4)
        if found is None:
            raise ImageError(f"{self.folder} holds no image for {machine}")
        return found

    def config(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Env, WorkingDir, User, Entrypoint and Cmd, as far as the image sets them."""
        return dict(self._json(manifest["config"]).get("config") or {})

    def layers(self, manifest: dict[str, Any]) -> Iterator[Path]:
        """The layers' files, lowest first, each checked."""
        for layer in manifest["layers"]:
            if layer["mediaType"].endswith("zstd"):
                raise ImageError("zstd layers are not supported; save the image with gzip layers")
            yield self._blob(layer)

    def _find(self, index: dict[str, Any], machine: str, depth: int) -> dict[str, Any] | None:
        if depth == 0:
            raise ImageError(f"{self.folder}: indexes within indexes within indexes")
        for entry in index.get("manifests", []):
            platform = entry.get("platform") or {}
            if platform.get("architecture", machine) != machine or platform.get("os", "linux") != "linux":
                continue
            value = self._json(entry)
            if entry["mediaType"] not in INDEXES:
                return value
            if found := self._find(value, machine, depth - 1):
                return found
        return None

    def _json(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["size"] > 16 << 20:
            raise ImageError(f"a manifest of {entry['size']} bytes")
        value = json.loads(self._blob(entry).read_bytes())
        assert isinstance(value, dict)
        return value

    def _blob(self, entry: dict[str, Any]) -> Path:
        kind, _, digest = str(entry["digest"]).partition(":")
        if kind != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ImageError(f"digest {entry['digest']!r} is no SHA-256")
        path = self.folder / "blobs" / "sha256" / digest
        if not path.is_file() or path.is_symlink():
            raise ImageError(f"{self.folder} lacks the blob {digest}")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest or path.stat().st_size != entry["size"]:
            raise ImageError(f"blob {digest} holds something else ({found}, {path.stat().st_size} bytes)")
        return path
