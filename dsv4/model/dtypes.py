"""Which tensors stay float32 whatever the model's dtype (model card B.9). The only such list.

Head, router and compressor projections are released in bf16 and multiplied in float32: they are stored in the model's
dtype and go through `kernels.linear(..., wide=True)`, whose products of bf16 values are exact.
"""

from __future__ import annotations

import re

import torch

_FLOAT32 = re.compile(
    r"(^|\.)(hc_\w+|attn_sink|ape|bias)$"
    r"|norm\.weight$"  # attn_norm, ffn_norm, q_norm, kv_norm, compressor norms, enorm, hnorm, norm
)


def is_float32(name: str) -> bool:
    """True for a parameter the release keeps in float32: norms, mHC, sinks, ape, router bias."""
    return _FLOAT32.search(name) is not None


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype tensor ``name`` has in a model of ``dtype``."""
    if name.endswith("tid2eid"):
        return torch.int64
    return torch.float32 if is_float32(name) else dtype
