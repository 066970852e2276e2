"""Number formats of the release: FP8 E4M3 and MXFP4 in scaled blocks, cache rows, the lossless recast, training."""

from __future__ import annotations

from dsv4.numerics.blocks import dequantise, quantise, rounded, scale_values
from dsv4.numerics.formats import ACTIVATION, FP4, FP8, FP8_BASE, INDEX_ROW, KV_ROW, RELEASES, STORED, Format
from dsv4.numerics.packed import Packed, Stack, packed_experts, packed_linear
from dsv4.numerics.recast import Recast, recast
from dsv4.numerics.rows import hadamard, index_row, kv_row, pack_index, pack_kv, unpack_index, unpack_kv
from dsv4.numerics.training import (
    deployed_weight,
    fp4_values,
    quantisation_aware,
    straight_through,
    trained_index_row,
    trained_weight,
)

__all__ = [
    "ACTIVATION",
    "FP4",
    "FP8",
    "FP8_BASE",
    "INDEX_ROW",
    "KV_ROW",
    "RELEASES",
    "STORED",
    "Format",
    "Packed",
    "Recast",
    "Stack",
    "deployed_weight",
    "dequantise",
    "fp4_values",
    "hadamard",
    "index_row",
    "kv_row",
    "pack_index",
    "pack_kv",
    "packed_experts",
    "packed_linear",
    "quantisation_aware",
    "quantise",
    "recast",
    "rounded",
    "scale_values",
    "straight_through",
    "trained_index_row",
    "trained_weight",
    "unpack_index",
    "unpack_kv",
]
