"""Every code, every scale, every tie, every edge: against ml_dtypes, exact fractions and plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4 import numerics
from dsv4.numerics import FP4, FP8, FP8_BASE, KV_ROW, Format, Packed, blocks, dequantise, quantise, rows, scale_values

peer = pytest.importorskip("tests.numerics.peer", reason="needs ml_dtypes: pip install ml_dtypes")
Patch = pytest.MonkeyPatch


# --- decoding ---


def test_all_fp4_codes_times_all_scales() -> None:
    """16 codes x 255 scales = float4_e2m1fn x 2^(byte - 127), to the bit (overflow included)."""
    elements = torch.arange(256, dtype=torch.uint8).view(16, 16)  # every pair of codes
    theirs = np.arange(256).reshape(16, 16)
    low, high = (np.asarray(c, np.uint8).view(peer.TYPES["I8"]).astype(np.float64) for c in (theirs & 15, theirs >> 4))
    wanted = np.stack((low, high), -1).reshape(16, 32)
    for byte in range(255):
        ours = dequantise(elements, torch.full((16, 1), byte, dtype=torch.uint8), FP4)
        with np.errstate(over="ignore"):
            assert np.array_equal(ours.numpy(), (wanted * 2.0 ** (byte - 127)).astype(np.float32)), byte
            assert np.array_equal(np.signbit(ours.numpy()), np.signbit(wanted))


def test_all_e4m3_codes_times_all_scales() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(1, -1)  # without its two NaNs
    wanted = codes.numpy().view(peer.TYPES["F8_E4M3"]).astype(np.float64)
    assert np.array_equal(codes.view(torch.float8_e4m3fn).double().numpy(), wanted)
    for byte in range(255):
        ours = dequantise(codes, torch.full((1, 2), byte, dtype=torch.uint8), FP8)
        with np.errstate(over="ignore"):
            assert np.array_equal(ours.numpy(), (wanted * 2.0 ** (byte - 127)).astype(np.float32)), byte


def test_scales_are_those_of_float8_e8m0fnu() -> None:
    every = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(scale_values(every), every.view(torch.float8_e8m0fnu).float())
    assert torch.equal(scale_values(every.view(torch.float8_e8m0fnu)), scale_values(every))


@pytest.mark.parametrize("form", [FP4, FP8])
def test_bfloat16_loses_nothing(form: Format) -> None:
    packed = quantise(torch.randn(256, 256, generator=torch.Generator().manual_seed(1)), form)
    assert torch.equal(dequantise(*packed, form, torch.bfloat16).float(), dequantise(*packed, form))


# --- what is refused ---


def test_nan_scales_are_refused() -> None:
    elements, scale = quantise(torch.ones(4, 64), FP4)
    scale[2, 1] = 255
    with pytest.raises(ValueError, match="1 of 8 scales are NaN"):
        dequantise(elements, scale, FP4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_float_scales_that_are_no_scales(value: float) -> None:
    elements, scale = quantise(torch.ones(4, 64), FP8_BASE)
    with pytest.raises(ValueError, match="1 of 1 scales are not positive numbers"):
        dequantise(elements, torch.full_like(scale, value), FP8_BASE)


@pytest.mark.parametrize("code", [127, 255])
def test_nan_elements_are_refused(code: int) -> None:
    elements, scale = quantise(torch.ones(4, 64), FP8)
    elements[1, 3] = code
    with pytest.raises(ValueError, match="1 of 256 elements are NaN"):
        dequantise(elements, scale, FP8)


@pytest.mark.parametrize("shape", [(4, 1), (3, 2), (4, 3), (4, 2, 1)])
def test_scales_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    elements, _ = quantise(torch.ones(4, 64), FP4)
    with pytest.raises(ValueError, match=r"scales of shape .*, expected \[4, 2\]"):
        dequantise(elements, torch.zeros(shape, dtype=torch.uint8), FP4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_cannot_be_quantised(value: float) -> None:
    x = torch.ones(3, 64)
    x[1, 40] = value
    with pytest.raises(ValueError, match="not finite"):
        quantise(x, FP4)


def test_odd_columns_do_not_pack() -> None:
    with pytest.raises(ValueError, match="33 columns do not pack into I8, 2 per byte"):
        quantise(torch.ones(2, 33), FP4)


# --- encoding: checks that a broken rule must fail (see MUTANTS) ---


def grid(dtype: str) -> np.ndarray:
    """Every number of a type, every midpoint between two, and their float32 neighbours; one row per 30, largest
    first so that a block's scale is 1."""
    codes = np.arange(16 if dtype == "I8" else 256, dtype=np.uint8).view(peer.TYPES[dtype]).astype(np.float32)
    numbers = np.unique(codes[np.isfinite(codes)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    every = np.concatenate([numbers, middles, [np.float32(-0.0)]])
    every = np.concatenate([every, np.nextafter(every, np.float32(0)), np.nextafter(every, np.float32(1e9))])
    every = every[np.abs(every) <= numbers.max()].astype(np.float32)
    every = np.pad(every, (0, -len(every) % 30)).reshape(-1, 30)
    edge = np.full((len(every), 1), numbers.max(), np.float32)
    return np.concatenate([edge, every, -edge], 1)


def check_rounding() -> None:
    """Nearest, ties to even, in both types, as ml_dtypes casts."""
    for form in (FP4, Format("F8_E4M3", 1, (1, 32), "F8_E8M0", 448, 1e-30)):
        x = grid(form.dtype)
        elements, scale = quantise(torch.from_numpy(x), form)
        wanted = x.astype(peer.TYPES[form.dtype])
        assert (scale == 127).all()
        assert np.array_equal(dequantise(elements, scale, form).numpy(), wanted.astype(np.float32))
        bits = wanted.view(np.uint8)
        assert np.array_equal(elements.numpy(), bits[:, 0::2] | bits[:, 1::2] << 4 if form is FP4 else bits)


def check_scales() -> None:
    """The smallest power of two that holds the block, at and around every boundary; floors."""
    for form in (FP4, FP8, numerics.ACTIVATION):
        tops = [form.largest * 2.0**e for e in range(-30, 30)]
        amax = np.array([t * (1 + d * 2.0**-23) for t in tops for d in (-1, 0, 1, 2e6)] + [0.0, 1e-30], np.float32)
        wanted = [peer.exponent(float(a), int(form.largest), form.floor) + 127 for a in amax]
        assert blocks.scale_bytes(torch.from_numpy(amax), form).tolist() == wanted


def check_blocks() -> None:
    """Whole quantisation against loops, on sizes that are no multiple of anything."""
    generator = torch.Generator().manual_seed(2)
    for form in (FP4, FP8, FP8_BASE, KV_ROW, numerics.ACTIVATION):
        for shape in ((130, 260), (1, 2), (127, 66), (256, 128), (3, 34)):
            x = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).mul(8).exp2()
            elements, scale = quantise(x, form)
            values, exponents = peer.quantise(x.numpy(), form.dtype, form.block, form.floor)
            assert np.array_equal(dequantise(elements, scale, form).numpy(), values), (form, shape)
            assert np.array_equal(np.log2(scale_values(scale).numpy()), exponents)
            assert elements.shape == form.packed(shape) and scale.shape == form.scales(shape)


def check_nibbles() -> None:
    """Element 2b in the low nibble of byte b."""
    elements, scale = quantise(torch.tensor([[1.0, -6.0, 0.5, 4.0]]), FP4)
    assert elements.tolist() == [[0b1111_0010, 0b0110_0001]] and scale.tolist() == [[127]]


def check_hadamard() -> None:
    """Sylvester's matrix; orthonormal, so a product of two transformed vectors is unchanged."""
    for n in (1, 2, 16, 128):
        ours = rows.hadamard(torch.eye(n))
        assert np.allclose(ours.numpy(), peer.hadamard_matrix(n), atol=1e-7)
        assert torch.allclose(ours @ ours.T, torch.eye(n), atol=1e-6)


def check_index_rows() -> None:
    """Hadamard first, then FP4 in blocks of 32; and as 68 bytes."""
    x = torch.randn(7, 3, 128, generator=torch.Generator().manual_seed(3))
    turned = x.flatten(0, 1).double().numpy() @ peer.hadamard_matrix(128)
    wanted, _ = peer.quantise(turned.astype(np.float32), "I8", (1, 32), 6 * 2.0**-126)
    ours = rows.index_row(x).flatten(0, 1).numpy()
    # The two transforms round differently, so a value next to a tie may fall either way.
    assert (ours != wanted).mean() < 1e-3
    data = rows.pack_index(x)
    assert data.shape == (7, 3, 68) and torch.equal(rows.unpack_index(data, 128, torch.float32), rows.index_row(x))


def check_kv_rows() -> None:
    """448 channels in 7 blocks of 64, 64 rotated ones untouched; and as 584 bytes."""
    x = (torch.randn(5, 512, generator=torch.Generator().manual_seed(4)) * 3).bfloat16()
    wanted, scales = peer.quantise(x[:, :448].float().numpy(), "F8_E4M3", (1, 64), 1e-4)
    ours = rows.kv_row(x, 64)
    assert np.array_equal(ours[:, :448].float().numpy(), wanted) and torch.equal(ours[:, 448:], x[:, 448:])
    data = rows.pack_kv(x, 64)
    assert data.shape == (5, 584) and np.array_equal(data[:, 576:583].numpy(), scales + 127)
    assert torch.equal(data[:, 448:576].contiguous().view(torch.bfloat16), x[:, 448:])
    assert torch.equal(rows.unpack_kv(data, 512, 64), ours)


def check_linear() -> None:
    """Inputs in E4M3 per row and 128 channels, against float64."""
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(6, 320, generator=generator), torch.randn(40, 320, generator=generator)
    x *= torch.tensor([1.0, 100.0, 1e-3, 1.0, 0.0, 1.0])[:, None]
    x[0, 200] = 3000.0
    for form in (FP4, FP8):
        weight = Packed(*quantise(w, form), form)
        wanted = peer.linear(x.numpy(), weight.dequantise().numpy())
        error = np.abs(numerics.packed_linear(x, weight).numpy() - wanted)
        assert error.max() <= 1e-6 * np.abs(wanted).max(1).max()
        assert (error <= 1e-5 * np.abs(wanted).max(1, keepdims=True)).all()


CHECKS: list[Callable[[], None]] = [
    check_rounding, check_scales, check_blocks, check_nibbles, check_hadamard, check_index_rows, check_kv_rows,
    check_linear,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rule(check: Callable[[], None]) -> None:
    check()


# --- each rule broken on purpose: its check must fail ---

MUTANTS: dict[str, tuple[Callable[[Patch], None], Callable[[], None]]] = {}


def mutant(check: Callable[[], None]) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def add(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS[function.__name__] = (function, check)
        return function

    return add


@mutant(check_rounding)
def ties_go_up(patch: Patch) -> None:
    patch.setattr(
        blocks, "_MIDDLE", torch.nextafter(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]), torch.zeros(7))
    )


@mutant(check_rounding)
def ties_go_down(patch: Patch) -> None:
    patch.setattr(blocks, "_MIDDLE", torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))


@mutant(check_rounding)
def zero_has_no_sign(patch: Patch) -> None:
    patch.setattr(torch, "signbit", lambda x: x < 0)


@mutant(check_scales)
def scale_is_rounded_down(patch: Patch) -> None:
    whole = blocks.scale_bytes
    patch.setattr(blocks, "scale_bytes", lambda amax, form: whole(amax, form) - 1)


@mutant(check_scales)
def scale_of_a_full_block_is_doubled(patch: Patch) -> None:
    whole = blocks.scale_bytes
    patch.setattr(blocks, "scale_bytes", lambda amax, form: whole(amax * (1 + 1e-6), form))


@mutant(check_blocks)
def short_blocks_come_first(patch: Patch) -> None:
    whole = blocks._per_block
    patch.setattr(blocks, "_per_block", lambda x, form: whole(x.flip(-1), form).flip(-1))


@mutant(check_blocks)
def blocks_begin_one_element_early(patch: Patch) -> None:
    whole = blocks._per_block
    patch.setattr(blocks, "_per_block", lambda x, form: whole(x.roll(1, -1), form))


@mutant(check_nibbles)
def high_nibble_first(patch: Patch) -> None:
    whole = blocks.encode_e2m1
    patch.setattr(blocks, "encode_e2m1", lambda x: whole(x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)))


@mutant(check_hadamard)
def transform_is_not_normalised(patch: Patch) -> None:
    whole = rows.hadamard
    patch.setattr(rows, "hadamard", lambda x: whole(x) * x.shape[-1] ** 0.5)


@mutant(check_index_rows)
def no_hadamard(patch: Patch) -> None:
    patch.setattr(rows, "hadamard", lambda x: x)


@mutant(check_index_rows)
def hadamard_after_rounding(patch: Patch) -> None:
    patch.setattr(rows, "index_row", lambda x: rows.hadamard(blocks.rounded(x, FP4)))


@mutant(check_index_rows)
def index_rows_are_not_rounded(patch: Patch) -> None:
    patch.setattr(rows, "rounded", lambda x, form: x)


@mutant(check_kv_rows)
def rotated_channels_are_rounded(patch: Patch) -> None:
    patch.setattr(rows, "kv_row", lambda x, rope: blocks.rounded(x, KV_ROW))


@mutant(check_kv_rows)
def kv_blocks_of_128(patch: Patch) -> None:
    patch.setattr(rows, "KV_ROW", numerics.ACTIVATION)


@mutant(check_linear)
def inputs_are_not_rounded(patch: Patch) -> None:
    patch.setattr(numerics.packed, "rounded", lambda x, form: x)


@mutant(check_linear)
def inputs_have_one_scale_a_row(patch: Patch) -> None:
    patch.setattr(numerics.packed, "ACTIVATION", Format("F8_E4M3", 1, (1, 1024), "F8_E8M0", 448.0, 1e-4))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(monkeypatch: Patch, name: str) -> None:
    break_it, check = MUTANTS[name]
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# --- shapes and stability ---


@settings(max_examples=40)
@given(st.integers(1, 140), st.integers(1, 140), st.integers(-20, 20), st.integers(0, 1000))
def test_rounding_twice_changes_nothing(height: int, width: int, power: int, seed: int) -> None:
    x = torch.randn(height, 2 * width, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    for form in (FP4, FP8):
        once = dequantise(*quantise(x, form), form)
        assert torch.equal(dequantise(*quantise(once, form), form), once)
        assert (once - x).abs().max() <= x.abs().max() / (3 if form is FP4 else 14)


def test_stacks_are_quantised_matrix_by_matrix() -> None:
    x = torch.randn(3, 130, 70, generator=torch.Generator().manual_seed(6))
    for form in (FP4, FP8):
        stack = Packed(*quantise(x, form), form)
        assert stack.shape == x.shape
        for e in range(3):
            one = Packed(*quantise(x[e], form), form)
            assert torch.equal(stack[e].elements, one.elements) and torch.equal(stack[e].scale, one.scale)


def test_casting_a_model_leaves_packed_weights_alone() -> None:
    weight: Tensor = Packed(*quantise(torch.randn(8, 64), FP8), FP8).double().half().elements
    assert weight.dtype == torch.uint8
