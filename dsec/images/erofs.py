"""EROFS files: packed by mkfs.erofs, mounted by the kernel straight from the file (no loop device).

Only files that we packed are ever mounted: a tenant's own file-system image would be parsed by the kernel.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import uuid
from pathlib import Path

from dsec.errors import ImageError, SubstrateUnavailable

MAGIC, MAGIC_OFFSET = 0xE0F5E1E2, 1024
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def pack(root: Path, target: Path, compress: str | None = None) -> int:
    """Packs a folder into `target` (complete or absent) and returns its bytes. `compress`: "lz4" or "lz4hc".

    Owners, modes, times, device numbers (overlay's whiteouts are 0:0) and extended attributes are kept; the same folder
    gives the same bytes.
    """
    program = shutil.which("mkfs.erofs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise SubstrateUnavailable(
            "mkfs.erofs is missing", reason="images are packed into EROFS", fix="apt-get install erofs-utils"
        )
    new = target.with_suffix(".new")
    options = ["-U", str(uuid.UUID(int=0)), *([f"-z{compress}"] if compress else [])]
    command = [program, "--quiet", *options, str(new), str(root)]
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": str(2**32 - 1),
    }  # when it was built; later files would be cut to it
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    size = new.stat().st_size if new.exists() else 0
    # An unknown compression leaves an empty file behind, some versions with exit code 0.
    if done.returncode or not is_erofs(new):
        new.unlink(missing_ok=True)
        raise ImageError(f"mkfs.erofs failed on {root} (exit {done.returncode}, {size} bytes): {done.stderr[-400:]}")
    with open(new, "rb+") as file:
        os.fsync(file.fileno())
    os.rename(new, target)
    return size


def is_erofs(path: Path) -> bool:
    """True if the file has an EROFS superblock."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        file.seek(MAGIC_OFFSET)
        return file.read(4) == MAGIC.to_bytes(4, "little")


def mount(source: Path, target: Path, kind: str = "erofs", options: str = "") -> None:
    """mount(2), read-only, no devices, no setuid. OSError names both paths."""
    call(_libc.mount, bytes(source), bytes(target), kind.encode(), MS_RDONLY | MS_NODEV | MS_NOSUID, options.encode())


def unmount(target: Path) -> None:
    """umount2(2), at once and lazily: whoever still has files open keeps them."""
    call(_libc.umount2, bytes(target), MNT_DETACH)


def call(function: object, *arguments: object) -> None:
    ctypes.set_errno(0)
    if function(*arguments) != 0:  # type: ignore[operator]
        number = ctypes.get_errno()
        names = " ".join(os.fsdecode(argument) for argument in arguments if isinstance(argument, bytes))
        raise OSError(number, f"{os.strerror(number)}: {names}")


def extract(image: Path, target: Path) -> None:
    """Unpacks an EROFS file into a folder that is made, for users who may not mount; modes are kept."""
    program = shutil.which("fsck.erofs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "fsck.erofs"
    command = [program, f"--extract={target}", "--preserve-perms", str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ImageError(f"fsck.erofs could not unpack {image}: {done.stderr[-400:]}")
