"""Which tensors stay float32 whatever the model's dtype (model card B.9). The only such list."""

from __future__ import annotations

import re

import torch

_FLOAT32 = re.compile(
    r"(^|\.)(hc_\w+|attn_sink|ape|bias|gate\.weight|head\.weight)$"
    r"|norm\.weight$"  # attn_norm, ffn_norm, q_norm, kv_norm, compressor norms, enorm, hnorm, norm
    r"|compressor\.(wkv|wgate)\.weight$"
)


def is_float32(name: str) -> bool:
    """True for a parameter the release keeps or uses in float32: norms, mHC, sinks, ape, router, compressors, head."""
    return _FLOAT32.search(name) is not None


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype tensor ``name`` has in a model of ``dtype``."""
    if name.endswith("tid2eid"):
        return torch.int64
    return torch.float32 if is_float32(name) else dtype
