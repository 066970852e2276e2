"""Muon: its orthogonalisation, its update, its agreement with torch's, and the table of who trains what."""

from __future__ import annotations

import pytest
import torch

from dsv4.config import Config
from dsv4.training import muon
from dsv4.training.muon import HYBRID, MuonStack, newton_schulz
from dsv4.training.optimizer import AdamW, Optimizer, OptimizerSettings, is_adamw, logical_rows

SHAPES = [(64, 64), (64, 128), (96, 256), (256, 256), (4, 1024), (16, 1024)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(x: torch.Tensor) -> float:
    return (torch.linalg.svdvals(x.float()) - 1).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_one(shape: tuple[int, int]) -> None:
    x = gaussian(2, *shape)
    assert spread(newton_schulz(x, dtype=torch.float32)) < 1e-3
    assert spread(newton_schulz(x)) < 1e-2
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(newton_schulz(x, dtype=torch.float32), left @ right, atol=2e-3, rtol=0)


def test_each_variant_of_the_polynomial_breaks_it() -> None:
    """Five steps, ten fast steps, no stabilising step, swapped order: none reaches 1e-3."""
    fast, slow = HYBRID[0], HYBRID[-1]
    x = gaussian(1, 512, 512)
    assert spread(newton_schulz(x, dtype=torch.float32)) < 1e-3
    for broken in ([fast] * 5, [fast] * 10, [fast] * 8, [slow] * 2 + [fast] * 8, [slow] * 10):
        assert spread(newton_schulz(x, broken, torch.float32)) > 0.1, broken


def one_step(weight: torch.Tensor, grads: list[torch.Tensor], lr: float = 1.0, wd: float = 0.0) -> torch.Tensor:
    weight = weight.clone()
    stack = MuonStack([weight], momentum=0.95, weight_decay=wd, dtype=torch.float32)
    for grad in grads:
        stack.add_grad(0, grad)
        stack.step(lr)
    return weight


@pytest.mark.parametrize("shape", [*SHAPES, (256, 96), (512, 128)])
def test_update_rms_is_0_18_for_any_shape(shape: tuple[int, int]) -> None:
    for scale in (1e-6, 1.0, 1e4):
        update = one_step(torch.zeros(shape), [gaussian(*shape) * scale])
        assert update.square().mean().sqrt().item() == pytest.approx(0.180, abs=1e-3)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (32, 32)])
def test_equals_torch_muon_with_its_coefficients(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's momentum has a (1 - mu) factor, which the normalisation cancels; its RMS is 0.2 and its steps five."""
    theirs = torch.nn.Parameter(gaussian(*shape, seed=9) * 0.02)
    ours = theirs.data.clone()
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    stack = MuonStack([ours], momentum=0.95, weight_decay=0.1, dtype=torch.float32)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # theirs casts inside; no rounding here
    monkeypatch.setattr(muon, "UPDATE_RMS", 0.2)
    five = torch.optim.Muon([theirs]).defaults["ns_coefficients"]
    real = newton_schulz
    monkeypatch.setattr(muon, "newton_schulz", lambda x, dtype: real(x, [five] * 5, dtype))
    for step in range(4):
        theirs.grad = gaussian(*shape, seed=step)
        reference.step()
        stack.add_grad(0, theirs.grad)
        stack.step(0.01)
    moved = (theirs.data - gaussian(*shape, seed=9) * 0.02).square().mean().sqrt()
    assert (ours - theirs.data).square().mean().sqrt() < 1e-4 * moved


def test_nesterov_momentum_decay_and_learning_rate() -> None:
    weight, g1, g2 = gaussian(8, 16, seed=3), gaussian(8, 16, seed=4), gaussian(8, 16, seed=5)
    m1 = g1
    first = weight * (1 - 0.1 * 0.5) - 0.1 * 0.18 * 4 * newton_schulz((g1 + 0.95 * m1)[None], dtype=torch.float32)[0]
    m2 = 0.95 * m1 + g2
    second = first * (1 - 0.1 * 0.5) - 0.1 * 0.18 * 4 * newton_schulz((g2 + 0.95 * m2)[None], dtype=torch.float32)[0]
    torch.testing.assert_close(one_step(weight, [g1, g2], lr=0.1, wd=0.5), second)
    plain = first * 0.95 - 0.1 * 0.18 * 4 * newton_schulz(m2[None], dtype=torch.float32)[0]
    assert (plain - second).abs().max() > 1e-3, "without look-ahead the update must differ"


NANO = Config.preset("nano")


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("layers.3.ffn.experts.w1", (8, 96, 256), (96,) * 8),
        ("layers.3.ffn.experts.w2", (8, 256, 96), (256,) * 8),
        ("layers.3.hc_attn_fn", (24, 1024), (4, 4, 16)),
        ("mtp.0.hc_ffn_fn", (24, 1024), (4, 4, 16)),
        ("hc_head_fn", (4, 1024), (4,)),
        ("layers.0.attn.wo_a.weight", (128, 256), (64, 64)),
        ("layers.2.attn.compressor.wkv.weight", (128, 256), (64, 64)),
        ("layers.2.attn.indexer.compressor.wgate.weight", (64, 256), (32, 32)),
        ("layers.3.attn.compressor.wkv.weight", (64, 256), (64,)),
        ("layers.3.attn.wq_b.weight", (512, 128), (512,)),
        ("layers.4.ffn.gate.weight", (8, 256), (8,)),
    ],
)
def test_logical_matrices(name: str, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    assert not is_adamw(name)
    assert logical_rows(name, shape, NANO) == rows


@pytest.mark.parametrize(
    "name",
    "embed.weight head.weight norm.weight layers.0.attn_norm.weight layers.0.attn.q_norm.weight mtp.0.enorm.weight "
    "layers.2.attn.compressor.norm.weight layers.2.attn.compressor.ape layers.0.attn.attn_sink hc_head_base "
    "layers.0.hc_attn_scale mtp.0.hc_ffn_base layers.2.attn.indexer.compressor.ape mtp.0.hc_head_scale".split(),
)
def test_adamw_members(name: str) -> None:
    assert is_adamw(name)


def test_fused_weights_are_orthogonalised_matrix_by_matrix() -> None:
    """The three maps of an mHC weight and each expert get orthogonal updates of their own; a fused update would not."""
    named = {
        "layers.0.hc_attn_fn": torch.nn.Parameter(torch.zeros(24, 1024)),
        "layers.0.ffn.experts.w1": torch.nn.Parameter(torch.zeros(8, 96, 256)),
        "layers.0.ffn.experts.w2": torch.nn.Parameter(torch.zeros(8, 256, 96)),
        "layers.0.attn_norm.weight": torch.nn.Parameter(torch.zeros(256)),
    }
    optimizer = Optimizer(named.items(), NANO, OptimizerSettings(matmul="float32"))
    for index, parameter in enumerate(named.values()):
        parameter.grad = gaussian(*parameter.shape, seed=index)
        parameter.grad[:1] *= 50  # one dominant part must not shrink the others
    optimizer.accumulate()
    optimizer.step(lr=1.0)
    assert list(optimizer.stacks) == [(4, 1024), (16, 1024), (96, 256), (256, 96)]
    pre, post, res = named["layers.0.hc_attn_fn"].data.split([4, 4, 16])
    for part in (pre, post, res):
        assert spread(part / (0.18 * 32)) < 2e-3
    assert spread(torch.cat([pre, post, res]) / (0.18 * 32)) > 0.01
    for expert in [*named["layers.0.ffn.experts.w1"].data, *named["layers.0.ffn.experts.w2"].data]:
        assert spread(expert / (0.18 * 16)) < 2e-3
    assert named["layers.0.attn_norm.weight"].data.abs().min() > 0.99  # AdamW's first step is lr in every element


def test_adamw_equals_torch() -> None:
    settings = OptimizerSettings()
    start = [gaussian(5, 3, seed=1), gaussian(7, seed=2)]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    ours = [p.clone() for p in start]
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1)
    adamw = AdamW(ours, settings)
    for step in range(5):
        for i, p in enumerate(theirs):
            p.grad = gaussian(*p.shape, seed=10 * step + i)
            adamw.grads[i] += p.grad
        reference.step()
        adamw.step(0.01)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b.data)


def test_bfloat16_parameters_keep_float32_masters() -> None:
    """Updates far below a bf16 step still add up, and gradients of micro-batches are summed in float32."""
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = Optimizer([("layers.0.attn.wkv.weight", weight)], NANO, OptimizerSettings(weight_decay=0.0))
    for _ in range(40):
        weight.grad = torch.eye(8, dtype=torch.bfloat16)
        optimizer.accumulate()
        optimizer.step(lr=1e-3)
    moved = 1 - weight.data.float().diagonal()
    torch.testing.assert_close(moved, torch.full((8,), 40 * 1e-3 * 0.18 * 8**0.5), atol=4e-3, rtol=0)
    for _ in range(300):  # in bf16 the sum would stop at 256
        weight.grad = torch.ones(8, 8, dtype=torch.bfloat16)
        optimizer.accumulate()
    assert optimizer.grad_norm().item() == pytest.approx(300 * 8)
    assert weight.grad is None


def test_state_round_trip_and_misfit() -> None:
    def build(rows: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter, Optimizer]:
        matrix, norm = torch.nn.Parameter(gaussian(rows, 8)), torch.nn.Parameter(gaussian(8))
        return matrix, norm, Optimizer([("a.weight", matrix), ("norm.weight", norm)], NANO, OptimizerSettings())

    def advance(matrix: torch.nn.Parameter, norm: torch.nn.Parameter, optimizer: Optimizer, seed: int) -> None:
        matrix.grad, norm.grad = gaussian(*matrix.shape, seed=seed), gaussian(8, seed=seed + 100)
        optimizer.accumulate()
        optimizer.step(0.1)

    one, two = build(4), build(4)
    advance(*one, seed=1)
    state = {k: v.clone() for k, v in one[2].state_dict().items()}
    advance(*one, seed=2)
    two[2].load_state_dict(state)
    advance(*two, seed=2)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    with pytest.raises(ValueError, match=r"does not fit this model: muon\.4x8"):
        build(5)[2].load_state_dict(state)
