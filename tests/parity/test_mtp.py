"""The MTP block. transformers drops it on loading; its decoder layer and stream head, given our block's weights, are
the independent check, and broken variants of ours must miss it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dsv4.model.mtp as mtp
from dsv4.model import Transformer
from tests.parity.configs import tiny
from tests.parity.peer import peer, randomise

pytest.importorskip("transformers", reason="the peer implementation (a development dependency)")
Patch = pytest.MonkeyPatch
TOKENS = 60


def ours(model: Transformer, ids: Tensor) -> Tensor:
    out = model.train_forward(ids, torch.zeros_like(ids), indexer="sparse")
    assert out.mtp_hidden is not None
    return out.mtp_hidden[:, :-1]  # the last slot has no next token


@pytest.fixture(scope="module")
def subject() -> tuple[Transformer, Tensor, Tensor]:
    config = tiny()
    model = randomise(Transformer(config), 1)
    ids = torch.randint(256, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    block = model.mtp[0]
    host = Transformer(tiny(num_hidden_layers=1, num_hash_layers=0, compress_ratios=(0, 0)))
    names = {f"layers.0.{n}": t for n, t in block.state_dict().items() if f"layers.0.{n}" in host.state_dict()}
    names |= {n: t for n, t in block.state_dict().items() if n.startswith("hc_head") or n == "norm.weight"}
    missing, unexpected = host.load_state_dict(names, strict=False)
    assert not unexpected and all(name.startswith(("embed", "head", "mtp")) for name in missing)
    theirs = peer(host).model

    def rms(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w

    with torch.no_grad():
        streams, _ = model._trunk(ids, None, None, None, None)
        following = torch.cat((ids[:, 1:], ids[:, -1:]), 1)
        e = rms(model.embed.weight[following], block.enorm.weight) @ block.e_proj.weight.T
        z = e[:, :, None] + rms(streams, block.hnorm.weight) @ block.h_proj.weight.T
        at = torch.arange(TOKENS)[None].expand(2, -1)
        rotary = {kind: theirs.rotary_emb(z, position_ids=at, layer_type=kind) for kind in ("main", "compress")}
        future, past = (torch.full((TOKENS, TOKENS), -torch.inf) for _ in range(2))
        mask = future.triu(1) + past.tril(-config.sliding_window)
        out = theirs.layers[0](
            z, position_embeddings=rotary, position_ids=at, attention_mask=mask[None, None], input_ids=following
        )
        out = out[0] if isinstance(out, tuple) else out
        return model, ids, theirs.norm(theirs.hc_head(out))[:, :-1]


def miss(subject: tuple[Transformer, Tensor, Tensor]) -> float:
    model, ids, wanted = subject
    with torch.no_grad():
        return float((ours(model, ids) - wanted).abs().max())


def test_mtp_is_a_whole_block_over_streams(subject) -> None:
    assert miss(subject) < 1e-4


def with_inputs(change: Callable) -> Callable[[Patch, Transformer], None]:
    """Changes (streams, next_embedding) on their way into the block."""

    def apply(p: Patch, _: Transformer) -> None:
        real = mtp.MTP.predict

        def predict(self, streams, embedding, *rest):
            return real(self, *change(self, streams, embedding), *rest)

        p.setattr(mtp.MTP, "predict", predict)

    return apply


def swap_norms(p: Patch, model: Transformer) -> None:
    block = model.mtp[0]
    first, second = block.enorm.weight.data, block.hnorm.weight.data
    p.setattr(block.enorm.weight, "data", second)
    p.setattr(block.hnorm.weight, "data", first)


def trunks_head(p: Patch, model: Transformer) -> None:
    p.setattr(mtp.MTP, "exit", lambda self, streams: model.exit(streams))


def trunks_norm(p: Patch, model: Transformer) -> None:
    p.setattr(model.mtp[0].norm.weight, "data", model.norm.weight.data)


MUTANTS = {
    "streams_are_collapsed_first": with_inputs(lambda self, s, e: (s.mean(-2, keepdim=True).expand_as(s), e)),
    "streams_are_collapsed_by_the_trunks_head": with_inputs(
        lambda self, s, e: (self.exit(s).unsqueeze(-2).expand_as(s), e)
    ),
    "embedding_at_position_0_is_zero": with_inputs(
        lambda self, s, e: (s, torch.cat((torch.zeros_like(e[:, :1]), e[:, 1:]), 1))
    ),
    "embedding_of_the_same_token": with_inputs(lambda self, s, e: (s, e.roll(1, 1))),
    "norms_are_swapped": swap_norms,
    "the_trunks_stream_head": trunks_head,
    "the_trunks_final_norm": trunks_norm,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, subject, monkeypatch: Patch) -> None:
    MUTANTS[name](monkeypatch, subject[0])
    assert miss(subject) > 1e-2, f"breaking this rule changes nothing: {name}"
