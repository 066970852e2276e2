"""What keeps a file out of the corpus: poor text, copies, and anything that resembles a held-out file."""

from __future__ import annotations

import re
import zlib

import numpy as np

_WORD = re.compile(rb"\w+")
_COMMENT = re.compile(rb"(?m)^\s*(?:#|\.\. ).*$")
_GENERATED = re.compile(rb"(?i)(?:auto-?generated|do not edit|automatically generated|generated (?:by|from|with)\b)")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def poor(data: bytes) -> str | None:
    """Why this text would waste tokens (a short reason), or None when it is worth learning from."""
    if not 256 <= len(data) <= 1_000_000:
        return "size"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    if b"\0" in data:
        return "binary"
    if _GENERATED.search(data[:600]):
        return "generated"
    lines = data.split(b"\n")
    if max(map(len, lines)) > 600 or len(data) > 100 * len(lines):
        return "long lines"
    letters, digits, foreign = (len(data) - len(data.translate(None, chars)) for chars in (_LETTERS, _DIGITS, _FOREIGN))
    if foreign > 0.03 * len(data):
        return "mostly not ASCII"
    if digits > 0.12 * len(data) or letters < 0.4 * len(data):
        return "tables"
    ratio = len(zlib.compress(data, 1)) / len(data)
    if ratio > 0.62 or (ratio < 0.12 and len(data) > 4000):  # base64 and the like; endless repetition
        return "compresses strangely"
    return None


_LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))
_DIGITS = b"0123456789"
_FOREIGN = bytes(range(128, 256))


def shingles(data: bytes, doublings: int, comments: bool = True) -> np.ndarray:
    """Hashes (uint64) of every run of 2**doublings words. Punctuation, quotes and line breaks do not count, so that a
    reformatted copy still matches; with comments=False full-line comments do not count either (licence texts)."""
    words = _WORD.findall(data if comments else _COMMENT.sub(b"", data))
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    for level in range(doublings):
        span = 1 << level
        if len(hashes) <= span:
            return hashes[:0]
        hashes = (hashes[:-span] * _MULTIPLIER) ^ (hashes[span:] + (hashes[span:] >> np.uint64(29)))
    return hashes


class NearCopies:
    """Remembers a sample of the word shingles of what was kept; `share` tells how much of a new file is in there."""

    def __init__(self, doublings: int = 4, sample: int = 8) -> None:
        self.doublings, self.sample, self.seen = doublings, np.uint64(sample), set[int]()

    def _sampled(self, data: bytes) -> set[int]:
        hashes = shingles(data, self.doublings)
        return set(hashes[(hashes >> np.uint64(7)) % self.sample == 0].tolist())

    def share(self, data: bytes) -> float:
        """The fraction, 0 to 1, of the file's sampled shingles that kept files already hold."""
        own = self._sampled(data)
        return len(own & self.seen) / len(own) if own else 0.0

    def keep(self, data: bytes) -> None:
        """Remember a kept file."""
        self.seen |= self._sampled(data)


class Contamination:
    """Finds training files that copy a held-out file: at least `runs` shared runs of 32 words outside comments."""

    def __init__(self, heldout: dict[str, bytes], runs: int = 24) -> None:
        self.runs = runs
        self.owner = {int(h): path for path, data in heldout.items() for h in shingles(data, 5, comments=False)}
        self.hashes = np.array(sorted(self.owner), np.uint64)

    def copied_from(self, data: bytes) -> tuple[str, int] | None:
        """(held-out path, shared runs) when `data` copies a held-out file, else None."""
        own = np.unique(shingles(data, 5, comments=False))
        shared = own[np.isin(own, self.hashes, assume_unique=True)]
        if len(shared) < self.runs:
            return None
        return self.owner[int(shared[0])], len(shared)
