"""The published counts, to the unit, and the curves of report Fig. 1."""

from __future__ import annotations

import pytest

from dsv4.config import Config
from dsv4.model import costs

FLASH, PRO = Config.preset("flash"), Config.preset("pro")
MILLION = 1 << 20

COMPONENTS = {
    "routed experts": (277_025_390_592, 1_547_396_186_112),
    "attention": (4_599_123_136, 18_293_589_632),
    "shared experts": (1_082_130_432, 4_029_677_568),
    "embedding": (529_530_880, 926_679_040),
    "head": (529_530_880, 926_679_040),
    "indexer": (225_730_176, 501_384_960),
    "CSA compressors": (176_257_536, 440_540_160),
    "HCA compressors": (85_207_040, 229_588_480),
    "router": (45_088_768, 167_903_232),
    "mHC": (33_884_439, 84_069_603),
    "norms": (356_352, 881_664),
}


@pytest.mark.parametrize("column, config", [(0, FLASH), (1, PRO)], ids=["flash", "pro"])
def test_components_are_the_published_ones(column: int, config: Config) -> None:
    counted = costs.parameters(config).components
    wanted = {name: row[column] for name, row in COMPONENTS.items()}
    assert {name: total for name, (total, _) in counted.items()} == wanted


def test_totals() -> None:
    flash, pro = costs.parameters(FLASH), costs.parameters(PRO)
    assert (flash.total, pro.total) == (284_332_230_231, 1_572_997_179_491)
    assert (flash.active, pro.active) == (13_270_091_351, 48_852_379_747)
    assert (flash.buffers, pro.buffers) == (2_337_280, 2_349_312)
    assert (flash.mtp, pro.mtp) == ((6_610_048_891, 318_592_891), (25_840_145_979, 869_357_115))
    embedding, head = flash.components["embedding"][1], flash.components["head"][1]
    assert flash.active + embedding == 13_799_622_231
    assert flash.active - head == 12_740_560_471


@pytest.mark.parametrize(
    "config, layers",
    [
        (FLASH, {3: 6_580_676_726, 4: 6_595_558_646}),
        (PRO, {3: 25_744_655_030, 4: 25_768_646_454}),
    ],
    ids=["flash", "pro"],
)
def test_one_layer(config: Config, layers: dict[int, int]) -> None:
    for index, wanted in layers.items():
        parts = [t for t in costs.tensors(config) if t.name.startswith(f"layers.{index}.") and t.component != "buffers"]
        assert sum(part.numel for part in parts) == wanted


@pytest.mark.parametrize(
    "context, flops, kv",
    [
        (4096, (81, 22), (12.8, 8.9)),
        (32768, (71, 20), (10.8, 7.5)),
        (131072, (53, 16), (10.5, 7.4)),
        (MILLION, (26.7, 10.1), (10.5, 7.3)),
    ],
)
def test_ratios_to_v32(context: int, flops: tuple[float, float], kv: tuple[float, float]) -> None:
    for config, flop_percent, kv_percent in zip((PRO, FLASH), flops, kv, strict=True):
        record = costs.estimate(config, context, "")
        digits = 1 if context == MILLION else 0
        assert round(100 * record["flops_ratio_v32"], digits) == flop_percent
        assert round(100 * record["kv_ratio_v32"], 1) == kv_percent


def test_flops_at_a_million() -> None:
    """In GFLOP; attention is bf16 (price 2), V4's indexer FP4 (price one half)."""
    rows = [costs.V32.flops_per_token(MILLION), *(costs.flops_per_token(config, MILLION) for config in (PRO, FLASH))]
    assert [round(row.linear / 1e9, 1) for row in rows] == [77.1, 101.6, 28.4]
    assert [round(row.attention / 2e9, 1) for row in rows] == [34.8, 76.7, 23.6]
    assert [round(row.indexer / 1e9 * price) for row, price in zip(rows, (1, 2, 2), strict=True)] == [1048, 129, 90]
    assert [round(row.total / 1e9, 1) for row in rows] == [1194.6, 319.4, 120.7]


def test_cache_bytes() -> None:
    assert costs.kv_row_bytes(FLASH) == (584, 68)
    assert costs.kv_bytes(PRO, MILLION) == 61 * 74752 + 30 * 652 * (MILLION // 4) + 31 * 584 * (MILLION // 128)
    assert costs.V32.kv_bytes(1) == 61 * 788
    # Per sequence, before the first token: rings only. The fourth token completes the first CSA entry.
    assert costs.kv_bytes(FLASH, 3) == 43 * 74752
    assert costs.kv_bytes(FLASH, 4) == 43 * 74752 + 21 * 652
    assert costs.state_bytes(FLASH) == 21 * 81920 + 20 * 524288
    assert costs.state_bytes(PRO) == 30 * 81920 + 31 * 524288


def test_short_context_counts_only_what_is_there() -> None:
    one = costs.flops_per_token(FLASH, 1)
    assert one.attention == 2 * 4 * 64 * 512 * 43
    assert one.indexer == 0


@pytest.mark.parametrize("preset", ["micro", "nano", "flash"])
def test_counts_are_those_of_the_network(preset: str) -> None:
    """Name by name against the modules themselves (on the meta device: no memory), experts split as on disk."""
    from dsv4.model import Transformer

    config = Config.preset(preset)
    model = Transformer(config, device="meta")
    count = costs.parameters(config)
    trunk = [p.numel() for name, p in model.named_parameters() if not name.startswith("mtp.")]
    mtp = [t.numel() for name, t in model.state_dict().items() if name.startswith("mtp.")]
    buffers = [b.numel() for name, b in model.named_buffers() if not name.startswith("mtp.")]
    assert (sum(trunk), sum(mtp), sum(buffers)) == (count.total, count.mtp[0], count.buffers)
    stacked: dict[str, tuple[int, ...]] = {}
    for tensor in costs.tensors(config):
        if ".experts." in tensor.name:
            head, _, tail = tensor.name.partition(".experts.")
            name = f"{head}.experts.{tail.split('.')[1]}"
            stacked[name] = (stacked.get(name, (0,))[0] + 1, *tensor.shape)
        else:
            stacked[tensor.name] = tensor.shape
    assert stacked == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_context_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        costs.estimate(FLASH, 0, "flash")
