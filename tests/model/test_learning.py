"""What training relies on: who gets which gradient, what the indexer learns from, how balance is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsv4.model.attention as attention
from dsv4.model import Transformer
from dsv4.model.indexer import index_loss
from tests.parity.configs import tiny
from tests.parity.peer import randomise


@pytest.fixture
def model() -> Transformer:
    return randomise(Transformer(tiny()), 7)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(256, (2, 96), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros_like(ids)
    documents[0, 50:] = 1
    return ids, documents


def touched(model: Transformer) -> set[str]:
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_language_loss_trains_everything_but_the_indexers(model: Transformer) -> None:
    out = model.train_forward(*batch(), indexer="sparse")
    assert out.mtp_hidden is not None
    (model.logits(out.hidden).square().mean() + model.logits(out.mtp_hidden).square().mean()).backward()
    assert touched(model) == {n for n, _ in model.named_parameters() if ".indexer." not in n}


def test_indexer_loss_trains_the_indexers_alone(model: Transformer) -> None:
    model.train_forward(*batch(), indexer="sparse").indexer_loss.backward()
    assert touched(model) == {n for n, _ in model.named_parameters() if ".indexer." in n}


def test_warm_up_trains_the_indexers_alone(model: Transformer) -> None:
    out = model.train_forward(*batch(), indexer="warmup")
    assert not out.hidden.requires_grad
    out.indexer_loss.backward()
    assert touched(model) == {n for n, _ in model.named_parameters() if ".indexer." in n}


def test_dense_phase_leaves_the_indexers_out(model: Transformer) -> None:
    out = model.train_forward(*batch(), indexer="off")
    assert out.indexer_loss == 0
    out.hidden.sum().backward()
    assert not any(".indexer." in name for name in touched(model))


def test_the_teacher_is_the_joint_softmax(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities over window, entries and sink together, summed over heads, then normalised over the entries."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    real_loss, real_joint = attention.index_loss, attention.joint_attention
    calls: list[tuple] = []
    monkeypatch.setattr(attention, "index_loss", lambda *a: (found.append(a), real_loss(*a))[1])
    monkeypatch.setattr(attention, "joint_attention", lambda *a: (calls.append(a), real_joint(*a))[1])
    ids, _ = batch()
    model.train_forward(ids, torch.zeros_like(ids), indexer="warmup")
    scores, teacher, mask = found[0]
    q, near, near_mask, far, far_mask, sink, scale = next(c for c in calls if c[3] is not None)
    t = 70
    block = near.shape[1] - 16
    rows = near.view(2, -1, near.shape[1], 32)[0, t // block]
    for_window = (q[0, t] @ rows.T * scale).masked_fill(~near_mask.expand(2, -1, -1)[0, t], -torch.inf)
    for_entries = (q[0, t] @ far[0].T * scale).masked_fill(~far_mask[0, t], -torch.inf)
    p = torch.cat((for_window, for_entries, sink[:, None]), 1).softmax(1)[:, rows.shape[0] : -1].sum(0)
    assert torch.allclose(teacher[0, t], p, atol=1e-6)
    total, count = index_loss(scores[:1, t : t + 1], teacher[:1, t : t + 1], mask[:1, t : t + 1])
    visible = mask[0, t]
    wanted = F.kl_div(scores[0, t][visible].log_softmax(0), (p / p.sum())[visible], reduction="sum")
    assert count == 1 and torch.allclose(total, wanted, atol=1e-6)


def test_sparse_indexer_loss_is_restricted_to_the_selection(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Tensor] = []
    real = attention.index_loss
    monkeypatch.setattr(attention, "index_loss", lambda s, t, m: (masks.append(m), real(s, t, m))[1])
    ids, _ = batch()
    model.train_forward(ids, torch.zeros_like(ids), indexer="sparse")
    assert masks and all(int(mask.sum(-1).max()) == model.config.index_topk for mask in masks)


def test_a_trained_indexer_finds_what_attention_reads(model: Transformer) -> None:
    """The loss falls, and with it the selection gathers more of the attention's mass."""
    ids, documents = batch()
    parameters = [p for n, p in model.named_parameters() if ".indexer." in n]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    losses = []
    for _ in range(40):
        loss = model.train_forward(ids, documents, indexer="warmup").indexer_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_balance_loss_and_load(model: Transformer) -> None:
    out = model.train_forward(*batch(), mtp=True)
    learned = sum(layer.router == "learned" for layer in (*model.config.layers, *model.config.mtp_layers))
    assert len(out.load) == learned
    assert all(int(load.sum()) == 2 * 96 * model.config.num_experts_per_tok for load in out.load)
    assert float(out.balance_loss.detach()) > 0.9 * learned  # 1 per layer when balanced


def test_balance_loss_formula(model: Transformer) -> None:
    moe = model.layers[3].ffn
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0]]).repeat(1, 4)[:, :8]
    experts = torch.tensor([[0, 1], [1, 2]])
    share = scores / scores.sum(1, keepdim=True)
    f = torch.tensor([1, 2, 1, 0, 0, 0, 0, 0]) / 2 * 8 / 2
    assert torch.allclose(moe._balance(scores, experts, 1), (f * share.mean(0)).sum())


def test_bias_moves_against_the_load(model: Transformer) -> None:
    before = [g.bias.clone() for g in (b.ffn.gate for b in (*model.layers, *model.mtp)) if hasattr(g, "bias")]
    loads = [torch.tensor([9, 1, 5, 5, 5, 5, 5, 5])] * len(before)
    model.update_bias(loads, 0.01)
    after = [g.bias for g in (b.ffn.gate for b in (*model.layers, *model.mtp)) if hasattr(g, "bias")]
    for old, new in zip(before, after):
        assert torch.allclose(new - old, torch.tensor([-0.01, 0.01, 0, 0, 0, 0, 0, 0]), atol=1e-6)


def test_initial_weights() -> None:
    model = Transformer(tiny()).init_weights(3)
    again = Transformer(tiny()).init_weights(3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    table = model.layers[0].ffn.gate.tid2eid
    assert all(len(set(row)) == 2 for row in table.tolist()), "an id's experts differ"
    assert torch.bincount(table.flatten(), minlength=8).min() > 0
    assert abs(float(model.layers[2].attn.wq_a.weight.detach().std()) - 0.02) < 0.002
