"""Our network against transformers' independent one: logits, gradients, and its cache."""

from __future__ import annotations

import pytest
import torch

from dsv4.config import Config
from dsv4.model import Transformer
from tests.parity.configs import CASES, tiny
from tests.parity.peer import peer, peer_tensors, randomise

transformers = pytest.importorskip("transformers", reason="the peer implementation (a development dependency)")


def setup(config: Config, batch: int, tokens: int, seed: int = 1):
    model = randomise(Transformer(config), seed)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return model, peer(model), ids


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits(name: str) -> None:
    model, theirs, ids = setup(*CASES[name])
    ours, wanted = model(ids), theirs(ids).logits
    assert wanted.abs().max() > 1
    assert (ours - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["all-parts", "csa-only", "hca-only", "wide", "gathered", "flash-pattern"])
def test_gradients(name: str) -> None:
    """Every shared parameter but the indexers', which the language loss does not reach (there or here)."""
    model, theirs, ids = setup(*CASES[name])
    weight = torch.randn(*ids.shape, model.config.vocab_size, generator=torch.Generator().manual_seed(2))
    (model(ids) * weight).sum().backward()
    (theirs(ids).logits * weight).sum().backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if "indexer" not in n}
    shared = {n: p.grad for n, p in model.named_parameters() if not n.startswith("mtp.") and ".indexer." not in n}
    ours = peer_tensors(shared)
    assert ours.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert gradient.abs().max() > 0, key
        error = (ours[key] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-3, f"{key}: {error:.1e}"


@torch.no_grad()
def test_decoding_against_their_cache() -> None:
    model, theirs, ids = setup(tiny(), 1, 80)
    cache, state = transformers.DynamicCache(config=theirs.config), model.new_state()
    for step in [ids[:, :37], *ids[:, 37:].split(1, 1)]:
        wanted = theirs(step, past_key_values=cache).logits
        assert (model(step, state) - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_bfloat16_is_close() -> None:
    """bf16 against fp32 of the same weights: the mean error stays small (their own bf16 has a mean error of the same
    size)."""
    model, theirs, ids = setup(tiny(), 1, 100)
    low = Transformer(model.config, dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    exact = model(ids)
    error = (low(ids) - exact).abs().mean()
    theirs_error = (theirs.bfloat16()(ids).logits.float() - exact).abs().mean()
    assert error < 1.5 * theirs_error, (error, theirs_error)
