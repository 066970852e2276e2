"""Cache rows, the router, a compressor's projection and the choice of a token, in Triton, each against its
specification: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import kernels, numerics
from dsv4.kernels import reference
from dsv4.kernels import triton as ours
from tests.kernels_triton.tensors import DEVICE, DTYPES, few, near, normal

pytest.importorskip("triton", reason="triton is not installed (script/setup dev installs it on Linux x86-64)")

INFINITE = float("inf")


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@few
@given(st.integers(1, 40), st.sampled_from([(64, 64), (192, 64), (224, 16), (512, 64)]), DTYPES, st.integers(-12, 12))
def test_rows_of_a_cache(rows: int, shape: tuple[int, int], dtype: torch.dtype, size: int) -> None:
    """To the bit, ties and the sign of zero included; values around every step of either format."""
    d, rope = shape
    x = normal(rows, d) * torch.logspace(-3, 3, rows, device=DEVICE)[:, None] * 2.0**size
    steps = torch.arange(32, device=DEVICE)
    x[0, :32] = (steps - 16) * 0.25  # ties of E2M1, of E4M3 below
    x[-1, 32:64] = (steps + 0.5) * 2.0**-9 * (1 + steps % 3)
    x[-1, 0], x[0, 5], x[0, 6] = 448, -0.0, -1e-20
    x = x.to(dtype)
    assert torch.equal(bits(ours.rows.kv_row(x, rope)), bits(numerics.kv_row(x, rope)))
    if not d & (d - 1):
        turned = numerics.hadamard(x)  # its own inverse: rows that become ties again
        for y in (x, turned, x * 0):
            assert torch.equal(bits(ours.rows.index_row(y)), bits(numerics.index_row(y)))


@pytest.mark.parametrize("largest", [6.0, 6.001, 448.0, 448.5, 2.0**-120, 1e-6, 2.0**100])
def test_a_block_under_every_kind_of_scale(largest: float) -> None:
    """Maxima at both sides of a scale's step, below the floor of KV rows, and near the ends of float32; and a block
    whose largest channels stay as they are and have no part in its scale."""
    x = (torch.arange(-64, 64) / 64 * largest)[None].to(DEVICE)
    y = torch.cat((x[:, :80], x[:, 80:] * 4096), 1)
    for row, rope in ((x, 0), (y, 48)):
        assert torch.equal(bits(ours.rows.kv_row(row, rope)), bits(numerics.kv_row(row, rope)))
    assert torch.equal(bits(ours.rows.index_row(x)), bits(numerics.index_row(x)))


@few
@given(st.integers(1, 20), st.sampled_from([1, 3, 40, 256, 384]), st.integers(1, 8), st.booleans())
def test_routing(rows: int, experts: int, k: int, ties: bool) -> None:
    """With a bias and with experts given by the token; whole numbers give ties, and so do affinities of 0."""
    k, logits = min(k, experts), normal(rows, experts) * 6
    logits[0, ::2], logits[0, 1::4], logits[-1, 0] = -INFINITE, -33.7, 800  # exp(800) is infinite
    logits, bias = (logits.round(), torch.zeros(experts)) if ties else (logits, normal(experts, seed=1))
    given_ = torch.rand(rows, experts, generator=torch.Generator().manual_seed(k)).argsort(1)[:, :k].to(DEVICE)
    for fixed in (None, given_):
        found = ours.route.route(logits, None if fixed is not None else bias.to(DEVICE), fixed, k, 1.5)
        wanted = reference.route(logits, bias.to(DEVICE) if fixed is None else None, fixed, k, 1.5)
        assert found[0].dtype == torch.int64 and torch.equal(found[0], wanted[0])
        # Weights that sum to 0 are no numbers, in both. Affinities may differ in the last bit of float32.
        assert torch.allclose(found[1], wanted[1], rtol=1e-6, atol=0, equal_nan=True)
        assert torch.allclose(found[2], wanted[2], rtol=2**-23, atol=0)


def test_no_expert_is_chosen_twice() -> None:
    """Where nothing but banned experts is left, the lowest numbers follow."""
    bias = torch.full((5,), -INFINITE, device=DEVICE)
    bias[3] = 0
    logits = torch.zeros(2, 5, device=DEVICE)
    chosen = ours.route.route(logits, bias, None, 4, 1.0)[0]
    assert chosen.tolist() == reference.route(logits, bias, None, 4, 1.0)[0].tolist() == [[3, 0, 1, 2]] * 2


@few
@given(st.integers(1, 80), st.sampled_from([1, 2]), st.sampled_from([1, 24, 40]), DTYPES)
def test_projection_of_a_compressor(tokens: int, halves: int, dim: int, dtype: torch.dtype) -> None:
    x, values, gates = (
        normal(*s, seed=i, dtype=dtype) for i, s in enumerate([(2, tokens, 70), *[(halves * dim, 70)] * 2])
    )
    ape, position = normal(4, halves * dim, seed=3), torch.arange(2 * tokens, device=DEVICE).view(2, tokens) + 3
    found, wide = ours.compress.project(x, values, gates, ape, position, dim), x.double()
    wanted = reference.project(wide @ values.double().T, wide @ gates.double().T, ape.double(), position, dim)
    near(found, wanted, torch.float32)


def chosen(logits: Tensor, temperature: object, top_p: object, draw: object) -> Tensor:
    """Ours, which must be the specification's, for settings that are numbers or one per row."""
    numbers = [torch.as_tensor(v, dtype=torch.float64).expand(len(logits)) for v in (temperature, top_p, draw)]
    found = ours.sample.sample(logits, *numbers)
    assert found.dtype == torch.int64 and found.device == logits.device
    assert torch.equal(found.cpu(), reference.sample(logits.cpu(), *numbers))
    return found


SETTINGS = st.tuples(
    st.sampled_from([0, 0.3, 1, 2]), st.sampled_from([1e-9, 0.2, 0.9, 0.999999, 1]), st.floats(0, 1, exclude_max=True)
)


@settings(max_examples=8)
@given(
    st.lists(SETTINGS, min_size=1, max_size=5),
    st.sampled_from([1, 2, 63, 700, 1023, 1025, 2500]),
    st.sampled_from(["distinct", "ties", "neighbours", "masked"]),
)
def test_sampling(rows: list[tuple[float, float, float]], vocabulary: int, kind: str) -> None:
    """The same token as the specification: peaked, flat and tied odds; logits one bit apart, and so near 0 that their
    odds are equal; tokens that may not be chosen."""
    logits = normal(len(rows), vocabulary, seed=vocabulary) * 4
    if kind == "ties":
        logits = logits.round()
    if kind == "neighbours":
        logits[:, 1::2] = torch.nextafter(logits[:, : vocabulary - 1 : 2], torch.tensor(INFINITE, device=DEVICE))
        logits[:, ::5] = logits[:, ::5] * 1e-30
    if kind == "masked":
        logits[:, 1::3] = -INFINITE
    chosen(logits, *torch.tensor(rows, dtype=torch.float64).unbind(1))


def test_every_token_of_a_nucleus() -> None:
    """Draws in the middle of every token's share, the most probable first, and at the start of the first one's: each
    is found by its own."""
    logits = (normal(24, seed=5) * 2).round()
    odds, order = torch.softmax(logits.double(), 0).sort(descending=True, stable=True)
    kept = int((odds.cumsum(0) < 0.9).sum()) + 1
    mass = odds[:kept].cumsum(0)
    assert kept < 24 and len(set(odds[:kept].tolist())) < kept  # with ties
    middle = (mass - odds[:kept] / 2) / mass[-1]
    middle[0] = 0
    assert order[0] > 0 and chosen(logits.expand(kept, -1), 1, 0.9, middle.cpu()).tolist() == order[:kept].tolist()


def test_edges_between_tokens() -> None:
    """Where everything is exact in float64, a draw on an edge is the next token's, and one below it is not."""
    logits, count = torch.full((6, 2048), 3.25, device=DEVICE), 2048
    draws = torch.tensor([0, 1 / count, 1023 / count, 1024 / count, 0.5 - 2**-53, 1 - 2**-53], dtype=torch.float64)
    assert chosen(logits, 0.7, 1, draws).tolist() == [0, 1, 1023, 1024, 1023, 2047]
    assert chosen(logits, 0.7, 0.25, draws).tolist() == [0, 0, 255, 256, 255, 511]
    assert chosen(logits[:1], 0.7, 0.25 + 2**-54, draws[-1:]).tolist() == [512]


def test_a_nucleus_of_nearly_everything() -> None:
    """Odds over a hundred octaves: past the last one that is counted, and past what has a mass at all."""
    logits = -0.7 * torch.arange(100.0, device=DEVICE).expand(5, -1)
    draws = 1 - torch.tensor([0.5, 2**-8, 2**-20, 2**-34, 2**-45], dtype=torch.float64)
    assert len(set(chosen(logits, 1, 1 - 2**-48, draws).tolist())) == 5
    assert len(set(chosen(logits, 1, 1, draws).tolist())) == 5


def test_temperature_zero() -> None:
    """The lowest id of the largest logits, whatever else is asked for; infinities are numbers like others."""
    logits = normal(6, 2100)
    logits[0, [1500, 40]], logits[1, 2099], logits[2], logits[3, [7, 2000]] = 9.0, 9.0, -INFINITE, INFINITE
    logits[4], logits[5] = 0.0, -0.0
    logits[5, 1] = 0.0
    top_p = torch.tensor([0.3, 1] * 3, dtype=torch.float64)
    assert chosen(logits, 0, top_p, 0.99).tolist() == [40, 2099, 0, 7, 0, 0]


def test_an_impossible_token_is_not_chosen() -> None:
    """A draw at the very end (even 1, which is none) falls on a token that can be chosen: the last ones cannot."""
    logits = normal(3, 1030)
    logits[2, :512], logits[2, 512:], logits[:, 1000:] = 3, -INFINITE, -INFINITE
    for top_p in (0.5, 1.0):
        draw = torch.tensor([0.999, 1 - 2**-53, 1], dtype=torch.float64)
        found = ours.sample.sample(logits, torch.ones_like(draw), torch.full_like(draw, top_p), draw)
        assert (found < 1000).all() and found[2] == 512 * top_p - 1


def test_a_row_does_not_know_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in batches of 1 to 64. (The interpreter's products depend on where in a tile a row lies, so there
    the projection's parts start with a tile.)"""
    monkeypatch.setattr(ours.linear, "EXACT", True)
    x, logits, bias = normal(64, 128), normal(64, 300, seed=1) * 3, normal(300, seed=2)
    values, gates, ape, position = normal(48, 128, seed=3), normal(48, 128, seed=4), normal(4, 48), torch.arange(64)
    generator = torch.Generator().manual_seed(0)
    temperature, top_p, draw = (torch.rand(64, generator=generator, dtype=torch.float64) for _ in range(3))
    top_p[torch.arange(64) % 5 > 0] = 1

    def run(part: slice) -> list[Tensor]:
        tokens = ours.sample.sample(logits[part, :40], temperature[part], top_p[part], draw[part])
        routes = ours.route.route(logits[part], bias, None, 6, 1.5)
        place = position[None, part].to(DEVICE)
        projected = ours.compress.project(x[None, part], values, gates, ape, place, 24)[0]
        exact = DEVICE == "cuda" or part.start % 16 == 0
        rows = [ours.rows.kv_row(x[part], 64), ours.rows.index_row(x[part])]
        return [tokens, *routes, *rows] + ([projected] if exact else [])

    whole = run(slice(0, 64))
    for start, end in ((0, 1), (5, 6), (63, 64), (16, 19), (32, 40)):
        assert all(torch.equal(bits(a), bits(b[start:end])) for a, b in zip(run(slice(start, end)), whole))


def test_the_dispatch_file_chooses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton runs, and only for what the kernels can do: gradients and odd widths go to plain torch."""
    seen: list[str] = []
    for module, name in ((ours.rows, "kv_row"), (ours.rows, "index_row"), (ours.route, "route"),
                         (ours.compress, "project"), (ours.sample, "sample")):  # fmt: skip
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _run=run, _name=name: (seen.append(_name), _run(*a))[1])
    monkeypatch.setattr(ours, "_device", lambda: DEVICE)
    x, w, one = normal(1, 2, 64), normal(8, 64), torch.ones(2, dtype=torch.float64)
    position = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)

    def everything(x: Tensor) -> None:
        kernels.kv_row(x, 32)
        kernels.index_row(x)
        kernels.route(x[0], w[0], None, 2, 1.0)
        kernels.project(x, w, w, w[:, :8], position, 8)

    everything(x)
    kernels.sample(x[0], one, one, one * 0.5)
    assert seen == ["kv_row", "index_row", "route", "project", "sample"]
    everything(x.clone().requires_grad_())
    kernels.index_row(x[..., :16])
    kernels.sample(x[0].bfloat16(), one, one, one * 0.5)
    assert len(seen) == 5
