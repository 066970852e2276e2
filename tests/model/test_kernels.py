"""The C++ kernels against the plain torch of the same name, and that against autograd in float64."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import kernels, numerics
from dsv4.kernels import reference
from dsv4.kernels.cpu import attend, attention, compress, hyper_connections, isa, library, linear, rope, route, sample
from dsv4.kernels.cpu import rows as rows_of

needs_library = pytest.mark.skipif(library.library() is None, reason="no C++ compiler here: only the reference runs")
ISAS = library.levels() if library.library() else ["generic"]
if "avx512" in ISAS:  # the emulated tiles are compiled beside its instructions
    ISAS = [*ISAS, isa.EMULATED]


@pytest.fixture(autouse=True, scope="module", params=ISAS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test once for each instruction set of this processor, and with AMX's tiles in plain C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSV4_ISA", request.param)
        library.library.cache_clear()
        yield request.param
    library.library.cache_clear()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def compare(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...], inputs: list[Tensor], tolerance: float) -> None:
    """Outputs and gradients, relative to the largest value."""
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(100 + i)) for i, t in enumerate(wanted)]
    grads = [torch.autograd.grad(sum((o * w).sum() for o, w in zip(side, weights)), inputs) for side in (ours, wanted)]
    for a, b in zip((*ours, *grads[0]), (*wanted, *grads[1])):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=0.1), (a.shape, (a - b).abs().max())


@needs_library
@given(rows=st.integers(1, 70), dim=st.sampled_from([1, 7, 32, 100]), threads=st.sampled_from([1, 2]))
def test_hyper_connections(rows: int, dim: int, threads: int) -> None:
    site = [normal(24, 4 * dim, seed=1), normal(24, seed=2), normal(3, seed=3)]
    streams, y = normal(rows, 4, dim, seed=4), normal(rows, dim, seed=5)

    def run(backend: object) -> tuple[Tensor, ...]:
        x, post, comb = backend.hc_enter(streams, *site, 20, 1e-6, 1e-6)  # type: ignore[attr-defined]
        return x, post, comb, backend.hc_leave(streams, y + x, post, comb)  # type: ignore[attr-defined]

    old = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(run(hyper_connections), run(reference), [streams, y, *site], 2e-5)
    finally:
        torch.set_num_threads(old)


@needs_library
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_joint_attention(batch: int, blocks: int, heads: int, entries: int, gathered: bool) -> None:
    block, window, dim = 4, 6, 5
    tokens = block * blocks
    q, near = normal(batch, tokens, heads, dim), normal(batch * blocks, window + block, dim, seed=1)
    sink = normal(heads, seed=2)
    near_mask = torch.rand(1 if gathered else batch, tokens, window + block) < 0.7
    near_mask[..., 0] = True
    far = far_mask = None
    if entries:
        far = normal(batch * tokens if gathered else batch, entries, dim, seed=3)
        far_mask = torch.rand(batch, tokens, entries) < 0.5  # some queries see none
    inputs = [q, near, sink] + ([] if far is None else [far])
    results = [b.joint_attention(q, near, near_mask, far, far_mask, sink, 0.3) for b in (attention, reference)]
    compare((results[0][0],), (results[1][0],), inputs, 2e-5)
    if far is not None:
        assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


@needs_library
@given(st.integers(1, 40), st.integers(1, 3), st.sampled_from([(8, 4), (32, 3), (6, 3)]))
def test_norm_and_rotation(rows: int, heads: int, shape: tuple[int, int]) -> None:
    width, pairs = shape
    x, weight = normal(rows, heads, width), normal(width, seed=1)
    angles = torch.polar(torch.ones(rows, 1, pairs), torch.rand(rows, 1, pairs) * 7)
    for w in (weight, None):
        inputs = [x] if w is None else [x, w]
        compare((rope.rms_norm(x, w, 1e-6),), (reference.rms_norm(x, w, 1e-6),), inputs, 2e-5)
    for a in (angles, angles.conj()):
        compare((rope.rotate(x, a),), (reference.rotate(x, a),), [x], 2e-5)
    assert torch.allclose(kernels.rotate(kernels.rotate(x, angles), angles.conj()), x, atol=1e-5)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dim", [6, 100, 4096])
def test_small_kernels_in_float64(dim: int) -> None:
    """Sites, norms, rotations and training's attention against their equations, written out in float64."""
    fn, base, scale = normal(24, 4 * dim, seed=1) * 0.5 * dim**-0.5, normal(24, seed=2) * 3, normal(3, seed=3)
    streams, y, weight = normal(17, 4, dim, seed=4), normal(17, dim, seed=5), normal(dim, seed=6)
    x, post, comb = hyper_connections.hc_enter(streams, fn, base, scale, 20, 1e-6, 1e-6)
    wide = streams.double()
    v = wide.flatten(1)
    logits = v @ fn.double().T * (v.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    logits = logits * scale.double().repeat_interleave(torch.tensor([4, 4, 16])) + base.double()
    maps = torch.softmax(logits[:, 8:].view(-1, 4, 4), 2) + 1e-6
    for step in range(39):
        maps = maps / (maps.sum(1 + step % 2, keepdim=True) + 1e-6)
    near(x, ((torch.sigmoid(logits[:, :4]) + 1e-6).unsqueeze(2) * wide).sum(1), torch.float32)
    near(post, 2 * torch.sigmoid(logits[:, 4:8]), torch.float32)
    near(comb, maps, torch.float32)
    left = post.double().unsqueeze(2) * y.double().unsqueeze(1) + comb.double().mT @ wide
    near(hyper_connections.hc_leave(streams, y, post, comb), left, torch.float32)
    normed = wide * (wide.square().mean(2, keepdim=True) + 1e-6).rsqrt() * weight.double()
    near(rope.rms_norm(streams, weight, 1e-6), normed, torch.float32)
    angles = torch.polar(torch.ones(17, 1, dim // 2), torch.arange(17.0).view(17, 1, 1).expand(17, 1, dim // 2))
    turned = torch.view_as_complex(wide.unflatten(2, (-1, 2))) * angles
    near(rope.rotate(streams, angles), torch.view_as_real(turned).flatten(2), torch.float32)
    q, rows, sink = normal(1, 3, 2, dim, seed=7), normal(1, 9, dim, seed=8), normal(2, seed=9)
    seen = torch.rand(1, 3, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    out, _ = attention.joint_attention(q, rows, seen, None, None, sink, dim**-0.5)
    scores = torch.einsum("thd,nd->thn", q[0].double(), rows[0].double()) * dim**-0.5
    scores = scores.masked_fill(~seen[0].unsqueeze(1), -torch.inf)
    p = torch.softmax(torch.cat((scores, sink.double().view(1, 2, 1).expand(3, 2, 1)), 2), 2)[..., :-1]
    near(out[0], p @ rows[0].double(), torch.float32)


@needs_library
@given(st.integers(1, 5), st.integers(1, 130), st.sampled_from([1, 7, 16, 40]), st.integers(0, 4))
def test_pooling(entries: int, slots: int, dim: int, early: int) -> None:
    """Some gates are -inf, as a sequence's first entry has them."""
    kv, gate = normal(2, entries, slots, dim), normal(2, entries, slots, dim, seed=1)
    hidden = torch.zeros(slots, 1, dtype=torch.bool)
    hidden[: min(early, slots - 1)] = True
    results = [b.pool(kv, (gate * 3).masked_fill(hidden, -torch.inf)) for b in (compress, reference)]
    compare((results[0],), (results[1],), [kv, gate], 1e-5)
    wide = [t.detach().double() for t in (kv, (gate * 3).masked_fill(hidden, -torch.inf))]
    near(results[0].detach(), reference.pool(*wide), torch.float32)


@needs_library
@given(
    st.lists(st.tuples(st.sampled_from([0, 0.3, 1, 2]), st.sampled_from([1e-9, 0.2, 0.9, 0.999999, 1])), min_size=1),
    st.sampled_from([1, 2, 63, 64, 65, 700]),
    st.booleans(),
)
def test_sampling(settings: list[tuple[float, float]], vocabulary: int, ties: bool) -> None:
    """The same token as the specification, all along [0, 1), with peaked, flat and tied odds."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(len(settings), vocabulary, generator=generator) * 4
    logits = logits.round() if ties else logits
    temperature, top_p = torch.tensor(settings, dtype=torch.float64).unbind(1)
    for draw in (0.0, 0.1234567, 0.5, 0.87654321, 0.9999999):
        draws = torch.full_like(top_p, draw)
        ours = sample.sample(logits, temperature, top_p, draws)
        assert torch.equal(ours, reference.sample(logits, temperature, top_p, draws))


DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def near(ours: Tensor, wanted: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Within 1e-6 of the largest float64 value, or so many roundings of it to bf16."""
    bound = 1e-6 if dtype == torch.float32 else roundings * 2**-8
    error = (ours.double() - wanted).abs().max()
    assert error <= bound * wanted.abs().max().clamp(min=1), (error, wanted.abs().max())


@needs_library
@torch.no_grad()
@given(st.integers(1, 150), st.integers(1, 3), st.integers(1, 70), st.integers(1, 90), DTYPES, st.booleans())
def test_linear(rows: int, groups: int, out: int, width: int, dtype: torch.dtype, wide: bool) -> None:
    """Odd sizes, one row and many; ``wide`` keeps float32 where bf16 would round."""
    x, w = normal(rows, groups, width).to(dtype), (normal(groups, out, width, seed=1) * width**-0.5).to(dtype)
    y = linear.grouped_linear(x, w.flatten(0, 1), wide)
    assert y.dtype == (torch.float32 if wide else dtype)
    near(y, torch.einsum("mgk,gnk->mgn", x.double(), w.double()), torch.float32 if wide else dtype)


@needs_library
@torch.no_grad()
@given(st.integers(1, 90), st.integers(1, 70), st.integers(1, 90), st.integers(1, 6), DTYPES)
def test_experts(rows: int, inner: int, width: int, experts: int, dtype: torch.dtype) -> None:
    """Some experts get many rows, some none."""
    shapes = [(rows, width), (experts, inner, width), (experts, width, inner), (experts, inner, width)]
    x, w1, w2, w3 = ((normal(*s, seed=i) * s[-1] ** -0.5).to(dtype) for i, s in enumerate(shapes))
    generator = torch.Generator().manual_seed(rows)
    chosen = torch.rand(rows, experts, generator=generator).argsort(1)[:, : min(2, experts)]
    weights = torch.rand(chosen.shape, generator=generator)
    ours = linear.routed_experts(x, chosen, weights, w1, w2, w3, 0.3)
    wide = [t.double() for t in (x, w1, w2, w3)]
    near(ours, reference.routed_experts(wide[0], chosen, weights.double(), *wide[1:], 0.3), dtype)


def same_in_any_batch(run: Callable[[slice], tuple[Tensor, ...]]) -> None:
    """``run`` of parts of 130 rows: the same bits in every batch and with any number of threads."""
    whole, threads = run(slice(None)), torch.get_num_threads()
    try:
        for count, size in ((1, 1), (2, 3), (2, 7), (1, 64), (3, 130)):
            torch.set_num_threads(count)
            for start in range(0, 130, size):
                part = slice(start, start + size)
                assert all(torch.equal(a, b[part]) for a, b in zip(run(part), whole))
    finally:
        torch.set_num_threads(threads)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_know_its_batch(dtype: torch.dtype) -> None:
    """The same bits alone, in any batch, and with any number of threads."""
    x, w = normal(130, 300).to(dtype), normal(70, 300, seed=1).to(dtype)
    experts = [normal(*s, seed=i).to(dtype) for i, s in enumerate([(5, 40, 300), (5, 300, 40), (5, 40, 300)])]
    chosen = torch.rand(130, 5, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3]
    weights = chosen.float() + 0.5

    def run(part: slice) -> tuple[Tensor, Tensor]:
        return linear.linear(x[part], w), linear.routed_experts(x[part], chosen[part], weights[part], *experts, 7.0)

    same_in_any_batch(run)


def packed(shape: tuple[int, ...], form: numerics.Format, seed: int) -> numerics.Packed:
    """Random bytes, so that every code occurs, and scales of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randint(256, form.packed(shape), generator=generator, dtype=torch.uint8)
    if form.per_byte == 1:
        elements[(elements & 127) == 127] = 0  # NaN
    scale = torch.randint(118, 132, form.scales(shape), generator=generator, dtype=torch.uint8)
    scale.flatten()[0] = 3  # and one far out
    if form.scale == "F32":
        return numerics.Packed(elements, (scale.int() << 23).view(torch.float32), form)
    return numerics.Packed(elements, scale, form)


FORMS = st.sampled_from([numerics.FP4, numerics.FP8, numerics.FP8_BASE])


@needs_library
@torch.no_grad()
@given(st.integers(1, 80), st.integers(1, 300), st.integers(1, 9), FORMS, DTYPES)
def test_packed_linear(rows: int, out: int, chunks: int, form: numerics.Format, dtype: torch.dtype) -> None:
    """FP4 and FP8 weights as they are stored, against their exact values in float64; inputs rounded alike."""
    x, w = (
        (normal(rows, 32 * chunks) * torch.logspace(-6, 3, rows)[:, None]).to(dtype),
        packed((out, 32 * chunks), form, rows),
    )
    x[0, 0], x[-1, -1] = 448 * 2**-6, 0
    seen = linear.rounded(x)
    assert torch.equal(seen.float(), numerics.rounded(x.float(), numerics.ACTIVATION))
    assert torch.equal(linear.expanded(w).float(), w.dequantise())
    ours, wanted = linear.packed_linear(x, w), seen.double() @ w.dequantise(torch.float64).T
    largest = seen.double().abs() @ w.dequantise(torch.float64).abs().T  # cancellation costs digits
    assert ((ours.double() - wanted).abs() <= (1e-6 if dtype == torch.float32 else 2**-8) * largest + 1e-30).all()


@needs_library
@torch.no_grad()
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 140), FORMS)
def test_packed_groups_do_not_round_their_input(rows: int, groups: int, out: int, form: numerics.Format) -> None:
    """As the output projection's wo_a is used; blocks of scales may cross groups."""
    x, w = normal(rows, groups, 64).bfloat16(), packed((groups * out, 64), form, rows)
    w.scale[w.scale == 3] = 120
    values = w.dequantise(torch.float64).view(groups, out, 64)
    near(linear.grouped_linear(x, w), torch.einsum("mgk,gnk->mgn", x.double(), values), torch.bfloat16)


@needs_library
@torch.no_grad()
@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from([numerics.FP4, numerics.FP8]))
def test_packed_experts(rows: int, choices: int, form: numerics.Format) -> None:
    """Against the specification; an input of the second product may fall on the other side of a rounding edge."""
    stacks = [packed(shape, form, i) for i, shape in enumerate([(6, 96, 64), (6, 64, 96), (6, 96, 64)])]
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=generator).bfloat16()
    experts = torch.rand(rows, 6, generator=generator).argsort(1)[:, :choices]
    weights = torch.rand(rows, choices, generator=generator)
    ours = linear.packed_experts(x, experts, weights, *stacks, 7.0)
    wanted = numerics.packed_experts(x, experts, weights, *stacks, 7.0)
    assert (ours - wanted).abs().mean() <= 2**-9 * wanted.abs().mean()
    assert (ours - wanted).abs().max() <= 2**-5 * wanted.abs().max()


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("form", [numerics.FP4, numerics.FP8])
def test_a_row_of_a_packed_layer_does_not_know_its_batch(form: numerics.Format) -> None:
    """Rows of whole 128s and of some 32s more; the same bits alone, in any batch, and with any number of threads."""
    x, w = normal(130, 320).bfloat16(), packed((200, 320), form, 1)
    stacks = [packed(shape, form, i) for i, shape in enumerate([(5, 192, 320), (5, 320, 192), (5, 192, 320)])]
    chosen = torch.rand(130, 5, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3]
    weights = chosen.float() + 0.5

    def run(part: slice) -> tuple[Tensor, Tensor]:
        routed = linear.packed_experts(x[part], chosen[part], weights[part], *stacks, 7.0)
        return linear.packed_linear(x[part], w), routed

    same_in_any_batch(run)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_does_not_know_its_batch(dtype: torch.dtype) -> None:
    """Few queries are shared by the threads, many are divided among them; entering a site takes four rows at once."""
    tokens, heads, dim, entries, k = 40, 9, 64, 90, 33
    q, keys = normal(1, tokens, heads, dim).to(dtype), normal(1, entries, dim, seed=1).to(dtype)
    window, sink = normal(1, tokens + 20, dim, seed=2).to(dtype), normal(heads, seed=3).detach()
    weights, streams = normal(1, tokens, heads, seed=4).detach(), normal(1, tokens, 4, 48, seed=5).to(dtype)
    site = [t.detach() for t in (normal(24, 192, seed=6), normal(24, seed=7), normal(3, seed=8))]
    to = torch.arange(20, tokens + 20, dtype=torch.int32)[None]
    low, high = torch.zeros(1, tokens, dtype=torch.int64), torch.arange(entries - tokens, entries)[None]

    def run(part: slice) -> tuple[Tensor, ...]:
        cut = [t[:, part].contiguous() for t in (q, weights, low, high, to, streams)]
        picked = attend.choose(cut[0], cut[1], keys, cut[2], cut[3], k)
        out = attend.attend(cut[0], window, cut[4] - 20, cut[4], keys, cut[2], cut[3], picked, sink, 0.1)
        return picked[0], out, *hyper_connections.hc_enter(cut[5], *site, 20, 1e-6, 1e-6)

    whole, threads = run(slice(None)), torch.get_num_threads()
    try:
        for count, size in ((1, 1), (2, 1), (2, 3), (3, 10), (2, 17)):
            torch.set_num_threads(count)
            for start in range(0, tokens, size):
                part = slice(start, start + size)
                assert all(torch.equal(a, b[:, part]) for a, b in zip(run(part), whole))
    finally:
        torch.set_num_threads(threads)


@needs_library
@torch.no_grad()
@given(st.integers(1, 70), st.sampled_from([numerics.FP4, numerics.FP8, numerics.FP8_BASE]))
def test_one_packed_expert(rows: int, form: numerics.Format) -> None:
    """The shared expert as one call: what the specification of packed experts says of weight 1."""
    w1, w2, w3 = (packed(shape, form, i) for i, shape in enumerate([(96, 160), (160, 96), (96, 160)]))
    x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(rows)).bfloat16()
    everyone, ones = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1)
    stacks = [numerics.Packed(w.elements[None], w.scale[None], form) for w in (w1, w2, w3)]
    wanted = numerics.packed_experts(x, everyone, ones, *stacks, 7.0)
    for _ in range(2):  # the second time, where the matrices lie is known
        ours = kernels.expert(x, w1, w2, w3, 7.0)
        assert (ours - wanted).abs().mean() <= 2**-8 * wanted.abs().mean()
    moved = numerics.Packed(w1.elements.clone(), w1.scale.clone(), form)
    w1.elements, w1.scale = moved.elements, moved.scale
    w1.__dict__.pop("powers", None)
    assert torch.equal(kernels.expert(x, w1, w2, w3, 7.0), ours), "the matrices moved"


@needs_library
@torch.no_grad()
@given(st.integers(1, 70), st.sampled_from([numerics.FP4, numerics.FP8]))
def test_a_mixture_is_the_sum_of_its_two_calls(rows: int, form: numerics.Format) -> None:
    """To the bit, rounded once."""
    stacks = [packed(shape, form, i) for i, shape in enumerate([(6, 96, 160), (6, 160, 96), (6, 96, 160)])]
    shared = [packed(shape, numerics.FP8, i) for i, shape in enumerate([(64, 160), (160, 64), (64, 160)])]
    generator = torch.Generator().manual_seed(rows)
    x, chosen = torch.randn(rows, 160, generator=generator).bfloat16(), torch.rand(rows, 6, generator=generator)
    chosen, weights = chosen.argsort(1)[:, :3], torch.rand(rows, 3, generator=generator)
    wanted = kernels.routed_experts(x, chosen, weights, *stacks, 7.0) + kernels.expert(x, *shared, 7.0)
    ours = kernels.mixture(x, chosen, weights, tuple(stacks), tuple(shared), 7.0)
    assert ours is not None and torch.equal(ours, wanted.bfloat16())


@needs_library
@torch.no_grad()
@given(st.integers(1, 4), st.sampled_from([(160, 96, 4, 64, 2), (128, 32, 6, 32, 3)]))
def test_what_surrounds_attention_is_a_chain_of_kernels(tokens: int, sizes: tuple[int, ...]) -> None:
    """To the bit, for the few rows that decoding has."""
    width, rank, heads, dim, groups = sizes
    shapes = [
        (rank, width),
        (heads * dim, rank),
        (dim, width),
        (groups * 32, heads // groups * dim),
        (width, groups * 32),
    ]
    wq_a, wq_b, wkv, wo_a, wo_b = (packed(shape, numerics.FP8, i) for i, shape in enumerate(shapes))
    h, norms = normal(1, tokens, width).bfloat16(), (normal(rank, seed=1).detach(), normal(dim, seed=2).detach())
    angles = torch.polar(torch.ones(1, tokens, dim // 4), normal(1, tokens, dim // 4, seed=3).detach())
    latent = kernels.rms_norm(kernels.linear(h, wq_a), norms[0], 1e-6)
    q = kernels.rms_norm(kernels.linear(latent, wq_b).unflatten(-1, (heads, dim)), None, 1e-6)
    q = kernels.rotate(q, angles.unsqueeze(-2))
    kv = kernels.rotate(kernels.rms_norm(kernels.linear(h, wkv), norms[1], 1e-6), angles)
    ours = kernels.attention_inputs(h, wq_a, norms[0], wq_b, wkv, norms[1], angles, 1e-6)
    assert ours is not None and all(torch.equal(a, b) for a, b in zip(ours, (latent, q, kv)))
    back = kernels.rotate(q, angles.conj().unsqueeze(-2)).reshape(1, tokens, groups, -1)
    wanted = kernels.linear(kernels.grouped_linear(back, wo_a).flatten(-2), wo_b)
    out = kernels.attention_output(q, wo_a, wo_b, angles, groups)
    assert out is not None and torch.equal(out, wanted)
    assert kernels.attention_output(q.float(), wo_a, wo_b, angles, groups) is None
    proj = normal(heads, width, seed=4).detach().bfloat16()
    ours = kernels.index_queries(h, latent, wq_b, proj, angles, 0.3)
    turned = kernels.rotate(kernels.linear(latent, wq_b).unflatten(-1, (heads, dim)), angles.unsqueeze(-2))
    assert ours is not None and torch.equal(ours[0], turned)
    assert torch.equal(ours[1], kernels.linear(h, proj).float() * 0.3)


@needs_library
@torch.no_grad()
@given(st.integers(1, 80), st.sampled_from([1, 2]), st.sampled_from([1, 24, 40]), DTYPES)
def test_projection_of_a_compressor(tokens: int, halves: int, dim: int, dtype: torch.dtype) -> None:
    h, values, gates = (
        normal(*s, seed=i).to(dtype) for i, s in enumerate([(2, tokens, 70), *[(halves * dim, 70)] * 2])
    )
    ape, position = normal(4, halves * dim, seed=3).detach(), torch.arange(2 * tokens).view(2, tokens) + 3
    ours, wide = kernels.project(h, values, gates, ape, position, dim), h.double()
    wanted = reference.project(wide @ values.double().T, wide @ gates.double().T, ape.double(), position, dim)
    near(ours, wanted, torch.float32)


@needs_library
@torch.no_grad()
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_routing(rows: int, experts: int, k: int, ties: bool) -> None:
    """With a bias and with experts given by the token; whole numbers give ties."""
    k, logits = min(k, experts), normal(rows, experts).detach() * 6
    logits, bias = (logits.round(), torch.zeros(experts)) if ties else (logits, normal(experts, seed=1).detach())
    for given_ in (None, torch.rand(rows, experts).argsort(1)[:, :k]):
        ours = route.route(logits, None if given_ is not None else bias, given_, k, 1.5)
        wanted = reference.route(logits.double(), bias if given_ is None else None, given_, k, 1.5)
        assert torch.equal(ours[0], wanted[0])
        for a, b in zip(ours[1:], wanted[1:]):
            near(a, b.double(), torch.float32)


@needs_library
@torch.no_grad()
@given(st.integers(1, 40), st.sampled_from([(64, 64), (192, 64), (224, 16), (512, 64)]), DTYPES, st.integers(-12, 12))
def test_rows_of_a_cache(rows: int, shape: tuple[int, int], dtype: torch.dtype, size: int) -> None:
    """To the bit, ties and the sign of zero included; values around every step of either format."""
    d, rope = shape
    x = normal(rows, d).detach() * torch.logspace(-3, 3, rows)[:, None] * 2.0**size
    x[0, :32] = torch.arange(-16, 16) * 0.25  # ties of E2M1, of E4M3 below
    x[-1, 32:64] = (torch.arange(32) + 0.5) * 2.0**-9 * (1 + torch.arange(32) % 3)
    x[-1, 0], x[0, 5] = 448, -0.0
    x = x.to(dtype)
    assert torch.equal(rows_of.kv_row(x, rope).view(torch.uint8), numerics.kv_row(x, rope).view(torch.uint8))
    if not d & (d - 1):
        assert torch.equal(rows_of.index_row(x).view(torch.uint8), numerics.index_row(x).view(torch.uint8))
        turned = numerics.hadamard(x)  # its own inverse: rows that become ties again
        assert torch.equal(rows_of.index_row(turned).view(torch.uint8), numerics.index_row(turned).view(torch.uint8))


def spread(tokens: int, entries: int) -> tuple[Tensor, Tensor]:
    """low and high int64 [2, T] of ranges that grow, as visibility does; some are empty."""
    high = torch.stack([torch.linspace(0, entries, tokens).long(), torch.full((tokens,), entries)])
    return high // 3, high


@needs_library
@torch.no_grad()
@given(
    st.integers(1, 20), st.integers(1, 70), st.integers(1, 11), st.sampled_from([2, 6, 64]), st.integers(1, 30), DTYPES
)
def test_choice(tokens: int, entries: int, heads: int, dim: int, k: int, dtype: torch.dtype) -> None:
    """Against a stable sort of float64 scores; small whole numbers, so that ties are plenty and exact."""
    generator = torch.Generator().manual_seed(tokens * entries)
    q = torch.randint(-2, 3, (2, tokens, heads, dim), generator=generator).to(dtype)
    keys = torch.randint(-2, 3, (2, entries + 5, dim), generator=generator).to(dtype)[
        :, :entries
    ]  # as a history's view
    weights = torch.randint(-1, 3, (2, tokens, heads), generator=generator).float()
    low, high = spread(tokens, entries)
    chosen, count = attend.choose(q, weights, keys, low, high, k)
    dots = torch.einsum("bthd,bed->bthe", q.double(), keys.double()).relu()
    scores = torch.einsum("bth,bthe->bte", weights.double(), dots)
    for b in range(2):
        for t in range(tokens):
            seen = scores[b, t, low[b, t] : high[b, t]]
            best = seen.sort(descending=True, stable=True).indices[:k].sort().values + low[b, t]
            assert chosen[b, t, : count[b, t]].tolist() == best.tolist()


@needs_library
@torch.no_grad()
@given(
    st.integers(1, 20),
    st.integers(0, 70),
    st.integers(1, 11),
    st.sampled_from([2, 6, 64, 96]),
    st.integers(0, 30),
    DTYPES,
)
def test_attention(tokens: int, entries: int, heads: int, dim: int, k: int, dtype: torch.dtype) -> None:
    """Window rows, entries (all or chosen) and the sink, against a float64 softmax over exactly those rows."""
    q, near_rows = normal(2, tokens, heads, dim).to(dtype), normal(2, tokens + 9, dim, seed=1).to(dtype)
    far, sink = normal(2, entries + 5, dim, seed=2).to(dtype)[:, :entries], normal(heads, seed=3).detach()
    to = torch.arange(9, tokens + 9, dtype=torch.int32).expand(2, -1)
    start = (to - torch.tensor([[9], [3]], dtype=torch.int32)).clamp(min=0)
    low, high = spread(tokens, entries)
    picked = None
    if k:
        weights = torch.rand(2, tokens, heads, generator=torch.Generator().manual_seed(0))
        picked = attend.choose(q, weights, far, low, high, k) if entries else None
    out = attend.attend(q, near_rows, start, to, far if entries else None, low, high, picked, sink, dim**-0.5)
    for b in range(2):
        for t in range(tokens):
            rows = [near_rows[b, start[b, t] : to[b, t]]]
            if picked is not None:
                rows.append(far[b, picked[0][b, t, : picked[1][b, t]].long()])
            else:
                rows.append(far[b, low[b, t] : high[b, t]])
            seen = torch.cat(rows).double()
            logits = torch.cat((q[b, t].double() @ seen.T * dim**-0.5, sink[:, None].double()), 1)
            near(out[b, t], torch.softmax(logits, 1)[:, :-1] @ seen, dtype, roundings=2)


@needs_library
def test_bfloat16_rounds_once() -> None:
    """Each C++ result in bf16 is within one rounding of the float32 result on the same bf16 inputs."""
    streams, y = (normal(50, *s).detach().bfloat16() for s in ((4, 48), (48,)))
    site = [t.detach() for t in (normal(24, 192, seed=1), normal(24, seed=2), normal(3, seed=3))]
    low = hyper_connections.hc_enter(streams, *site, 20, 1e-6, 1e-6)
    high = reference.hc_enter(streams.float(), *site, 20, 1e-6, 1e-6)
    assert ((low[0].float() - high[0]).abs() <= high[0].abs() * 2**-8 + 1e-6).all()
    mixed = (
        hyper_connections.hc_leave(streams, y, *low[1:]).float(),
        reference.hc_leave(streams.float(), y.float(), *high[1:]),
    )
    assert ((mixed[0] - mixed[1]).abs() <= mixed[1].abs() * 2**-8 + 1e-5).all()
    x, w = normal(9, 64).detach().bfloat16(), normal(64, seed=1).detach()
    exact = reference.rms_norm(x.float(), w, 1e-6)
    assert ((rope.rms_norm(x, w, 1e-6).float() - exact).abs() <= exact.abs() * 2**-8).all()


def test_reference_gradients_in_float64() -> None:
    """Hand-written backward passes against finite differences."""
    d = torch.float64
    check = torch.autograd.gradcheck
    m = normal(4, 4, 3, dtype=d)
    assert check(lambda z: reference.sinkhorn(z, 20, 1e-6), (m,))
    angles = torch.polar(torch.ones(5, 2, dtype=d), torch.rand(5, 2, dtype=d)).to(torch.complex64)
    x = normal(5, 6)
    rotated = reference.rotate(x, angles)
    (gradient,) = torch.autograd.grad(rotated.square().sum(), x)
    assert torch.allclose(gradient, 2 * x, atol=1e-5), "a rotation keeps lengths, so the gradient of |Rx|^2 is 2x"
    tokens, weight = normal(7, 4, dtype=d), normal(7, dtype=d, seed=1)
    experts = [normal(3, 5, 4, dtype=d, seed=2), normal(3, 4, 5, dtype=d, seed=3), normal(3, 5, 4, dtype=d, seed=4)]

    def plain(x: Tensor, w: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        owner = [0, 0, 0, 0, 2, 2, 2]
        return torch.stack(
            [w[i] * (w2[e] @ reference.swiglu(w1[e] @ x[i], w3[e] @ x[i], 0.4)) for i, e in enumerate(owner)]
        )

    ours = reference.grouped_experts(*(t.float() for t in (tokens, weight, *experts)), [4, 0, 3], 0.4)
    wanted = plain(tokens, weight, *experts)
    assert torch.allclose(ours.double(), wanted, atol=1e-5)
    leaves = [tokens, weight, *experts]
    for a, b in zip(
        torch.autograd.grad(ours.double().square().sum(), leaves), torch.autograd.grad(wanted.square().sum(), leaves)
    ):
        assert torch.allclose(a, b, atol=1e-4)


def test_sinkhorn_is_nearly_doubly_stochastic() -> None:
    c = reference.sinkhorn(normal(4, 4, 100) * 3, 20, 1e-6)
    assert (c.sum(0) - 1).abs().max() < 1e-5, "it ends on a column pass"
    assert (c.sum(1) - 1).abs().max() < 0.2 and (c >= 0).all()


@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0, float("-inf")]), min_size=6, max_size=6), min_size=1),
    st.integers(1, 7),
)
def test_top_mask_breaks_ties_towards_the_lowest_index(rows: list[list[float]], k: int) -> None:
    mask = kernels.top_mask(torch.tensor(rows), k)
    for row, chosen in zip(rows, mask.tolist()):
        wanted = sorted(range(6), key=lambda i: (-row[i], i))[:k]
        assert [i for i in range(6) if chosen[i]] == sorted(wanted)


@needs_library
def test_the_library_is_the_one_asked_for(instructions: str) -> None:
    for dtype, kind in ((None, "any"), (torch.float32, "f32"), (torch.bfloat16, "bf16")):
        loaded = library.library(dtype)
        assert loaded is not None and f"/kernels-{instructions}-{kind}-" in loaded._name


@needs_library
def test_instructions_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_ISA", "")
    assert isa.choose(["generic", "avx2"]) == "avx2"
    monkeypatch.setenv("DSV4_ISA", "amx")
    assert isa.choose(["generic", "avx2", "avx512", "amx"]) == "amx"
    monkeypatch.setattr(library, "levels", lambda: ["generic", "avx2"])
    library.library.cache_clear()
    with pytest.raises(ValueError, match="DSV4_ISA=amx: this processor has no amx, only generic, avx2"):
        library.library()
    monkeypatch.setenv("DSV4_ISA", "sse9")
    with pytest.raises(ValueError, match="DSV4_ISA=sse9 is unknown; known: generic, avx2, avx512, amx"):
        library.library()
    monkeypatch.undo()
    library.library.cache_clear()


@needs_library
def test_processes_that_start_together_compile_once(tmp_path: Path, instructions: str) -> None:
    if instructions != "generic":
        pytest.skip("once is enough")
    counting = tmp_path / "g++"
    counting.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nexec {library._compiler()} "$@"\n')
    counting.chmod(0o755)
    code = "from dsv4.kernels.cpu import library as l; print(l._compiled('probe', [l._PROBE], ()))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(counting)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert len({process.communicate()[0] for process in started}) == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == 2  # one object, one library


@pytest.mark.skipif(isa.EMULATED not in ISAS or not shutil.which("objdump"), reason="needs AVX-512 and objdump")
def test_amx_compiles_to_tile_instructions() -> None:
    """It cannot run on a processor without them; the emulated build of the same source is tested above."""
    built = library.build("amx", torch.bfloat16)
    code = subprocess.run(["objdump", "-d", built], capture_output=True, text=True, check=True).stdout
    assert all(name in code for name in ("tdpbf16ps", "ldtilecfg", "sttilecfg", "tilerelease", "tileloadd"))
    assert hasattr(ctypes.CDLL(str(built)), "experts")


def test_without_a_compiler_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    library.library.cache_clear()
    try:
        assert library.library() is None
        assert "no C++ compiler" in caplog.text
        x = normal(3, 8)
        assert torch.equal(kernels.rms_norm(x, None, 1e-6), reference.rms_norm(x, None, 1e-6))
    finally:
        monkeypatch.undo()
        library.library.cache_clear()
