"""dtype "native": the arithmetic of the release (model card B.8), against the expanded model with every rounding put in
by hand, from an independent implementation; and experts streamed from disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsv4
import dsv4.model.moe as moe
from dsv4.checkpoint.experts import StreamedStack, parse_bytes
from dsv4.checkpoint.folder import Folder
from dsv4.checkpoint.layouts import home
from dsv4.cli.inspect import examine
from dsv4.model import Transformer
from dsv4.model.costs import tensors
from dsv4.model.layers import unrounded
from dsv4.numerics import Packed

peer = pytest.importorskip("tests.numerics.peer", reason="needs ml_dtypes: pip install ml_dtypes")
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def release(tiny: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "m"
    dsv4.save(tiny, folder, dtype="native")
    return folder


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 96, (1, 130), generator=torch.Generator().manual_seed(8))


def by_hand(x: Tensor, dtype: str, block: int, floor: float) -> Tensor:
    return torch.from_numpy(peer.rounded(x.detach().float().numpy(), dtype, block, floor)).to(x.dtype)


def eight(x: Tensor) -> Tensor:
    return by_hand(x, "F8_E4M3", 128, 1e-4)


def kv(x: Tensor) -> Tensor:
    return torch.cat((by_hand(x[..., :-16], "F8_E4M3", 64, 1e-4), x[..., -16:]), -1)  # 16 of micro's 32 channels turn


def index(x: Tensor) -> Tensor:
    turned = x.double() @ torch.from_numpy(peer.hadamard_matrix(x.shape[-1]))
    return by_hand(turned.to(x.dtype), "I8", 32, 6 * 2.0**-126)


def experts_by_hand(
    x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float
) -> Tensor:
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for e, w in zip(experts[token].tolist(), weights[token]):
            rounded = eight(x[token])
            gate, up = w1[e] @ rounded, w3[e] @ rounded
            out[token] += w2[e] @ eight(F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * w)
    return out


def shared_by_hand(shared: moe.Expert, x: Tensor) -> Tensor:
    one = (shared.w1.weight[None], shared.w2.weight[None], shared.w3.weight[None])
    first, full = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
    return experts_by_hand(x, first, full, *one, shared.limit)


Steps = list[tuple[tuple[Any, ...], Tensor]]


@pytest.fixture(scope="module")
def wanted(release: Path, tokens: Tensor) -> Steps:
    """Input and output of every block of the expanded float32 model with every rounding of the release in its place."""
    model = dsv4.load(release)
    for t in tensors(model.config):
        if t.kind == "linear" and not t.name.endswith("wo_a.weight"):  # wo_a is expanded, its input is not rounded
            module = model.get_submodule(t.name.removesuffix(".weight"))
            module.forward = lambda x, w=module.weight: F.linear(eight(x), w)  # type: ignore[method-assign]
    steps: Steps = []
    for block in model.layers:
        shared = block.ffn.shared_experts
        shared.forward = partial(shared_by_hand, shared)
        block.attn.round = kv
        if block.layer.compress_ratio:
            block.attn.compressor.round = kv
        if block.layer.indexer:
            block.attn.indexer.round = block.attn.indexer.compressor.round = index
        block.register_forward_hook(lambda block, inputs, output: steps.append((inputs, output)))
    with torch.no_grad(), Patch.context() as patch:
        patch.setattr(moe, "routed_experts", experts_by_hand)
        model(tokens)
    return steps


def agreement(model: Transformer, wanted: Steps) -> float:
    """Share of (block, token) whose output is the wanted one, each block given the wanted input. All but all: where the
    last bit of a sum differs, a rounding may fall to the other side, and the whole token with it."""
    model.float()  # so that nothing but the roundings differs from the expanded model
    equal = []
    with torch.no_grad():
        for block, (inputs, output) in zip(model.layers, wanted):
            error = (block(*inputs) - output).abs().flatten(2).amax(-1)
            equal.append(error < 1e-4 * output.abs().max())
    return float(torch.cat(equal).float().mean())


def test_blocks_compute_the_roundings_by_hand(release: Path, wanted: Steps) -> None:
    assert agreement(dsv4.load(release, dtype="native"), wanted) > 0.97
    assert agreement(dsv4.load(release), wanted) < 0.1  # they matter


def _attention(model: Transformer, change: Callable[[torch.nn.Module], None]) -> None:
    for block in model.layers:
        change(block.attn)


def kv_rows_are_not_rounded(model: Transformer) -> None:
    _attention(model, lambda attn: setattr(attn, "round", unrounded))


def compressed_rows_are_not_rounded(model: Transformer) -> None:
    _attention(model, lambda attn: hasattr(attn, "compressor") and setattr(attn.compressor, "round", unrounded))


def index_queries_are_not_turned(model: Transformer) -> None:
    _attention(model, lambda attn: hasattr(attn, "indexer") and setattr(attn.indexer, "round", unrounded))


def index_keys_are_not_turned(model: Transformer) -> None:
    _attention(model, lambda attn: hasattr(attn, "indexer") and setattr(attn.indexer.compressor, "round", unrounded))


def index_rows_are_not_in_fp4(model: Transformer) -> None:
    index_queries_are_not_turned(model)
    index_keys_are_not_turned(model)


def _expand(model: Transformer, part: str) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, Packed) and part in name:
            parent, leaf = name.rsplit(".", 1)
            delattr(model.get_submodule(parent), leaf)
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(module.dequantise()))


def inputs_of_queries_are_not_rounded(model: Transformer) -> None:
    _expand(model, "wq_b")


def inputs_of_experts_are_not_rounded(model: Transformer) -> None:
    _expand(model, ".ffn.experts.")


def inputs_of_the_shared_expert_are_not_rounded(model: Transformer) -> None:
    _expand(model, "shared_experts")


MUTANTS = [
    kv_rows_are_not_rounded, compressed_rows_are_not_rounded, index_queries_are_not_turned, index_keys_are_not_turned,
    index_rows_are_not_in_fp4, inputs_of_queries_are_not_rounded, inputs_of_experts_are_not_rounded,
    inputs_of_the_shared_expert_are_not_rounded,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_missing_rounding_is_noticed(release: Path, wanted: Steps, mutant: Callable[[Transformer], None]) -> None:
    model = dsv4.load(release, dtype="native")
    mutant(model)
    assert agreement(model, wanted) < 0.9


def test_decoding_gives_the_logits_of_the_prompt(release: Path, tokens: Tensor) -> None:
    """bf16 activations as served: token by token against all at once."""
    model = dsv4.load(release, dtype="native")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        whole = model(tokens)
        state = model.new_state()
        parts = [model(part, state) for part in (tokens[:, :50], *tokens[:, 50:70].split(1, 1), tokens[:, 70:])]
    step = torch.cat(parts, 1)
    # Roundings turn the last bit of a product into a step of 1/16, so a rare row may differ.
    agree = (step.argmax(-1) == whole.argmax(-1)).float().mean()
    assert agree > 0.9 and (step - whole).abs().mean() < 0.05 * whole.abs().mean()


# --- experts on disk ---


@pytest.mark.parametrize("experts_held", [1, 3, 100])
def test_streamed_experts_change_no_bit(release: Path, tokens: Tensor, experts_held: int) -> None:
    resident = dsv4.load(release, dtype="native")
    one = sum(
        getattr(resident.layers[0].ffn.experts, w)[0].elements.nbytes
        + getattr(resident.layers[0].ffn.experts, w)[0].scale.nbytes
        for w in ("w1", "w2", "w3")
    )
    streamed = dsv4.load(release, dtype="native", expert_memory=experts_held * one)
    with torch.no_grad():
        assert torch.equal(streamed(tokens), resident(tokens))
    stack = streamed.layers[0].ffn.experts.w1
    assert isinstance(stack, StreamedStack)
    cache = stack.cache
    assert cache.nbytes <= experts_held * one and len(cache.held) == min(experts_held, 5 * 4)
    missed = cache.misses
    with torch.no_grad():
        streamed(tokens)
    assert (cache.misses == missed) == (experts_held == 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_experts_stay_within_their_room(
    release: Path, tokens: Tensor, dtype: torch.dtype, monkeypatch: Patch
) -> None:
    """Not only the cache: nothing else keeps experts alive, even where a prompt asks for all of a layer's."""
    alive: list[weakref.ref[Packed]] = []
    most = 0
    empty = Folder.empty

    def counted(folder: Folder, name: str) -> Packed:
        nonlocal most
        alive.append(weakref.ref(found := empty(folder, name)))
        most = max(most, sum(ref() is not None for ref in alive))
        return found

    monkeypatch.setattr(Folder, "empty", counted)
    model = dsv4.load(release, dtype="native", expert_memory="7 KB")
    if dtype == torch.float32:
        model.float()
    room = model.layers[0].ffn.experts.w1.room
    assert room == 2
    with torch.no_grad():
        model(tokens)
    assert len(alive) > 3 * room and most <= 3 * (room + 1)  # one more: the one in use while the next is read


def test_least_recently_used_leaves_first(release: Path) -> None:
    model = dsv4.load(release, dtype="native", expert_memory="20 KB")
    w1, w2 = model.layers[1].ffn.experts.w1, model.layers[2].ffn.experts.w2
    cache = w1.cache
    assert cache.room == 20_000 // cache.expert_bytes >= 3
    for e in range(cache.room):
        w1[e % 4] if e < 4 else w2[e % 4]
    w1[0]  # used again
    assert cache.misses == cache.room and cache.hits == 1
    w2[3]
    keys = list(cache.held)
    assert ("layers.1.ffn.experts", 0) in keys and ("layers.1.ffn.experts", 1) not in keys
    assert len(keys) == cache.room and keys[-1] == ("layers.2.ffn.experts", 3)


def test_experts_are_read_before_they_are_fetched(release: Path, tokens: Tensor, monkeypatch: Patch) -> None:
    """Decoding: all of a call's experts are on their way at once, the next layer's have been announced to the system,
    and where the router looks tokens up they are exactly the ones it will ask for."""
    model = dsv4.load(release, dtype="native", expert_memory="1MB")
    announced: list[str] = []
    fetched: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(Folder, "foresee", lambda folder, name: announced.append(name))
    ask = StreamedStack.ask

    def noted(stack: StreamedStack, experts: Iterable[int]) -> None:
        fetched.append((stack.prefix, list(experts)))
        ask(stack, fetched[-1][1])
        assert {(stack.prefix, e) for e in fetched[-1][1]} <= {*stack.cache.held, *stack.cache.coming}

    monkeypatch.setattr(StreamedStack, "ask", noted)
    with torch.no_grad():
        model(tokens[:, :1])
    layers = [prefix for prefix, experts in fetched if experts]
    assert {*layers} == {f"layers.{n}.ffn.experts" for n in range(5)}
    one = next(experts for prefix, experts in fetched if prefix == "layers.1.ffn.experts")
    assert model.layers[1].layer.router == "hash" and len(one) == 2
    wanted = {f"layers.1.ffn.experts.{e}.{w}.weight" for e in one for w in ("w1", "w2", "w3")}
    assert wanted == {name for name in announced if name.startswith("layers.1.")}
    assert not model.layers[0].ffn.experts.w1.cache.coming


def test_what_is_asked_for_stays_within_the_budget(release: Path) -> None:
    stack = dsv4.load(release, dtype="native", expert_memory="20 KB").layers[1].ffn.experts.w1
    assert isinstance(stack, StreamedStack)
    cache = stack.cache
    assert cache.room == 6
    for round in range(20):
        stack.ask([round % 4, (round + 1) % 4, (round + 2) % 4])
        cache.ask([("layers.2.ffn.experts", e) for e in range(4)], stack._begin)
        assert len(cache.held) + len(cache.coming) <= cache.room
        stack[round % 4]
        assert len(cache.held) + len(cache.coming) <= cache.room and cache.nbytes <= 20_000


def test_streamed_model_saves_its_experts(release: Path, tmp_path: Path) -> None:
    dsv4.save(dsv4.load(release, dtype="native", expert_memory="1MB"), tmp_path / "again")
    again = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}
    assert again == {file.name: file.read_bytes() for file in release.iterdir()}
    assert not examine(tmp_path / "again")["not_as_released"]


def test_damage_under_a_streamed_expert_is_named(release: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(release, tmp_path / "m")
    model = dsv4.load(folder, dtype="native", expert_memory="1MB")
    file = sorted(folder.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"model-00003-of-00008.safetensors was truncated while it was read, at layers"
    ):
        model.layers[1].ffn.experts.w1[0]


@pytest.mark.parametrize("text", ["", "8 gigs", "-1", "GiB", "1e9"])
def test_amounts_of_memory_that_are_none(release: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory; write it like 8GiB"):
        dsv4.load(release, dtype="native", expert_memory=text)


def test_amounts_of_memory(release: Path) -> None:
    assert [parse_bytes(t) for t in ("8GiB", "1.5 MB", "4096", 7, "2kib")] == [8 << 30, 1_500_000, 4096, 7, 2048]
    with pytest.raises(ValueError, match=r"expert memory of 100 bytes does not hold one expert of [\d,]+"):
        dsv4.load(release, dtype="native", expert_memory=100)


def test_every_class_is_packed_where_it_should_be(release: Path) -> None:
    model = dsv4.load(release, dtype="native")
    packed = {name for name, module in model.named_modules() if isinstance(module, Packed)}
    assert packed == {home(t.name)[0] for t in tensors(model.config) if t.kind in ("expert", "linear")}
