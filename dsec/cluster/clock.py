"""Time as an interface: the machine's clock, or one that a simulator turns by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Wall time in seconds since 1970: for people and for deadlines that a user may read. It may jump."""

    def monotonic(self) -> float:
        """Seconds since some moment of this host's past. Never jumps; leases are measured by nothing else."""


class RealClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        # Counts the time that a suspended machine slept: a lease runs out meanwhile.
        return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class VirtualClock:
    """Stands still until `time` is set."""

    def __init__(self, time: float = 0.0) -> None:
        self.time = time

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time
