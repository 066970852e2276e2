"""The whole network through the Triton kernels, beside the plain torch ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4
from dsv4.kernels import triton as ours
from dsv4.kernels.cpu import library
from dsv4.model import Transformer
from tests.parity.configs import tiny

pytest.importorskip("triton", reason="triton is not installed (script/setup dev installs it on Linux x86-64)")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = tiny(
    num_hidden_layers=2, compress_ratios=(4, 8), index_topk=1, index_head_dim=32, num_hash_layers=1,
    num_nextn_predict_layers=0,
)  # fmt: skip


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Switches between "triton" and "reference"; no C++ in either."""

    def choose(name: str) -> None:
        monkeypatch.setattr(ours, "_device", lambda: DEVICE if name == "triton" else None)

    monkeypatch.setenv("DSV4_KERNELS", "reference")
    library.library.cache_clear()
    yield choose
    monkeypatch.undo()
    library.library.cache_clear()


def logits(model: Transformer, ids: Tensor) -> Tensor:
    """A prompt in one piece, then token by token, in float32."""
    state = model.new_state()
    split = ids.shape[1] - 1
    pieces = [model(ids[:, :split], state)] + [model(ids[:, i : i + 1], state) for i in range(split, ids.shape[1])]
    return torch.cat(pieces, 1).float()


def counted(monkeypatch: pytest.MonkeyPatch, seen: set[str]) -> None:
    """Notes which kernels ran."""
    modules = {
        ours.attend: "attend choose", ours.hyper_connections: "hc_enter hc_leave", ours.norm: "rms_norm rotate",
        ours.compress: "pool project", ours.linear: "linear packed_linear grouped_linear",
        ours.experts: "routed_experts packed_experts", ours.route: "route", ours.rows: "kv_row index_row",
    }  # fmt: skip
    for module, names in modules.items():
        for name in names.split():
            run = getattr(module, name)
            note = lambda *a, _run=run, _name=name: (seen.add(_name), _run(*a))[1]  # noqa: E731
            monkeypatch.setattr(module, name, note)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["exact", "native"])
def test_the_network_is_the_same(kind: str, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Logits of prefill and decoding, with the kernels that the dispatch file chose for them."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.init_weights()
    if kind == "native":
        dsv4.save(model, tmp_path / "m", dtype="native")
        model = dsv4.load(tmp_path / "m", dtype="native")
    model = model.to(DEVICE).eval()
    ids = torch.randint(0, CONFIG.vocab_size, (1, 11), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    backend("reference")
    wanted = logits(model, ids)
    seen: set[str] = set()
    counted(monkeypatch, seen)
    monkeypatch.setattr(ours, "EXACT", kind == "exact")
    backend("triton")
    found = logits(model, ids)
    expected = set("attend choose hc_enter hc_leave rms_norm rotate pool project route grouped_linear".split())
    native, exact = "packed_experts packed_linear kv_row index_row", "routed_experts linear"
    assert seen == expected.union((native if kind == "native" else exact).split())
    # A rounding that falls to the other side is a step of FP8: the C++ kernels differ from plain torch by 2 % here.
    largest, mean = (0.1, 0.05) if kind == "native" else (1e-5, 1e-5)
    assert (found - wanted).abs().max() <= largest * wanted.abs().max()
    assert (found - wanted).abs().mean() <= mean * wanted.abs().mean()
