"""Crash points: `DSEC_FAILPOINT=segment.torn:3` kills this process, with SIGKILL, the third time it reaches that point.

The names are the crash points of the log (see docs/dsec_log.md); tests run every one of them in loops. Unset, a point
costs one comparison.
"""

from __future__ import annotations

import os
import signal

_name, _count, _signal = "", 0, signal.SIGKILL


def arm(setting: str) -> None:
    """Sets the crash point from `name`, `name:nth` (from 1) or `name:nth:STOP` (SIGSTOP); an empty setting disarms."""
    global _name, _count, _signal
    name, nth, action = (setting.split(":") + ["1", "KILL"][setting.count(":") :])[:3]
    _name, _count, _signal = name, int(nth), signal.Signals[f"SIG{action}"]


def reached(name: str) -> bool:
    """True when the process is to die here; for points that leave something half done before they call `die`."""
    global _count
    if name != _name:
        return False
    _count -= 1
    return _count == 0


def die() -> None:
    signal.raise_signal(_signal)  # to this thread: not one instruction more


def crash(name: str) -> None:
    """Kills this process if `name` is the armed point and this is the nth visit."""
    if reached(name):
        die()


arm(os.environ.get("DSEC_FAILPOINT", ""))
