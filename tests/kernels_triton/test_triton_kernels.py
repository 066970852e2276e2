"""Each Triton kernel against its specification, on a CUDA device or in Triton's interpreter.

The interpreter shows that the logic is right; what it cannot show is in test_compiled.py (it compiles) and
benchmarks/triton_kernels.py (it runs, on a device).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import numerics
from dsv4.kernels import reference
from dsv4.kernels import triton as ours
from tests.kernels_triton.tensors import DEVICE, DTYPES, few, fewer, near, normal

pytest.importorskip("triton", reason="triton is not installed (script/setup dev installs it on Linux x86-64)")

FORMS = st.sampled_from([numerics.FP4, numerics.FP8, numerics.FP8_BASE])


def packed(shape: tuple[int, ...], form: numerics.Format, seed: int, spread: int = 14) -> numerics.Packed:
    """Random bytes, so that every code occurs, and scales of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randint(256, form.packed(shape), generator=generator, dtype=torch.uint8)
    if form.per_byte == 1:
        elements[(elements & 127) == 127] = 0  # NaN
    scale = torch.randint(127 - spread // 2, 127 + spread // 2, form.scales(shape), generator=generator).to(torch.uint8)
    if form.scale == "F32":
        scale = (scale.int() << 23).view(torch.float32)
    return numerics.Packed(elements, scale, form).to(DEVICE)


@few
@given(st.integers(1, 20), st.integers(1, 300), DTYPES)
def test_rounding_to_fp8(rows: int, width: int, dtype: torch.dtype) -> None:
    """To the bit: ties, subnormals, blocks at the edge, maxima at both sides of 448 times a power of two."""
    x = normal(rows, width) * torch.logspace(-7, 5, rows, device=DEVICE)[:, None]
    x[0, 0], x[-1, -1], x[rows // 2, width // 2] = 448 * 2**-6, 0, 450.0
    x[:, ::3] = x[:, ::3].to(torch.float8_e4m3fn).float() * 1.0625  # 17/16: a tie between two FP8 numbers
    x = x.nan_to_num(0).to(dtype)
    assert torch.equal(ours.linear.rounded(x).float(), numerics.rounded(x.float(), numerics.ACTIVATION))


@few
@given(st.integers(1, 80), st.integers(1, 150), st.integers(1, 5), st.integers(0, 63), FORMS, DTYPES)
def test_packed_linear(rows: int, out: int, chunks: int, more: int, form: numerics.Format, dtype: torch.dtype) -> None:
    """FP4 and FP8 weights as they are stored, against their exact values in float64; inputs rounded alike."""
    width = 64 * chunks + (more // 2 * 2)
    x, w = normal(rows, width, dtype=dtype), packed((out, width), form, rows)
    result = ours.linear.packed_linear(x, w)
    seen, values = numerics.rounded(x.float(), numerics.ACTIVATION).double(), w.dequantise().double()
    wanted, largest = seen @ values.T, seen.abs() @ values.abs().T  # cancellation costs digits
    assert result.dtype == dtype
    bound = 1e-6 * largest + (0 if dtype == torch.float32 else 2**-8) * wanted.abs()
    assert ((result.double() - wanted).abs() <= bound + 1e-30).all()


def test_the_smallest_scale() -> None:
    """Byte 0 is 2^-127, no normal float32; neither it nor its products may count as zero. (FP8 only: FP4's values take
    their scale as bf16, whose subnormals the interpreter gets wrong.)"""
    w = packed((3, 64), numerics.FP8, 0)
    w.scale.fill_(0)
    x = torch.full((1, 64), 2.0**20, device=DEVICE)
    wanted = x.double() @ w.dequantise().double().T
    assert wanted.abs().min() > 0
    assert ((ours.linear.packed_linear(x, w).double() - wanted).abs() <= 1e-6 * wanted.abs()).all()


@few
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 140), FORMS, DTYPES)
def test_packed_groups_do_not_round_their_input(
    rows: int, groups: int, out: int, form: numerics.Format, dtype: torch.dtype
) -> None:
    """As the output projection's wo_a is used; blocks of scales may cross groups."""
    x, w = normal(rows, groups, 96, dtype=dtype), packed((groups * out, 96), form, rows)
    wanted = torch.einsum("mgk,gnk->mgn", x.double(), w.dequantise().double().view(groups, out, 96))
    near(ours.linear.grouped_linear(x, w), wanted, dtype)


@few
@given(st.integers(1, 70), st.integers(1, 3), st.integers(1, 70), st.integers(1, 150), DTYPES, st.booleans())
def test_linear(rows: int, groups: int, out: int, width: int, dtype: torch.dtype, wide: bool) -> None:
    x, w = normal(rows, groups, width, dtype=dtype), normal(groups, out, width, seed=1, dtype=dtype)
    y = ours.linear.grouped_linear(x, w.flatten(0, 1), wide)
    assert y.dtype == (torch.float32 if wide else dtype)
    near(y, torch.einsum("mgk,gnk->mgn", x.double(), w.double()), torch.float32 if wide else dtype)


@few
@given(st.integers(1, 90), st.integers(1, 70), st.integers(1, 90), st.integers(1, 6), DTYPES)
def test_experts(rows: int, inner: int, width: int, experts: int, dtype: torch.dtype) -> None:
    """Some experts get many rows, some none."""
    shapes = [(rows, width), (experts, inner, width), (experts, width, inner), (experts, inner, width)]
    x, w1, w2, w3 = ((normal(*s, seed=i) * s[-1] ** -0.5).to(dtype) for i, s in enumerate(shapes))
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.rand(rows, experts, generator=generator).argsort(1)[:, : min(2, experts)].to(DEVICE)
    chosen[rows // 2 :] = chosen[:1]
    weights = torch.rand(chosen.shape, generator=generator).to(DEVICE)
    result = ours.experts.routed_experts(x, chosen, weights, w1, w2, w3, 0.3)
    wide = [t.double() for t in (x, w1, w2, w3)]
    near(result, reference.routed_experts(wide[0], chosen, weights.double(), *wide[1:], 0.3), dtype, 2)


@fewer
@given(st.integers(1, 40), st.integers(1, 4), FORMS)
def test_packed_experts(rows: int, choices: int, form: numerics.Format) -> None:
    """Against the specification; an input of the second product may fall on the other side of a rounding edge."""
    shapes = [(6, 160, 96), (6, 96, 160), (6, 160, 96)]
    stacks = [packed(shape, form, i, spread=4) for i, shape in enumerate(shapes)]
    x = normal(rows, 96, seed=rows, dtype=torch.bfloat16)
    experts = torch.rand(rows, 6, generator=torch.Generator().manual_seed(rows)).argsort(1)[:, :choices].to(DEVICE)
    weights = normal(rows, choices).abs()
    result = ours.experts.packed_experts(x, experts, weights, *stacks, 7.0)
    wanted = numerics.packed_experts(x, experts, weights, *stacks, 7.0)
    assert (result - wanted).abs().mean() <= 2**-9 * wanted.abs().mean()
    assert (result - wanted).abs().max() <= 2**-5 * wanted.abs().max()


def spread(tokens: int, entries: int) -> tuple[Tensor, Tensor]:
    """low and high int64 [2, T] of ranges that grow, as visibility does; some are empty."""
    high = torch.stack([torch.linspace(0, entries, tokens).long(), torch.full((tokens,), entries)]).to(DEVICE)
    return high // 3, high


@few
@given(
    st.integers(1, 9), st.integers(1, 150), st.integers(1, 11), st.sampled_from([2, 6, 64]), st.integers(1, 30), DTYPES
)
def test_choice(tokens: int, entries: int, heads: int, dim: int, k: int, dtype: torch.dtype) -> None:
    """Against a stable sort of float64 scores; small whole numbers, so that ties are plenty and exact."""
    generator = torch.Generator().manual_seed(tokens * entries)
    q = torch.randint(-2, 3, (2, tokens, heads, dim), generator=generator).to(DEVICE, dtype)
    keys = torch.randint(-2, 3, (2, entries + 5, dim), generator=generator).to(DEVICE, dtype)[:, :entries]  # a view
    weights = torch.randint(-1, 3, (2, tokens, heads), generator=generator).float().to(DEVICE)
    low, high = spread(tokens, entries)
    chosen, count = ours.attend.choose(q, weights, keys, low, high, k)
    dots = torch.einsum("bthd,bed->bthe", q.double(), keys.double()).relu()
    scores = torch.einsum("bth,bthe->bte", weights.double(), dots)
    assert chosen.dtype == count.dtype == torch.int32
    for b in range(2):
        for t in range(tokens):
            seen = scores[b, t, low[b, t] : high[b, t]]
            best = seen.sort(descending=True, stable=True).indices[:k].sort().values + low[b, t]
            assert chosen[b, t, : count[b, t]].tolist() == best.tolist()


def test_a_long_choice_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of few queries at a time; more entries than one step collects."""
    q, keys, weights = normal(2, 3, 4, 8), normal(2, 2500, 8, seed=1), normal(2, 3, 4, seed=2)
    low, high = spread(3, 2500)
    whole = ours.attend.choose(q, weights, keys, low, high, 7)
    monkeypatch.setattr(ours.attend, "_SCRATCH_FLOATS", 4 * 2500)
    part = ours.attend.choose(q, weights, keys, low, high, 7)
    scores = torch.einsum("bth,bthe->bte", weights, torch.einsum("bthd,bed->bthe", q, keys).relu())
    assert torch.equal(whole[1], part[1])
    for b, t in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        best = scores[b, t, low[b, t] : high[b, t]].topk(7).indices.sort().values + low[b, t]
        assert whole[0][b, t].tolist() == part[0][b, t].tolist() == best.tolist()


@few
@given(
    st.integers(1, 9), st.integers(0, 90), st.integers(1, 20), st.sampled_from([2, 6, 64, 96]), st.integers(0, 30),
    DTYPES,
)  # fmt: skip
def test_attention(tokens: int, entries: int, heads: int, dim: int, k: int, dtype: torch.dtype) -> None:
    """Window rows, entries (all or chosen) and the sink, against a float64 softmax over exactly those rows."""
    q, rows_near = normal(2, tokens, heads, dim, dtype=dtype), normal(2, tokens + 40, dim, seed=1, dtype=dtype)
    far, sink = normal(2, entries + 5, dim, seed=2, dtype=dtype)[:, :entries], normal(heads, seed=3)
    to = torch.arange(40, tokens + 40, dtype=torch.int32, device=DEVICE).expand(2, -1)
    start = (to - torch.tensor([[40], [3]], dtype=torch.int32, device=DEVICE)).clamp(min=0)
    low, high = spread(tokens, entries)
    picked = None
    if k and entries:
        picked = ours.attend.choose(q, normal(2, tokens, heads).abs(), far, low, high, k)
    out = ours.attend.attend(q, rows_near, start, to, far if entries else None, low, high, picked, sink, 0.4)
    for b in range(2):
        for t in range(tokens):
            rows = [rows_near[b, start[b, t] : to[b, t]]]
            if picked is not None:
                rows.append(far[b, picked[0][b, t, : picked[1][b, t]].long()])
            else:
                rows.append(far[b, low[b, t] : high[b, t]])
            seen = torch.cat(rows).double()
            logits = torch.cat((q[b, t].double() @ seen.T * 0.4, sink[:, None].double()), 1)
            near(out[b, t], torch.softmax(logits, 1)[:, :-1] @ seen, dtype, roundings=2)


@fewer
@given(st.integers(1, 20), st.sampled_from([1, 7, 100, 600]), st.sampled_from([2, 3, 4]), DTYPES)
def test_hyper_connections(rows: int, dim: int, n: int, dtype: torch.dtype) -> None:
    """The normalisation's passes, each division with its eps, in float64; few passes show when one is missing."""
    size = (2 + n) * n
    site = [normal(size, n * dim, seed=1), normal(size, seed=2), normal(3, seed=3) * (n * dim) ** -0.5]
    streams, y = normal(rows, n, dim, seed=4, dtype=dtype), normal(rows, dim, seed=5, dtype=dtype)
    for iterations in (2, 20):
        maps = ours.hyper_connections.hc_enter(streams, *site, iterations, 1e-6, 1e-3)
        wanted = exact_enter(streams, *site, iterations, 1e-6, 1e-3)
        for a, b, kind in zip(maps, wanted, (dtype, torch.float32, torch.float32)):
            assert a.dtype == kind and a.shape == b.shape
            near(a, b, kind)
    left = ours.hyper_connections.hc_leave(streams, y, *maps[1:])
    mixed = torch.einsum("mjk,mjd->mkd", maps[2].double(), streams.double())
    near(left, maps[1].double()[..., None] * y.double()[:, None] + mixed, dtype)


@fewer
@given(st.integers(1, 40), st.sampled_from([1, 7, 130]), st.sampled_from([1, 3, 4]), DTYPES)
def test_gradients_of_hyper_connections(rows: int, dim: int, n: int, dtype: torch.dtype) -> None:
    """Of every input, against autograd through the float64 lines."""
    size = (2 + n) * n
    site = [normal(size, n * dim, seed=1), normal(size, seed=2), normal(3, seed=3) * (n * dim) ** -0.5]
    inputs = [normal(rows, n, dim, seed=4, dtype=dtype), normal(rows, dim, seed=5, dtype=dtype), *site]

    def run(enter: Callable[..., Any], leave: Callable[..., Tensor], kind: torch.dtype | None) -> list[Tensor]:
        leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in inputs]
        x, post, comb = enter(leaves[0], *leaves[2:], 20, 1e-6, 1e-3)
        out = leave(leaves[0], leaves[1] + x, post, comb)
        total = sum((t.double() * normal(*t.shape, seed=9).double()).sum() for t in (out, x, post, comb))
        return list(torch.autograd.grad(total, leaves))

    def exact_leave(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return post[..., None] * y[:, None] + torch.einsum("mjk,mjd->mkd", comb, streams)

    found = run(ours.hyper_connections.hc_enter, ours.hyper_connections.hc_leave, None)
    for a, b, input_ in zip(found, run(exact_enter, exact_leave, torch.float64), inputs):
        assert a.dtype == input_.dtype and a.shape == b.shape
        scale = b.abs().max().clamp(min=1)  # sums over rows and channels: several roundings meet in one number
        assert (a.double() - b).abs().max() <= (1e-4 if dtype == torch.float32 else 3e-2) * scale


@few
@given(st.integers(1, 20), st.integers(1, 3), st.sampled_from([(8, 4), (34, 3)]))
def test_gradient_of_a_rotation(rows: int, heads: int, shape: tuple[int, int]) -> None:
    width, pairs = shape
    x, weight = normal(rows, heads, width).requires_grad_(), normal(rows, heads, width, seed=1)
    angles = torch.polar(torch.ones(rows, 1, pairs), torch.rand(rows, 1, pairs) * 7).to(DEVICE)
    sides = [torch.autograd.grad((r(x, angles) * weight).sum(), x)[0] for r in (ours.norm.rotate, reference.rotate)]
    assert torch.allclose(*sides, atol=1e-6)


def exact_enter(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, rms_eps: float, eps: float
) -> list[Tensor]:
    """Model card B.2, line by line, in float64."""
    x, fn, base, scale = (t.double() for t in (streams, fn, base, scale))
    n, v = x.shape[1], x.flatten(1)
    u = (v * (v.square().mean(-1, keepdim=True) + rms_eps).rsqrt()) @ fn.T
    pre = torch.sigmoid(scale[0] * u[:, :n] + base[:n]) + eps
    post = 2 * torch.sigmoid(scale[1] * u[:, n : 2 * n] + base[n : 2 * n])
    c = torch.softmax((scale[2] * u[:, 2 * n :] + base[2 * n :]).unflatten(1, (n, n)), -1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return [torch.einsum("mj,mjd->md", pre, x), post, c]


@fewer
@given(st.integers(1, 20), st.integers(1, 3), st.sampled_from([(8, 4), (32, 3), (6, 3), (7, 2), (1500, 32)]), DTYPES)
def test_norm_and_rotation(rows: int, heads: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    width, pairs = shape
    x, weight = normal(2, rows, heads, width, dtype=dtype), normal(width, seed=1)
    r = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    near(ours.norm.rms_norm(x, weight, 1e-6), x.double() * r * weight.double(), dtype)
    near(ours.norm.rms_norm(x, None, 1e-6), x.double() * r, dtype)
    for lead in ((2, rows, 1), (rows, 1), (1, rows, 1), (2, rows, heads), (1, 1)):
        turns = torch.rand((*lead, pairs), generator=torch.Generator().manual_seed(5)).to(DEVICE) * 7
        angles = torch.polar(torch.ones_like(turns), turns)
        for a in (angles, angles.conj()):
            near(ours.norm.rotate(x, a), exact_rotation(x, a), dtype)
    still = ours.norm.rotate(x, angles)[..., : width - 2 * pairs]
    assert torch.equal(still, x[..., : width - 2 * pairs])


def exact_rotation(x: Tensor, angles: Tensor) -> Tensor:
    split = x.shape[-1] - 2 * angles.shape[-1]
    pairs = torch.view_as_complex(x[..., split:].double().unflatten(-1, (-1, 2)).contiguous())
    return torch.cat((x[..., :split].double(), torch.view_as_real(pairs * angles).flatten(-2)), -1)


@few
@given(st.integers(1, 5), st.sampled_from([1, 3, 8, 128]), st.integers(1, 150))
def test_pooling(entries: int, slots: int, dim: int) -> None:
    kv, gate = normal(2, entries, slots, dim), normal(2, entries, slots, dim, seed=1) * 3
    gate[:, 0, : slots // 2] = -torch.inf  # a first entry has no window before it
    near(ours.compress.pool(kv, gate), (torch.softmax(gate.double(), 2) * kv.double()).sum(2), torch.float32)


def test_a_row_does_not_know_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DSV4_EXACT the same bits alone and in any batch; without it only up to rounding. The interpreter's products
    depend on where in a tile a row lies, so there parts start with a tile, and experts, which mix rows, are left out.
    """
    monkeypatch.setattr(ours.linear, "EXACT", True)
    x, w = normal(40, 192), packed((70, 192), numerics.FP4, 1)
    stacks = [packed(s, numerics.FP8, i, spread=4) for i, s in enumerate([(3, 96, 192), (3, 192, 96), (3, 96, 192)])]
    chosen = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :2].to(DEVICE)
    weights, site = normal(40, 2).abs(), [normal(24, 192, seed=1), normal(24, seed=2), normal(3, seed=3)]

    def run(part: slice) -> list[Tensor]:
        streams = x[part].view(-1, 4, 48)
        maps = ours.hyper_connections.hc_enter(streams, *site, 20, 1e-6, 1e-6)
        routed = ours.experts.packed_experts(x[part], chosen[part], weights[part], *stacks, 7.0)
        left = ours.hyper_connections.hc_leave(streams, maps[0], *maps[1:])
        products = [ours.linear.packed_linear(x[part], w)] + ([routed] if DEVICE == "cuda" else [])
        return [*products, *maps, left, ours.norm.rms_norm(x[part], None, 1e-6)]

    whole = run(slice(None))
    anywhere = (slice(3, 8), slice(39, 40)) if DEVICE == "cuda" else ()
    for part in (slice(0, 1), slice(16, 21), slice(32, 40), *anywhere):
        assert all(torch.equal(a, b[part]) for a, b in zip(run(part), whole))
