"""Decoding in plain torch: one token, or few, must be computed as they are among many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from dsv4.kernels import reference


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(3)
    with torch.inference_mode():
        yield


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


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hyper_connections(streams: int, dtype: torch.dtype) -> None:
    maps = (2 + streams) * streams
    x, fn = torch.randn(1, 1, streams, 64).to(dtype), torch.randn(maps, streams * 64) / 8
    rest = (fn, torch.randn(maps), torch.randn(3), 20, 1e-6, 1e-6)
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


def test_experts_of_one_token() -> None:
    w1, w3, w2 = torch.randn(8, 300, 512) / 20, torch.randn(8, 300, 512) / 20, torch.randn(8, 512, 300) / 20
    x, experts, weights = torch.randn(2, 512), torch.tensor([[6, 1, 3], [0, 1, 2]]), torch.rand(2, 3)
    many = reference.routed_experts(x, experts, weights, w1, w2, w3, 1.0)
    assert close(reference.routed_experts(x[:1], experts[:1], weights[:1], w1, w2, w3, 1.0), many[:1])


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
