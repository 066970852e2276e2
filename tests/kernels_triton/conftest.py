"""Triton decides at its import whether it compiles kernels or interprets them: without a CUDA device it interprets."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
