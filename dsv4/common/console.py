"""What a person sees on stderr: a progress line with rate and ETA, or plain occasional lines when nobody watches."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Any, NoReturn, TextIO

PLAIN_SECONDS = 15.0
"""Seconds between lines when stderr is a file or a pipe."""


def fail(message: str) -> NoReturn:
    """Prints one line to stderr and ends the process with code 2 (a mistake of the user's)."""
    print(f"dsv4: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def duration(seconds: float) -> str:
    """``7 s``, ``3:07``, ``2:03:07``."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def count(value: float) -> str:
    """``950``, ``12.3k``, ``4.57M``, ``1.20G``: three digits."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


class Progress:
    """``with Progress(total, "train", "tokens") as bar: bar.update(512, loss=3.1)``.

    `total` and `update(n)` count `unit`s; `done` says how many were finished before this process (a resumed run), so
    that rate and ETA count only what is measured here. Named fields are shown at the end of the line.
    """

    def __init__(self, total: int, label: str, unit: str = "it", done: int = 0, stream: TextIO | None = None) -> None:
        self.total, self.label, self.unit, self.done, self.first = total, label, unit, done, done
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.started = time.monotonic()
        self.shown = 0.0 if self.live else self.started  # a pipe gets its first line after PLAIN_SECONDS
        self.fields: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        return self

    def rate(self) -> float:
        """Units per second since this process began."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """The current line, without terminal control."""
        rate = self.rate()
        left = duration((self.total - self.done) / rate) if rate > 0 else "?"
        part = 100 * self.done / max(self.total, 1)
        fields = "".join(f"  {k} {v:.4g}" if isinstance(v, float) else f"  {k} {v}" for k, v in self.fields.items())
        return (
            f"{self.label} {part:3.0f} %  {count(self.done)}/{count(self.total)} {self.unit}"
            f"  {count(rate)} {self.unit}/s  ETA {left}{fields}"
        )

    def update(self, n: int = 1, **fields: Any) -> None:
        """Adds `n` units; redraws at most ten times a second on a terminal, every 15 s elsewhere."""
        self.done += n
        self.fields.update(fields)
        now = time.monotonic()
        if now - self.shown >= (0.1 if self.live else PLAIN_SECONDS):
            self.shown = now
            self._show()

    def _show(self) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r" + self.line()[:width].ljust(width))
        else:
            self.stream.write(self.line() + "\n")
        self.stream.flush()

    def note(self, message: str) -> None:
        """Prints a line of its own, above the progress line."""
        cleared = "\r" + message.ljust(shutil.get_terminal_size().columns - 1)
        self.stream.write((cleared if self.live else message) + "\n")
        self.stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show()
        if self.live:
            self.stream.write("\n")
