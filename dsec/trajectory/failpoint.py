"""Crash points: `DSEC_FAILPOINT=segment.torn:3` kills this process, with SIGKILL, the third time it reaches that point.

The names are the crash points of the log (see docs/dsec_log.md); tests run every one of them in loops. Unset, a point
costs one comparison.
"""

from __future__ import annotations

import os
import signal

_name, _count = "", 0


def arm(setting: str) -> None:
    """Sets the crash point from `name` or `name:nth` (from 1); an empty setting disarms."""
    global _name, _count
    name, _, nth = setting.partition(":")
    _name, _count = name, int(nth or 1)


def reached(name: str) -> bool:
    """True when the process is to die here; for points that leave something half done before they call `die`."""
    global _count
    if name != _name:
        return False
    _count -= 1
    return _count == 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash(name: str) -> None:
    """Kills this process if `name` is the armed point and this is the nth visit."""
    if reached(name):
        die()


arm(os.environ.get("DSEC_FAILPOINT", ""))
