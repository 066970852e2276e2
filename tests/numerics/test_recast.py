"""FP4 in FP8: lossless up to the stated ratios and not one step further; training passes gradients straight."""

from __future__ import annotations

import pytest
import torch

from dsv4.numerics import (
    FP4,
    FP8,
    FP8_BASE,
    deployed_weight,
    dequantise,
    fp4_values,
    hadamard,
    index_row,
    quantise,
    recast,
    trained_index_row,
    trained_weight,
)  # fmt: skip
from dsv4.numerics.recast import REACH


def every_code(ratio: int, base: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """A 128 x 128 block whose FP4 scales are 2^ratio apart, all 16 codes under both."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(128, 4)
    scale = torch.full((128, 4), base, dtype=torch.uint8)
    scale[77, 2] += ratio
    return codes | codes << 4, scale


@pytest.mark.parametrize("anchor", ["largest", "smallest"])
def test_lossless_up_to_the_reach_and_no_further(anchor: str) -> None:
    for ratio in range(REACH[anchor] + 2):
        elements, scale = every_code(ratio)
        got = recast(elements, scale, anchor)  # type: ignore[arg-type]
        assert got.ratio == ratio and got.exact == (ratio <= REACH[anchor]), ratio
        same = torch.equal(dequantise(got.elements, got.scale, FP8), dequantise(elements, scale, FP4))
        assert same == got.exact


def test_the_released_converters_formula() -> None:
    """New scale = largest FP4 scale / 2^6, element = fp4 * (s / new scale)."""
    elements, scale = quantise(torch.randn(256, 384, generator=torch.Generator().manual_seed(1)), FP4)
    got = recast(elements, scale)
    wanted = scale.view(2, 128, 3, 4).amax((1, 3)) - 6
    assert torch.equal(got.scale, wanted) and got.exact
    s = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
    new = torch.exp2(wanted.float() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)
    unit = dequantise(elements, torch.full_like(scale, 127), FP4)
    assert torch.equal(got.elements.view(torch.float8_e4m3fn).float(), unit * (s / new))


def test_zero_blocks_do_not_count() -> None:
    w = torch.randn(128, 128, generator=torch.Generator().manual_seed(2))
    w[5, 32:64] = 0
    w[:, 96:] = 0
    elements, scale = quantise(w, FP4)
    assert int(scale.min()) == 1  # 2^-126: a ratio of 2^120 if it counted
    got = recast(elements, scale)
    assert got.exact and got.ratio < 14
    nothing = recast(*quantise(torch.zeros(130, 64), FP4))
    assert nothing.exact and nothing.ratio == 0


@pytest.mark.parametrize("shape", [(1, 2), (129, 130), (200, 34), (3, 300, 64)])
def test_edges(shape: tuple[int, ...]) -> None:
    elements, scale = quantise(torch.randn(shape, generator=torch.Generator().manual_seed(3)), FP4)
    for form in (FP8, FP8_BASE):
        got = recast(elements, scale, form=form)
        assert got.exact and got.scale.shape == FP8.scales(shape)
        assert torch.equal(dequantise(got.elements, got.scale, form), dequantise(elements, scale, FP4))


def test_scales_outside_ue8m0_are_refused() -> None:
    elements, scale = every_code(0, base=3)
    with pytest.raises(ValueError, match=r"2\^-130\.\.2\^-130, outside UE8M0"):
        recast(elements, scale)


def test_gradient_of_the_fp8_weight_is_the_masters() -> None:
    """Same gradient as an FP8 weight that is a leaf itself; forward is the FP4 value, which FP8 holds exactly."""
    generator = torch.Generator().manual_seed(4)
    master = torch.randn(70, 96, generator=generator, requires_grad=True)
    x = torch.randn(5, 96, generator=generator)
    seen = trained_weight(master)
    assert torch.equal(seen, dequantise(*quantise(master.detach(), FP4), FP4))
    (x @ seen.T).square().sum().backward()
    leaf = deployed_weight(master.detach()).requires_grad_()
    (x @ leaf.T).square().sum().backward()
    assert torch.equal(master.grad, leaf.grad) and bool(master.grad.ne(0).all())  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("spread", [0, 3, 12, 20, 60])
@pytest.mark.parametrize("shape", [(128, 128), (257, 96), (3, 130, 64), (5, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_sees_the_bytes_of_deployment(spread: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The arithmetic of training against quantising, recasting and expanding: to the bit and the sign of zero, also
    where FP8 cannot hold the FP4 scales of a block."""
    generator = torch.Generator().manual_seed(spread)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2((torch.rand((*shape[:-1], 1), generator=generator) - 0.5) * spread)
    x[..., 0, :] = 0
    x[..., 1, :8] = torch.tensor([6, 0.25, 0.75, 1.25, -1.75, -2.5, 3.5, -5])  # every tie
    x = x.to(dtype)
    four = quantise(x, FP4)
    eight = recast(*four)
    assert eight.exact or eight.ratio > REACH["largest"]
    values = dequantise(*four, FP4, dtype)
    assert torch.equal(fp4_values(x), values) and torch.equal(fp4_values(x).signbit(), values.signbit())
    assert torch.equal(deployed_weight(x), dequantise(eight.elements, eight.scale, FP8, dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = torch.ones(130, 96)
    x[129, 70] = bad
    for seen in (fp4_values(x), deployed_weight(x)):
        assert bool(seen[129, 64:].isnan().all()) and bool(seen[:128].eq(1).all()) and bool(seen[129, :64].eq(1).all())


def test_index_rows_pass_gradients_through_the_transform() -> None:
    generator = torch.Generator().manual_seed(5)
    x, g = torch.randn(4, 32, generator=generator, requires_grad=True), torch.randn(4, 32, generator=generator)
    out = trained_index_row(x)
    assert torch.equal(out, index_row(x.detach()))
    out.backward(g)
    assert torch.allclose(x.grad, hadamard(g), atol=1e-6)  # type: ignore[arg-type]


def test_training_learns_weights_that_fp4_keeps() -> None:
    """Least squares with an FP4-exact answer: straight-through descent ends near it, rounding afterwards does not."""
    generator = torch.Generator().manual_seed(6)
    target = dequantise(*quantise(torch.randn(8, 64, generator=generator), FP4), FP4)
    x = torch.randn(256, 64, generator=generator)
    master = torch.zeros(8, 64, requires_grad=True)
    optimiser = torch.optim.Adam([master], lr=0.02)
    losses = []
    for _ in range(300):
        loss = (x @ (trained_weight(master) - target).T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_a_model_in_quantisation_aware_training() -> None:
    """Forward as deployed (experts in FP4, index rows in FP4), gradients on the float32 masters, every one of them."""
    from dsv4.config import Config
    from dsv4.model import Transformer
    from dsv4.numerics import quantisation_aware
    from tests.parity.peer import randomise

    config = Config.preset("micro")
    model = quantisation_aware(randomise(Transformer(config), 1))
    assert isinstance(model, Transformer)
    ids = torch.randint(0, 512, (1, 96), generator=torch.Generator().manual_seed(2))
    deployed = randomise(Transformer(config), 1)
    with torch.no_grad():
        for name, p in deployed.named_parameters():
            if ".ffn.experts." in name:
                p.copy_(dequantise(*quantise(p, FP4), FP4))
        for block in deployed.layers:
            if block.layer.indexer:
                block.attn.indexer.round = block.attn.indexer.compressor.round = index_row
        assert (model(ids) - deployed(ids)).abs().max() < 1e-4
        assert (model(ids) - randomise(Transformer(config), 1)(ids)).abs().max() > 1e-2
    out = model.train_forward(ids, torch.zeros_like(ids))
    (model.logits(out.hidden).square().mean() + out.indexer_loss).backward()
    for name, p in model.named_parameters():
        if ".ffn.experts." in name and not name.startswith("mtp."):
            assert p.grad is not None and bool(p.grad.ne(0).any()), name
    queries = model.layers[1].attn.indexer.wq_b.weight.grad
    assert queries is not None and bool(queries.ne(0).any())
