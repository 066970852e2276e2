"""The released files, tensor by tensor: published counts and byte totals."""

from __future__ import annotations

from collections import Counter

import pytest

from dsv4.checkpoint import inventory
from dsv4.config import Config


@pytest.mark.parametrize(
    "name, count, trunk, size, gigabytes",
    [
        (
            "flash", 69_187, 67_612, 159_609_485_896,
            {"I8": 141.73, "F8_E8M0": 8.86, "F8_E4M3": 6.02, "BF16": 2.83, "F32": 0.145, "I64": 0.019},
        ),
        (
            "pro", 145_116, 142_773, 864_704_792_696,
            {"I8": 786.38, "F8_E8M0": 49.15, "F8_E4M3": 23.17, "BF16": 5.63, "F32": 0.351, "I64": 0.019},
        ),
    ],
)  # fmt: skip
def test_published_totals(name: str, count: int, trunk: int, size: int, gigabytes: dict[str, float]) -> None:
    specs = inventory(Config.preset(name))
    assert len(specs) == len({spec.name for spec in specs}) == count
    assert sum(not spec.name.startswith("mtp.") for spec in specs) == trunk
    assert sum(spec.nbytes for spec in specs) == size
    by_dtype: Counter[str] = Counter()
    for spec in specs:
        by_dtype[spec.dtype] += spec.nbytes
    assert {dtype: round(total / 1e9, 3 if total < 1e9 else 2) for dtype, total in by_dtype.items()} == gigabytes


@pytest.mark.parametrize("name, gigabytes", [("flash-base", 292.56), ("pro-base", 1602.3)])
def test_base_variants(name: str, gigabytes: float) -> None:
    specs = inventory(Config.preset(name))
    assert sum(spec.nbytes for spec in specs) / 1e9 == pytest.approx(gigabytes, rel=5e-5)
    assert len(specs) == len(inventory(Config.preset(name.removesuffix("-base"))))
    assert {spec.dtype for spec in specs if spec.name.endswith(".scale")} == {"F32"}


def test_known_tensors() -> None:
    specs = {spec.name: spec for spec in inventory(Config.preset("flash"))}
    assert specs["layers.0.ffn.experts.0.w1.weight"].shape == (2048, 2048)
    assert specs["layers.0.ffn.experts.0.w1.weight"].dtype == "I8"
    assert specs["layers.0.ffn.experts.0.w1.scale"].shape == (2048, 128)
    assert specs["layers.0.attn.wq_a.scale"].shape == (8, 32)
    assert specs["layers.0.attn.wo_a.weight"].shape == (8192, 4096)
    assert specs["layers.2.attn.indexer.compressor.wkv.weight"].shape == (256, 4096)
    assert "layers.3.ffn.gate.tid2eid" not in specs and "layers.2.ffn.gate.bias" not in specs


def test_unquantised() -> None:
    specs = inventory(Config.preset("nano"))
    assert {spec.dtype for spec in specs} == {"BF16", "F32", "I64"}
    assert not [spec.name for spec in specs if spec.name.endswith(".scale")]
