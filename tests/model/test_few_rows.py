"""Decoding in plain torch: one token, or few, must be computed as they are among many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import dsv4
from dsv4 import kernels
from dsv4.kernels import reference
from dsv4.kernels.cpu import library
from dsv4.model import Transformer
from dsv4.model.plan import Plan
from dsv4.model.rope import frequencies
from tests.parity.configs import tiny
from tests.parity.peer import randomise


@pytest.fixture(autouse=True)
def _inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(3)
    monkeypatch.setenv("DSV4_KERNELS", "reference")
    library.library.cache_clear()
    with torch.inference_mode():
        yield
    library.library.cache_clear()


def close(one: torch.Tensor, other: torch.Tensor, bound: float = 2e-5) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and float((one - other).abs().max()) < bound


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(300, 512), (16, 24), (1, 1)])
def test_linear(rows: int, shape: tuple[int, int]) -> None:
    x, weight = torch.randn(1, rows, shape[1]), torch.randn(*shape) / shape[1] ** 0.5
    assert close(reference.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_grouped_linear(rows: int) -> None:
    x, weight = torch.randn(1, rows, 8, 512), torch.randn(8 * 300, 512) / 512**0.5
    wanted = torch.einsum("btgi,goi->btgo", x, weight.view(8, 300, 512))
    assert close(reference.grouped_linear(x, weight), wanted)


@pytest.mark.parametrize("passes", [1, 2, 20])
@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hyper_connections(passes: int, streams: int, dtype: torch.dtype) -> None:
    maps = (2 + streams) * streams
    x, fn = torch.randn(1, 1, streams, 64).to(dtype), torch.randn(maps, streams * 64) / 8
    rest = (fn, torch.randn(maps), torch.randn(3), passes, 1e-6, 1e-4)
    many = reference.hc_enter(torch.cat((x, torch.randn_like(x)), 1), *rest)
    for got, among_two in zip(reference.hc_enter(x, *rest), many):
        assert close(got, among_two[:, :1], 2e-2 if dtype == torch.bfloat16 and got.dtype == dtype else 2e-6)
    y = torch.randn(1, 2, 64).to(dtype)
    left = reference.hc_leave(torch.cat((x, x), 1), y, *many[1:])[:, :1]
    got = reference.hc_leave(x, y[:, :1], many[1][:, :1], many[2][:, :1])
    assert close(got.float(), left.float(), 2e-2 if dtype == torch.bfloat16 else 2e-6)


def test_hyper_connections_of_extreme_logits() -> None:
    x, fn, base = torch.randn(1, 1, 4, 8), torch.randn(24, 32), torch.randn(24) * 1000
    for part in reference.hc_enter(x, fn, base, torch.ones(3), 20, 1e-6, 1e-6):
        assert part.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_one_row(dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 1, 96).to(dtype), torch.rand(96)
    wanted = F.rms_norm(x.double(), (96,), weight.double(), 1e-6)
    assert close(reference.rms_norm(x, weight, 1e-6).double(), wanted, 1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("entries", [3, 9, 40])
def test_choice_and_attention_of_one_query(entries: int) -> None:
    """Two queries at once, each with its own reach, against each by itself."""
    heads, dim, k, batch = 4, 16, 8, 2
    q, near, far = torch.randn(batch, 2, heads, dim), torch.randn(batch, 12, dim), torch.randn(batch, entries, dim)
    index_q, weights, keys = torch.randn(batch, 2, 3, 8), torch.randn(batch, 2, 3), torch.randn(batch, entries, 8)
    first = torch.tensor([[0, 4], [2, 3]], dtype=torch.int32)
    low, high = torch.zeros(batch, 2, dtype=torch.int64), torch.tensor([[entries, entries // 2], [entries, entries]])
    sink = torch.randn(heads)
    picked = reference.choose(index_q, weights, keys, low, high, k)
    whole = reference.attend(q, near, first, first + 7, far, low, high, None, sink, 0.3)
    sparse = reference.attend(q, near, first, first + 7, far, low, high, picked, sink, 0.3)
    for t in range(2):
        at = slice(t, t + 1)
        own = reference.choose(index_q[:, at], weights[:, at], keys, low[:, at], high[:, at], k)
        assert torch.equal(own[1], picked[1][:, at])
        for b in range(batch):
            assert torch.equal(own[0][b, 0, : own[1][b, 0]], picked[0][b, t, : own[1][b, 0]])
        for got, wanted in ((None, whole), (own, sparse)):
            one = (q[:, at], near, first[:, at], first[:, at] + 7, far, low[:, at], high[:, at], got, sink, 0.3)
            assert close(reference.attend(*one), wanted[:, at], 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_around_one_token(dtype: torch.dtype) -> None:
    """Against the single steps in float64; the bound in bfloat16 is what their roundings add up to."""
    heads, dim, rank, width, groups, eps = 4, 24, 32, 40, 2, 1e-6
    h, o = torch.randn(1, 1, width).to(dtype), torch.randn(1, 1, heads, dim).to(dtype)
    shapes = (
        (rank, width),
        (heads * dim, rank),
        (dim, width),
        (groups * rank, heads * dim // groups),
        (width, groups * rank),
    )
    wq_a, wq_b, wkv, wo_a, wo_b = ((torch.randn(n, m) / m**0.5).to(dtype) for n, m in shapes)
    q_norm, kv_norm, angles = torch.rand(rank), torch.rand(dim), torch.polar(torch.ones(1, 1, 4), torch.randn(1, 1, 4))
    latent = reference.rms_norm(h.double() @ wq_a.double().T, q_norm.double(), eps).double()
    q = reference.rms_norm((latent @ wq_b.double().T).unflatten(-1, (heads, dim)), None, eps)
    kv = reference.rms_norm(h.double() @ wkv.double().T, kv_norm, eps)
    wanted = latent, reference.rotate(q, angles.unsqueeze(-2)), reference.rotate(kv, angles)
    bound = 1e-5 if dtype == torch.float32 else 4e-2
    got = kernels.attention_inputs(h, wq_a, q_norm, wq_b, wkv, kv_norm, angles, eps)
    assert got is not None
    for ours, theirs in zip(got, wanted):
        assert ours.dtype == dtype and close(ours.double(), theirs.double(), bound)
    turned = reference.rotate(o.double(), angles.conj().unsqueeze(-2)).reshape(1, 1, groups, -1)
    wanted_o = reference.grouped_linear(turned, wo_a.double()).flatten(-2) @ wo_b.double().T
    out, before = kernels.attention_output(o, wo_a, wo_b, angles, groups), o.clone()
    assert out is not None and close(out.double(), wanted_o, bound) and torch.equal(o, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_index_queries_of_one_token(dtype: torch.dtype) -> None:
    h, latent, angles = (
        torch.randn(1, 1, 40),
        torch.randn(1, 1, 32),
        torch.polar(torch.ones(1, 1, 4), torch.randn(1, 1, 4)),
    )
    h, latent, wq_b, proj = (x.to(dtype) for x in (h, latent, torch.randn(5 * 24, 32), torch.randn(5, 40)))
    wanted = reference.rotate((latent.double() @ wq_b.double().T).unflatten(-1, (5, 24)), angles.unsqueeze(-2))
    got = kernels.index_queries(h, latent, wq_b, proj, angles, 0.3)
    bound = 2e-5 if dtype == torch.float32 else 1e-1
    assert got is not None and got[0].dtype == dtype and close(got[0].double(), wanted, bound)
    assert got[1].dtype == torch.float32 and close(got[1].double(), h.double() @ proj.double().T * 0.3, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_one_token(dtype: torch.dtype) -> None:
    stacks = [(torch.randn(8, *s) / 20).to(dtype) for s in ((300, 512), (512, 300), (300, 512))]
    shared = [(torch.randn(*s) / 20).to(dtype) for s in ((300, 512), (512, 300), (300, 512))]
    x, experts, weights = torch.randn(1, 512).to(dtype), torch.tensor([[6, 1, 3]]), torch.rand(1, 3)
    wide = [w.double() for w in stacks], [w.double() for w in shared]
    wanted = reference.routed_experts(x.double(), experts, weights.double(), *wide[0], 0.5)
    wanted = wanted + reference.swiglu(x.double() @ wide[1][0].T, x.double() @ wide[1][2].T, 0.5) @ wide[1][1].T
    got = kernels.mixture(x, experts, weights, tuple(stacks), tuple(shared), 0.5)
    assert got is not None and got.dtype == dtype
    assert close(got.double(), wanted.double(), 1e-5 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize(("position", "halves"), [(0, 1), (6, 2), (131, 2)])
def test_projection_of_one_token(position: int, halves: int) -> None:
    x, ape = torch.randn(1, 1, 40), torch.randn(4, 16 * halves)
    values, gates = torch.randn(16 * halves, 40), torch.randn(16 * halves, 40)
    at = torch.tensor([[position]])
    wanted = reference.project(x @ values.T, x @ gates.T, ape, at, 16)
    assert close(kernels.project(x, values, gates, ape, at, 16), wanted)


@pytest.mark.parametrize("before", [0, 2, 3, 7, 126, 127, 128, 255, 511])
def test_plan_of_one_token(before: int) -> None:
    config = dsv4.Config.preset("nano")
    turns = frequencies(config)
    one, general = (
        Plan.build(config, (1, 1), turns, torch.tensor([before]), lengths, None)
        for lengths in (None, torch.tensor([1]))
    )
    for name in ("position", "reach", "before", "after"):
        assert torch.equal(getattr(one, name), getattr(general, name)), name
    for kind, angles in general.angles.items():
        assert torch.equal(one.angles[kind], angles)
    assert one.entries.keys() == general.entries.keys() and len(one.entries) == 2
    for ratio, entries in general.entries.items():
        assert one.entries[ratio].count == entries.count == (before + 1) // ratio
        for name in ("last", "real", "slot", "low", "high", "angles"):
            ours, theirs = getattr(one.entries[ratio], name), getattr(entries, name)
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, (ratio, name)


def test_the_network_token_by_token() -> None:
    model = randomise(Transformer(tiny()), 5, gain=1.0)
    ids = torch.randint(256, (1, 90))
    state = model.new_state(1)
    one_by_one = torch.cat([model(part, state) for part in ids.split(1, 1)], 1)
    assert close(one_by_one, model(ids))
