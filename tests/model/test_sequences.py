"""One network, however the tokens arrive: any chunking, any batch, any packing, saved and restored anywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsv4.model.attention as attention
from dsv4.config import Config
from dsv4.kernels import reference
from dsv4.kernels.cpu import linear
from dsv4.kernels.cpu.library import library
from dsv4.model import State, Transformer
from dsv4.model.dtypes import dtype_of
from tests.parity.configs import tiny
from tests.parity.peer import randomise

TOLERANCE = 2e-5
SMALL = tiny()
REAL = tiny(
    hidden_size=32,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0),
    num_hash_layers=1,
    sliding_window=128,
    index_topk=32,
    moe_intermediate_size=16,
    n_routed_experts=4,
    max_position_embeddings=65536,
)


def make(config: Config, seed: int = 5) -> Transformer:
    return randomise(Transformer(config), seed, gain=1.0)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small() -> Transformer:
    return make(SMALL)


@torch.no_grad()
@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 3))
def test_any_chunking(sizes: list[int], seed: int) -> None:
    model, ids = make(SMALL), tokens(2, sum(sizes), seed=seed)
    state = model.new_state(2)
    pieces = torch.cat([model(part, state) for part in ids.split(sizes, 1)], 1)
    assert (pieces - model(ids)).abs().max() < TOLERANCE
    assert state.length.tolist() == [sum(sizes)] * 2


@torch.no_grad()
def test_saved_and_restored_at_every_position() -> None:
    """Published window and ratios; a state is written out and read back at every position of 0..3x128+5 and decoding
    goes on."""
    model, end = make(REAL), 3 * 128 + 5
    ids = tokens(1, end + 8)
    whole, state = model(ids), model.new_state()
    for position in range(end + 1):
        restored = model.new_state().load_state_dict({k: v.clone() for k, v in state.state_dict().items()})
        several = model(ids[:, position : position + 7], restored)
        assert (several - whole[:, position : position + 7]).abs().max() < TOLERANCE, position
        one = model(ids[:, position : position + 1], state)
        assert (one - whole[:, position : position + 1]).abs().max() < TOLERANCE, position


@torch.no_grad()
@settings(max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=5), st.lists(st.integers(0, 9), min_size=5, max_size=5))
def test_ragged_batch_is_one_by_one(first: list[int], second: list[int]) -> None:
    """Rows of different lengths, twice in a row; pads leave no trace. The first row may be the shortest."""
    model, rows = make(SMALL), len(first)
    state, singles = model.new_state(rows), [model.new_state() for _ in range(rows)]
    for call, lengths in enumerate((first, second[:rows])):
        width = max([*lengths, 1])
        ids = tokens(rows, width, seed=call)
        together = model(ids, state, lengths=lengths)
        for row, length in enumerate(lengths):
            if length:
                alone = model(ids[row : row + 1, :length], singles[row])
                assert (together[row, :length] - alone[0]).abs().max() < TOLERANCE
    step = tokens(rows, 1, seed=9)
    together = model(step, state)
    for row in range(rows):
        assert (together[row] - model(step[row : row + 1], singles[row])[0]).abs().max() < TOLERANCE


@torch.no_grad()
def test_ragged_without_a_state(small: Transformer) -> None:
    ids = tokens(3, 40)
    together = small(ids, lengths=[7, 40, 23])
    for row, length in enumerate((7, 40, 23)):
        assert (together[row, :length] - small(ids[row : row + 1, :length])[0]).abs().max() < TOLERANCE


@torch.no_grad()
def test_select_and_clone(small: Transformer) -> None:
    ids, step = tokens(3, 21), tokens(3, 1, seed=1)
    state = small.new_state(3)
    small(ids, state)
    copy, picked = state.clone(), state.select([2, 0, 2])
    wanted = small(step, state)
    assert torch.equal(small(step, copy), wanted)
    assert (small(step[[2, 0, 2]], picked) - wanted[[2, 0, 2]]).abs().max() < TOLERANCE


@torch.no_grad()
def test_last_logits(small: Transformer) -> None:
    ids = tokens(2, 30)
    logits = small.last_logits(ids, small.new_state(2), lengths=[30, 11])
    full = small(ids)
    assert (logits - torch.stack((full[0, 29], full[1, 10]))).abs().max() < TOLERANCE


def packed(model: Transformer, samples: list[Tensor], mode: str, mtp: bool = True) -> tuple[Tensor, Tensor]:
    ids = torch.cat(samples)[None]
    documents = torch.cat([torch.full_like(sample, 10 + i) for i, sample in enumerate(samples)])[None]
    out = model.train_forward(ids, documents, indexer=mode, mtp=mtp)
    return out.hidden[0], out.mtp_hidden[0]


@pytest.mark.parametrize("mode", ["off", "sparse"])
@torch.no_grad()
def test_packed_samples_never_see_each_other(small: Transformer, mode: str) -> None:
    """Window, both compressors and the indexer: every sample gives what it gives alone, in any company."""
    lengths = [1, 3, 4, 30, 8, 61, 2, 17]
    samples = [tokens(n, seed=n) for n in lengths]
    together, guesses = packed(small, samples, mode)
    for sample, hidden, guess in zip(samples, together.split(lengths), guesses.split(lengths)):
        alone, alone_guess = packed(small, [sample], mode)
        assert (hidden - alone).abs().max() < TOLERANCE
        if len(sample) > 1:  # the last slot's next token belongs to the neighbour and is never scored
            assert (guess[:-1] - alone_guess[:-1]).abs().max() < TOLERANCE


@torch.no_grad()
def test_packed_is_what_serving_computes(small: Transformer) -> None:
    samples = [tokens(n, seed=n) for n in (50, 33)]
    together = small.logits(packed(small, samples, "sparse")[0])
    assert (together[:50] - small(samples[0][None])[0]).abs().max() < TOLERANCE
    assert (together[50:] - small(samples[1][None])[0]).abs().max() < TOLERANCE


def in_plain_torch(patch: pytest.MonkeyPatch) -> None:
    for name in ("attend", "choose"):
        patch.setattr(attention, name, getattr(reference, name))


@torch.no_grad()
def test_long_prefill_in_pieces_of_bounded_memory(monkeypatch: pytest.MonkeyPatch, small: Transformer) -> None:
    ids = tokens(2, 203)
    whole = small(ids)
    in_plain_torch(monkeypatch)
    monkeypatch.setitem(reference.attend.__globals__, "_SCRATCH", 1)  # the smallest pieces there are
    assert (small(ids) - whole).abs().max() < TOLERANCE


@torch.no_grad()
def test_attention_cost_follows_window_and_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the context, a CSA query multiplies with the window's rows and at most twice top-k entries."""
    model = make(tiny(num_hidden_layers=2, compress_ratios=(4, 4, 0), index_topk=4))
    seen: list[int] = []
    real = attention.joint_attention

    def watch(q: Tensor, near: Tensor, near_mask: Tensor, far: Tensor | None, *rest: object) -> object:
        seen.append(near.shape[1] + (0 if far is None else far.shape[1]))
        return real(q, near, near_mask, far, *rest)  # type: ignore[arg-type]

    def run() -> None:
        state = model.new_state()
        model(tokens(1, 300), state)
        model(tokens(1, 1), state)

    monkeypatch.setattr(attention, "joint_attention", watch)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "differentiable", lambda trace: True)
        run()
    assert max(seen) <= 16 + 8 + 2 * 4
    fused, read = attention.attend, []  # inference reads exactly window + top-k rows

    def count(q: Tensor, near: Tensor, start: Tensor, to: Tensor, *rest: object) -> object:
        picked = rest[3]
        read.append(int((to - start).max()) + (int(picked[1].max()) if isinstance(picked, tuple) else 0))
        return fused(q, near, start, to, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "attend", count)
    run()
    assert max(read) == 16 + 4


@torch.no_grad()
@pytest.mark.parametrize("plain", [False, True])
def test_the_fused_path_is_the_masked_one(monkeypatch: pytest.MonkeyPatch, small: Transformer, plain: bool) -> None:
    """Ragged prefill and decoding, reading rows (in C++ where there is a compiler, in plain torch) and under masks."""

    def run() -> Tensor:
        state = small.new_state(2)
        parts = [small(tokens(2, 90), state, [90, 41])[:, -1]] + [small(tokens(2, 1, seed=i), state) for i in range(9)]
        return torch.cat([part.flatten(0, -2) for part in parts])

    if plain:
        in_plain_torch(monkeypatch)
    fused = run()
    monkeypatch.setattr(attention, "differentiable", lambda trace: True)
    assert (run() - fused).abs().max() < TOLERANCE


def test_wrong_calls_say_the_numbers(small: Transformer) -> None:
    with pytest.raises(ValueError, match="2 rows, the state has 1"):
        small(tokens(2, 3), small.new_state(1))
    with pytest.raises(ValueError, match=r"lengths \[4, 2\]"):
        small(tokens(2, 3), lengths=[4, 2])
    with pytest.raises(ValueError, match="at least one token"):
        small(tokens(2, 0))
    with pytest.raises(ValueError, match="off, warmup or sparse"):
        small.train_forward(tokens(1, 4), tokens(1, 4), indexer="dense")
    with pytest.raises(ValueError, match="tensors"):
        small.new_state().load_state_dict({"length": torch.zeros(1)})
    assert isinstance(small.new_state(), State)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_mode_gives_the_same_bits_in_every_batch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A sequence alone, and as any row of a batch of up to 64, with one thread and with two: prefill and decoding."""
    if library() is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(linear, "EXACT", True)
    model, ids, threads = make(SMALL).to(dtype), tokens(64, 70), torch.get_num_threads()
    for name, p in model.named_parameters():
        p.data = p.data.to(dtype_of(name, dtype))

    def run(rows: slice) -> Tensor:
        state = model.new_state(len(ids[rows]))
        return torch.cat([model(part, state)[:, -1:] for part in ids[rows].split([64, 1, 1, 4], 1)], 1)

    try:
        whole = run(slice(0, 64))
        for count, size in ((1, 1), (2, 1), (2, 5), (1, 33)):
            torch.set_num_threads(count)
            for start in (0, 3, 31):
                rows = slice(start, start + size)
                assert torch.equal(run(rows), whole[rows]), (count, size, start)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_a_model_cast_as_a_whole_still_runs() -> None:
    """`model.to(torch.bfloat16)` also casts what should stay float32: less exact, but no crash."""
    model, ids = make(SMALL), tokens(1, 40)
    wanted = model(ids)
    assert (model.to(torch.bfloat16)(ids) - wanted).abs().mean() < 0.2
