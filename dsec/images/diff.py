"""From an overlay's upper folder to a layer of its own."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from dsec.errors import ImageError

OVERLAY_NOTES = ("origin", "impure", "nlink", "uuid", "protattr")
"""What overlayfs notes in an upper folder about the layers below it; wrong once the folder is a layer itself."""
LOST = ("redirect", "metacopy")
"""Notes without which the folder does not say what it holds: made only by options that we never mount with."""


def copy_upper(upper: Path, target: Path, shift: int = 0) -> None:
    """Copies an overlay's upper folder with owners, modes, times, links, whiteouts, and without overlay's own notes."""
    links: dict[tuple[int, int], Path] = {}

    def copy(source: Path, to: Path) -> None:
        info = source.lstat()
        if stat.S_ISDIR(info.st_mode):
            to.mkdir()
            for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
                copy(Path(entry.path), to / entry.name)
        elif (known := links.get((info.st_dev, info.st_ino))) is not None:
            os.link(known, to, follow_symlinks=False)
            return
        elif stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(source), to)
        elif stat.S_ISREG(info.st_mode):
            shutil.copyfile(source, to, follow_symlinks=False)
        elif stat.S_ISFIFO(info.st_mode) or (stat.S_ISCHR(info.st_mode) and info.st_rdev == 0):
            os.mknod(to, info.st_mode, 0)
        else:
            return  # sockets and devices are nothing to keep
        if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
            links[info.st_dev, info.st_ino] = to
        if os.geteuid() == 0:
            os.chown(to, max(info.st_uid - shift, 0), max(info.st_gid - shift, 0), follow_symlinks=False)
        for name in os.listxattr(source, follow_symlinks=False):
            note = name.rpartition("overlay.")[2] if "overlay." in name else ""
            if note in LOST:
                raise ImageError(f"{source} depends on the layers below it (overlay's {note})")
            if note not in OVERLAY_NOTES:
                os.setxattr(to, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
        if not stat.S_ISLNK(info.st_mode):
            os.chmod(to, stat.S_IMODE(info.st_mode))
        os.utime(to, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)

    copy(upper, target)
