"""Counter-based seeds: randomness is a pure function of (seed, names), so a resumed run repeats a straight one."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the place named by `keys`, e.g. ``derive(run_seed, "batch", step)``."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """A numpy generator of its own for the place named by `keys`."""
    return np.random.default_rng(derive(seed, *keys))


def rng(seed: int, *keys: int | str) -> random.Random:
    """A standard-library generator of its own for the place named by `keys`."""
    return random.Random(derive(seed, *keys))
