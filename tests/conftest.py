"""Shared by all tests: one thread a worker, the repository's root, reproducible property tests."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported: OpenMP reads these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton decides at its import, which is also transformers', whether it compiles kernels or interprets them on the CPU.
CUDA = Path("/dev/nvidiactl").exists() and not version("torch").endswith("+cpu")
os.environ.setdefault("TRITON_INTERPRET", "0" if CUDA else "1")

# The same examples on every machine, and no deadline: a loaded machine is not a defect.
settings.register_profile("repository", deadline=None, derandomize=True)
settings.load_profile("repository")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parents[1]
