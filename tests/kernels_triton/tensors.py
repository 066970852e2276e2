"""What the tests of the Triton kernels share: the device they run on, their numbers and their bounds."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
few, fewer = settings(max_examples=6), settings(max_examples=3)  # the interpreter is slow


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def near(result: Tensor, wanted: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Within 1e-6 of the largest float64 value, or so many roundings of it to bf16."""
    bound = 2e-6 if dtype == torch.float32 else roundings * 2**-8
    error = (result.double() - wanted).abs().max()
    assert error <= bound * wanted.abs().max().clamp(min=1), (error, wanted.abs().max())
