"""Cross entropy against torch's, targets inside their sample, steps that do not depend on how they are split."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dsv4.config import Config
from dsv4.model import Transformer
from dsv4.training import losses
from dsv4.training.losses import Batch, components, cross_entropy

MICRO = Config.preset("micro")


def batch(rows: int = 4, length: int = 48, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, MICRO.vocab_size, (rows, length), generator=g)
    documents = (torch.arange(length) // torch.tensor([[16], [20], [48], [7]])[:rows]).expand(rows, length)
    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[:, 0] = False
    return Batch(ids, documents.contiguous(), mask.float() / mask.sum())


def part(whole: Batch, rows: slice) -> Batch:
    return Batch(whole.ids[rows], whole.documents[rows], whole.weights[rows])


def model() -> Transformer:
    return Transformer(MICRO).init_weights(3)


@pytest.mark.parametrize("rows", [7, 512, 1300])
def test_cross_entropy_equals_torch(rows: int) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(rows, 24, generator=g), torch.randn(100, 24, generator=g)
    targets, weights = torch.randint(100, (rows,), generator=g), torch.rand(rows, generator=g).round(decimals=1)
    weights[::3] = 0

    def run(ours: bool) -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if ours:
            loss = cross_entropy(h, w, targets, weights, torch.float32)
        else:
            loss = (F.cross_entropy(h @ w.T, targets, reduction="none") * weights).sum()
        (2.5 * loss).backward()
        assert h.grad is not None
        assert w.grad is not None
        return [loss.detach(), h.grad, w.grad]

    for ours, theirs in zip(run(True), run(False)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    low = cross_entropy(hidden, head, targets, weights, torch.bfloat16)
    torch.testing.assert_close(low, run(False)[0], rtol=1e-2, atol=0)


def test_targets_stay_inside_their_sample() -> None:
    ids = torch.arange(10, 20)[None]
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 3]])
    b = Batch(ids, documents, torch.ones(1, 10))
    for ahead in (1, 2):
        targets, weights = b.targets(ahead)
        for t in range(10):
            inside = t + ahead < 10 and documents[0, t] == documents[0, t + ahead]
            assert weights[0, t] == float(inside)
            if inside:
                assert targets[0, t] == ids[0, t + ahead]


def test_only_learned_tokens_count() -> None:
    """Another last token changes the loss where it has a weight, and only there (no other token sees it)."""
    whole, net = batch(), model()
    whole.weights[:, -1] = torch.tensor([0.0, 0.1, 0.1, 0.1])

    def lm(row: int) -> float:
        ids = whole.ids.clone()
        ids[row, -1] = (ids[row, -1] + 5) % MICRO.vocab_size
        with torch.no_grad():
            return float(components(net, Batch(ids, whole.documents, whole.weights), "sparse", True)[0]["lm"])

    with torch.no_grad():
        before = float(components(net, whole, "sparse", True)[0]["lm"])
    assert lm(0) == before
    assert lm(2) != before


def test_components_of_each_phase() -> None:
    whole, net = batch(), model()
    got = {phase: components(net, whole, phase, True)[0] for phase in ("off", "warmup", "sparse")}
    assert {phase: set(found) for phase, found in got.items()} == {
        "off": {"lm", "mtp", "balance"}, "warmup": {"indexer"}, "sparse": {"lm", "mtp", "balance", "indexer"},
    }  # fmt: skip
    assert set(components(net, whole, "sparse", False)[0]) == {"lm", "balance", "indexer"}
    # Weights sum to 1, so the loss of an untrained model is the mean of about log(vocabulary) per scored token.
    scored = whole.targets(1)[1].sum()
    assert float(got["off"]["lm"].detach() / scored) == pytest.approx(math.log(MICRO.vocab_size), rel=0.02)


def test_mtp_learns_the_token_after_next() -> None:
    whole, net = batch(), model()
    with torch.no_grad():
        found, _ = components(net, whole, "sparse", True)
        out = net.train_forward(whole.ids, whole.documents)
        assert out.mtp_hidden is not None
        for name, hidden, ahead in (("lm", out.hidden, 1), ("mtp", out.mtp_hidden, 2)):
            nll = -net.logits(hidden).log_softmax(-1)[:, :-ahead].gather(-1, whole.ids[:, ahead:, None])[..., 0]
            same = whole.documents[:, ahead:] == whole.documents[:, :-ahead]
            torch.testing.assert_close(found[name], (nll * same * whole.weights[:, ahead:]).sum())


def test_a_step_does_not_depend_on_its_split() -> None:
    def gradients(parts: list[Batch]) -> dict[str, torch.Tensor]:
        net = model()
        for piece in parts:
            found, _ = components(net, piece, "sparse", True)
            (found["lm"] + 0.3 * found["mtp"]).backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    whole = batch()
    one, four = gradients([whole]), gradients([part(whole, slice(r, r + 1)) for r in range(4)])
    assert one.keys() == four.keys()
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    # What would break it: normalising each pass by its own tokens.
    parts = [part(whole, slice(r, r + 1)) for r in range(4)]
    each = gradients([Batch(p.ids, p.documents, p.weights / p.weights.sum() / 4) for p in parts])
    assert (each["embed.weight"] - one["embed.weight"]).norm() > 1e-2 * one["embed.weight"].norm()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, net = batch(), model()
    with torch.no_grad():
        before = components(net, whole, "off", True)[0]["lm"]
        monkeypatch.setattr(losses, "_CHUNK", {"cpu": 5})
        torch.testing.assert_close(components(net, whole, "off", True)[0]["lm"], before)
