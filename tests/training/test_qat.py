"""A recipe's qat = "fp4": trained as it will be served, gradients straight through, resumed bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import dsv4
from dsv4.checkpoint.convert import convert
from dsv4.common import runconfig
from dsv4.model import Transformer
from dsv4.numerics import (
    Packed,
    deployed_weight,
    index_row,
    quantisation_aware,
    trained_index_row,
    trained_weight,
)
from dsv4.training.losses import Batch, components
from dsv4.training.trainer import Trainer

Make = Callable[..., Any]
QAT = "model.qat=fp4"


def batch() -> Batch:
    ids = torch.randint(3, 500, (2, 96), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.zeros_like(ids), torch.full(ids.shape, 1 / ids.numel()))


def experts(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".ffn.experts." in name}


def test_the_forward_pass_is_what_the_stored_weights_compute(recipe: Make, tmp_path: Path) -> None:
    """Trained, exported, packed into FP4, loaded: the same expert weights, index rows and logits to the bit."""
    trainer = Trainer(recipe(QAT, f"export={tmp_path / 'model'}", "schedule.lengths=[[0, 64]]"), tmp_path / "run")
    trainer.run()
    assert trainer.facts()["qat"] == "fp4"
    dsv4.save(trainer.model, tmp_path / "model", dtype="float32")  # the export rounds to bf16: these are the masters
    convert(tmp_path / "model", tmp_path / "native", "official", quantise=True)
    native = dsv4.load(tmp_path / "native", "native")
    for name, master in experts(trainer.model).items():
        stored = native.get_submodule(name)
        assert isinstance(stored, Packed)
        seen = trainer.model.get_submodule(name.rsplit(".", 2)[0]).round(master)
        assert torch.equal(seen, stored.dequantise()) and not torch.equal(seen, master)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    indexer, served = trainer.model.layers[1].attn.indexer, native.layers[1].attn.indexer
    assert torch.equal(indexer.round(rows), served.round(rows))
    assert torch.equal(indexer.compressor.round(rows), served.compressor.round(rows))
    # The model with the stored experts; qat leaves everything else in full precision.
    deployed = dsv4.load(tmp_path / "native", "float32")
    state = trainer.model.state_dict()
    deployed.load_state_dict({k: v for k, v in state.items() if ".ffn.experts." not in k}, strict=False)
    for block in deployed.layers:
        if block.layer.indexer:
            block.attn.indexer.round = block.attn.indexer.compressor.round = index_row
    ids = batch().ids
    with torch.no_grad():
        assert torch.equal(trainer.model(ids), deployed(ids))
        unaware = dsv4.load(tmp_path / "model", "float32")
        assert (unaware(ids) - deployed(ids)).abs().max() > 1e-3


def test_gradients_pass_straight_to_the_masters(recipe: Make) -> None:
    """The loss and every gradient are those of a plain model that holds the deployed experts."""
    config = recipe().model.config()
    aware = quantisation_aware(Transformer(config).init_weights(1))
    plain = Transformer(config).init_weights(1)
    with torch.no_grad():
        for p in experts(plain).values():
            p.copy_(deployed_weight(p))
    for block in plain.layers:
        if block.layer.indexer:
            block.attn.indexer.round = block.attn.indexer.compressor.round = trained_index_row
    for model in (aware, plain):
        losses, _ = components(model, batch(), "sparse", True)
        torch.stack(list(losses.values())).sum().backward()
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in (aware, plain)]
    for name, grad in grads[0].items():
        assert grad is not None and grads[1][name] is not None, name
        assert torch.equal(grad, grads[1][name]), name
        assert not name.startswith("layers.1.") or bool(grad.ne(0).any()), name


def test_resume_is_bit_exact(recipe: Make, tmp_path: Path) -> None:
    Trainer(recipe(QAT), tmp_path / "a").run()
    for stop in (2, 3, 5, None):  # in every phase
        Trainer(recipe(QAT), tmp_path / "b").run(stop)
    Trainer(recipe(), tmp_path / "c").run()
    a, b, c = (load_file(tmp_path / run / "checkpoints" / "step-00000006" / "tensors.safetensors") for run in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    with pytest.raises(ValueError, match="begun with another recipe"):
        Trainer(recipe(), tmp_path / "a")
    with pytest.raises(ValueError, match="qat is 'fp8'; known: 'fp4'"):
        recipe("model.qat=fp8")


def test_the_recipe_is_written_with_its_switch(recipe: Make) -> None:
    assert 'qat = "fp4"' in runconfig.resolved(recipe(QAT))
    assert "qat" not in runconfig.resolved(recipe())


class NothingWaits(TorchDispatchMode):
    """Fails where a value of a tensor is asked for: on a GPU that stops the host until the device has caught up."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_never_wait_for_the_device(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    with NothingWaits():
        (trained_weight(weight).float().square().sum() + trained_index_row(rows).float().square().sum()).backward()
    assert weight.grad is not None and weight.grad.dtype == dtype and rows.grad is not None
    with pytest.raises(AssertionError), NothingWaits():
        float(rows.detach().sum())
