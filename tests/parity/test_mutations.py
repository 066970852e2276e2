"""Every rule of the network, broken on purpose: the broken variant must miss transformers' logits.

One mutant per line of the conformance list and of model card F.4. A rule whose breaking goes unnoticed is not tested.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsv4.model.attention as attention
import dsv4.model.compressor as compressor
import dsv4.model.hyper_connections as hc
import dsv4.model.indexer as indexer
import dsv4.model.moe as moe
import dsv4.model.plan as plan
from dsv4.kernels import reference
from dsv4.kernels.reference.hyper_connections import collapse, stream_logits
from dsv4.model import Transformer
from dsv4.model.rope import frequencies
from tests.parity.configs import tiny
from tests.parity.peer import peer, randomise

pytest.importorskip("transformers", reason="the peer implementation (a development dependency)")
Patch = pytest.MonkeyPatch
MUTANTS: dict[str, Callable[[Patch, Transformer], None]] = {}


def mutant(function: Callable[[Patch, Transformer], None]) -> Callable[[Patch, Transformer], None]:
    MUTANTS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def subject() -> tuple[Transformer, Tensor, Tensor]:
    model = randomise(Transformer(tiny(swiglu_limit=0.5)), 3)
    ids = torch.randint(256, (1, 110), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model, ids, peer(model)(ids).logits


def miss(subject: tuple[Transformer, Tensor, Tensor]) -> float:
    model, ids, wanted = subject
    with torch.no_grad():
        return float((model(ids) - wanted).abs().max())


def test_unbroken(subject: tuple[Transformer, Tensor, Tensor]) -> None:
    assert miss(subject) < 2e-5


# --- hyper-connections (report eqs. 1-8) ---


def enter_with(
    pre: Callable = lambda z, eps: torch.sigmoid(z) + eps,
    post: Callable = lambda z: 2 * torch.sigmoid(z),
    comb: Callable = lambda m, iterations, eps: reference.sinkhorn(m, iterations, eps),
    source: Callable = lambda streams: streams,
) -> Callable:
    def hc_enter(streams, fn, base, scale, iterations, rms_eps, eps):
        n = streams.shape[-2]
        u = stream_logits(streams, fn, rms_eps)
        a = pre(u[..., :n] * scale[0] + base[:n], eps)
        c = post(u[..., n : 2 * n] * scale[1] + base[n : 2 * n])
        m = (u[..., 2 * n :] * scale[2] + base[2 * n :]).flatten(0, -2).T.contiguous().view(n, n, -1)
        return collapse(source(streams), a), c, comb(m, iterations, eps).permute(2, 0, 1).reshape(*c.shape, n)

    return hc_enter


def test_the_rewritten_site_is_the_real_one(subject, monkeypatch: Patch) -> None:
    """The mutants below differ from the network by their one change only."""
    monkeypatch.setattr(hc, "hc_enter", enter_with())
    assert miss(subject) < 2e-5


@mutant
def post_is_a_plain_sigmoid(p: Patch, _: Transformer) -> None:
    p.setattr(hc, "hc_enter", enter_with(post=torch.sigmoid))


@mutant
def pre_is_a_softmax(p: Patch, _: Transformer) -> None:
    """(Twice a sigmoid would go unnoticed: a norm follows, so only the streams' proportions count.)"""
    p.setattr(hc, "hc_enter", enter_with(pre=lambda z, eps: torch.softmax(z, -1)))


@mutant
def comb_ends_on_rows(p: Patch, _: Transformer) -> None:
    p.setattr(
        hc, "hc_enter", enter_with(comb=lambda m, i, e: reference.sinkhorn(m.transpose(0, 1), i, e).transpose(0, 1))
    )


@mutant
def comb_starts_from_columns(p: Patch, _: Transformer) -> None:
    def comb(m, iterations, eps):
        c = torch.softmax(m, 0) + eps
        for _ in range(iterations):
            c = c / (c.sum(0, keepdim=True) + eps)
            c = c / (c.sum(1, keepdim=True) + eps)
        return c

    p.setattr(hc, "hc_enter", enter_with(comb=comb))


@mutant
def nineteen_column_passes(p: Patch, _: Transformer) -> None:
    p.setattr(hc, "hc_enter", enter_with(comb=lambda m, i, e: reference.sinkhorn(m, i - 1, e)))


@mutant
def comb_is_not_transposed(p: Patch, _: Transformer) -> None:
    p.setattr(hc, "hc_leave", lambda s, y, post, comb: reference.hc_leave(s, y, post, comb.mT))


@mutant
def streams_are_normed_before_the_mix(p: Patch, _: Transformer) -> None:
    p.setattr(hc, "hc_enter", enter_with(source=lambda s: reference.rms_norm(s, None, 1e-6)))


@mutant
def site_norm_is_per_stream(p: Patch, _: Transformer) -> None:
    def hc_enter(streams, *site):
        _, post, comb = reference.hc_enter(reference.rms_norm(streams, None, 1e-6), *site)
        return reference.hc_enter(streams, *site)[0], post, comb

    p.setattr(hc, "hc_enter", hc_enter)


@mutant
def head_has_no_base(p: Patch, model: Transformer) -> None:
    p.setattr(
        Transformer,
        "exit",
        lambda self, s: collapse(s, torch.sigmoid(stream_logits(s, self.hc_head_fn, 1e-6) * self.hc_head_scale)),
    )


# --- attention (2.3) ---


@mutant
def no_query_norm(p: Patch, _: Transformer) -> None:
    p.setattr(attention, "rms_norm", lambda x, w, eps: x)


@mutant
def query_norm_after_rope_with_weight_of_latent(p: Patch, _: Transformer) -> None:
    p.setattr(
        attention, "rms_norm", lambda x, w, eps: x * torch.rsqrt(x[..., :16].square().mean(-1, keepdim=True) + eps)
    )


def half_split(x: Tensor, angles: Tensor) -> Tensor:
    r = angles.shape[-1]
    a, b = x[..., -2 * r : -r], x[..., -r:]
    return torch.cat((x[..., : -2 * r], a * angles.real - b * angles.imag, a * angles.imag + b * angles.real), -1)


@mutant
def rope_in_two_halves(p: Patch, _: Transformer) -> None:
    for module in (attention, compressor, indexer):
        p.setattr(module, "rotate", half_split)


@mutant
def rope_on_the_first_channels(p: Patch, _: Transformer) -> None:
    for module in (attention, compressor, indexer):
        p.setattr(module, "rotate", lambda x, a: reference.rotate(x.flip(-1), a.flip(-1).conj()).flip(-1))


def with_frequencies(p: Patch, model: Transformer, **changed: Tensor) -> None:
    p.setattr(model, "_frequencies", {**model._frequencies, **changed})


@mutant
def compressed_layers_use_the_main_frequencies(p: Patch, model: Transformer) -> None:
    with_frequencies(p, model, compress=model._frequencies["main"])


@mutant
def local_keys_of_compressed_layers_use_the_main_frequencies(p: Patch, model: Transformer) -> None:
    build = plan.Plan.build

    def broken(*args):
        made = build(*args)
        made.angles["compress"] = made.angles["main"]
        return made

    p.setattr(plan.Plan, "build", staticmethod(broken))


@mutant
def window_layers_use_the_compress_frequencies(p: Patch, model: Transformer) -> None:
    with_frequencies(p, model, main=model._frequencies["compress"])


@mutant
def no_yarn(p: Patch, model: Transformer) -> None:
    with_frequencies(p, model, compress=frequencies(model.config.replace(rope_scaling=None))["compress"])


@mutant
def yarn_scales_magnitudes(p: Patch, model: Transformer) -> None:
    scale = 0.1 * math.log(model.config.rope_scaling.factor) + 1
    p.setattr(attention, "rotate", lambda x, a: torch.cat((x[..., :-8], reference.rotate(x, a)[..., -8:] * scale), -1))


@mutant
def output_is_not_rotated_back(p: Patch, _: Transformer) -> None:
    p.setattr(attention, "rotate", lambda x, a: x if a.is_conj() else reference.rotate(x, a))


def joint_with(change: Callable[[dict], dict]) -> Callable:
    def joint(q, near, near_mask, far, far_mask, sink, scale):
        names = ("q", "near", "near_mask", "far", "far_mask", "sink", "scale")
        return reference.joint_attention(**change(dict(zip(names, (q, near, near_mask, far, far_mask, sink, scale)))))

    return joint


def masked(p: Patch, joint: Callable[..., object] = attention.joint_attention) -> None:
    """The path of training."""
    p.setattr(attention, "differentiable", lambda trace: True)
    p.setattr(attention, "joint_attention", joint)


def fused_with(name: str, change: Callable[[list], list]) -> Callable[[Patch, Transformer], None]:
    """The path of inference, `choose` or `attend` with changed arguments."""

    def apply(p: Patch, _: Transformer) -> None:
        real = getattr(attention, name)
        p.setattr(attention, name, lambda *args: real(*change(list(args))))

    return apply


# attend(q, near, near_from, near_to, far, low, high, picked, sink, scale), choose(q, weights, keys, low, high, k)
MUTANTS["fused_no_sink"] = fused_with("attend", lambda a: [*a[:8], torch.full_like(a[8], -1e9), a[9]])
MUTANTS["fused_window_of_one_less"] = fused_with("attend", lambda a: [*a[:2], torch.minimum(a[2] + 1, a[3]), *a[3:]])
MUTANTS["fused_dense_instead_of_top_k"] = fused_with("attend", lambda a: [*a[:7], None, *a[8:]])
MUTANTS["fused_index_weights_are_positive"] = fused_with("choose", lambda a: [a[0], F.softplus(a[1]), *a[2:]])
MUTANTS["fused_indexer_takes_the_lowest"] = fused_with("choose", lambda a: [a[0], -a[1], *a[2:]])
MUTANTS["fused_one_entry_less"] = fused_with("choose", lambda a: [*a[:4], (a[4] - 1).clamp(min=0), a[5]])


@mutant
def no_sink(p: Patch, _: Transformer) -> None:
    masked(p, joint_with(lambda a: a | {"sink": torch.full_like(a["sink"], -1e9)}))


@mutant
def one_sink_for_all_heads(p: Patch, _: Transformer) -> None:
    masked(p, joint_with(lambda a: a | {"sink": a["sink"].mean().expand_as(a["sink"])}))


@mutant
def scores_are_scaled_twice(p: Patch, _: Transformer) -> None:
    masked(p, joint_with(lambda a: a | {"scale": a["scale"] ** 2}))


@mutant
def values_are_not_the_keys(p: Patch, _: Transformer) -> None:
    """Values without the keys' rotation: the output is then rotated back from where it never went."""
    p.setattr(
        attention, "rotate", lambda x, a: reference.rotate(x, a.conj()) if a.is_conj() else reference.rotate(x, a)
    )


def with_reach(change: Callable[[Tensor, plan.Plan], Tensor]) -> Callable[[Patch, Transformer], None]:
    def apply(p: Patch, _: Transformer) -> None:
        build = plan.Plan.build

        def broken(*args):
            made = build(*args)
            made.reach = change(made.reach, made)
            return made

        p.setattr(plan.Plan, "build", staticmethod(broken))

    return apply


MUTANTS["window_of_one_more"] = with_reach(lambda reach, made: torch.minimum(made.position, reach + 1))
MUTANTS["window_of_one_less"] = with_reach(lambda reach, made: (reach - 1).clamp(min=0))


@mutant
def compressed_layers_have_no_window(p: Patch, _: Transformer) -> None:
    def change(a: dict) -> dict:
        if a["far"] is None:
            return a
        own = torch.zeros_like(a["near_mask"])
        t = a["near_mask"].shape[1]
        block = a["near"].shape[1] - 16
        own[:, torch.arange(t), 16 + torch.arange(t) % block] = True
        return a | {"near_mask": a["near_mask"] & own}

    masked(p, joint_with(change))


@mutant
def output_groups_interleave_heads(p: Patch, _: Transformer) -> None:
    real = attention.Attention._project
    p.setattr(
        attention.Attention,
        "_project",
        lambda self, o: real(self, o.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3)),
    )


# --- compression and indexer (2.3.1, 2.3.2) ---


def with_entries(change: Callable[[plan.Entries, Tensor, int], None]) -> Callable[[Patch, Transformer], None]:
    def apply(p: Patch, model: Transformer) -> None:
        real = plan._entries

        def broken(ratio, position, *rest):
            made = real(ratio, position, *rest)
            change(made, position, ratio)
            return made

        p.setattr(plan, "_entries", broken)

    return apply


def _angles_at_last(e: plan.Entries, position: Tensor, ratio: int) -> None:
    f = frequencies(tiny())["compress"]
    e.angles = plan._turn(position.gather(1, e.last), f)


MUTANTS["entries_rotate_at_their_last_token"] = with_entries(_angles_at_last)
MUTANTS["entries_rotate_at_the_previous_window"] = with_entries(
    lambda e, position, ratio: setattr(
        e,
        "angles",
        plan._turn((position.gather(1, e.last) - 2 * ratio + 1).clamp(min=0), frequencies(tiny())["compress"]),
    )
)
MUTANTS["entries_are_seen_one_token_late"] = with_entries(
    lambda e, position, ratio: setattr(e, "high", position // ratio)
)
MUTANTS["entries_are_seen_while_unfinished"] = with_entries(
    lambda e, position, ratio: setattr(e, "high", ((position + ratio) // ratio).clamp(max=e.count))
)


def swap(model: Transformer, p: Patch, *names: str) -> None:
    for name, tensor in model.named_parameters():
        if name.endswith(names):
            half = tensor.shape[-1] // 2 if name.endswith("ape") else tensor.shape[0] // 2
            p.setattr(tensor, "data", torch.roll(tensor.data, half, -1 if name.endswith("ape") else 0))


@mutant
def overlap_halves_are_swapped(p: Patch, model: Transformer) -> None:
    for block in model.layers:
        if block.layer.overlap:
            swap(block.attn.compressor, p, "wkv.weight", "wgate.weight", "ape")


@mutant
def first_entry_pools_garbage(p: Patch, _: Transformer) -> None:
    real = compressor.Compressor._entries

    def broken(self, rows, last, dtype, made):
        shifted = dataclasses.replace(made, position=made.position + 100)
        return real(self, rows, last, dtype, shifted)

    p.setattr(compressor.Compressor, "_entries", broken)


@mutant
def no_position_bias_in_the_gates(p: Patch, model: Transformer) -> None:
    for name, tensor in model.named_parameters():
        if name.endswith("ape"):
            p.setattr(tensor, "data", torch.zeros_like(tensor))


@mutant
def index_weights_are_positive(p: Patch, _: Transformer) -> None:
    masked(p)
    real = indexer.Indexer.score
    p.setattr(indexer.Indexer, "score", staticmethod(lambda q, w, k: real(q, F.softplus(w), k)))


@mutant
def index_scores_without_relu(p: Patch, _: Transformer) -> None:
    masked(p)
    p.setattr(indexer.Indexer, "score", staticmethod(lambda q, w, k: torch.einsum("bthd,bed,bth->bte", q, k, w)))


@mutant
def indexer_takes_the_lowest(p: Patch, _: Transformer) -> None:
    masked(p)
    real = indexer.Indexer.score
    p.setattr(indexer.Indexer, "score", staticmethod(lambda q, w, k: -real(q, w, k)))


@mutant
def dense_instead_of_top_k(p: Patch, _: Transformer) -> None:
    masked(p)
    p.setattr(attention.Attention, "_select", lambda self, far, visible, scores: (far, visible, scores))


# --- experts (2.1) ---


def gate_with(change: Callable) -> Callable[[Patch, Transformer], None]:
    def apply(p: Patch, _: Transformer) -> None:
        real = moe.Gate.forward
        p.setattr(moe.Gate, "forward", lambda self, x, ids: change(self, x, ids, *real(self, x, ids)))

    return apply


def _normed(gate: moe.Gate, weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True) * gate.config.routed_scaling_factor


def _bias_in_weights(gate, x, ids, experts, weights, scores):
    if gate.layer.router == "learned":
        weights = _normed(gate, (scores + gate.bias).gather(1, experts))
    return experts, weights, scores


def _hash(change: Callable) -> Callable:
    return lambda gate, x, ids, e, w, s: change(e, w, s) if gate.layer.router == "hash" else (e, w, s)


MUTANTS["bias_enters_the_weights"] = gate_with(_bias_in_weights)
MUTANTS["bias_does_not_select"] = gate_with(
    lambda g, x, ids, e, w, s: (
        (s.topk(2).indices, _normed(g, s.topk(2).values), s) if g.layer.router == "learned" else (e, w, s)
    )
)
MUTANTS["hash_layers_weigh_uniformly"] = gate_with(_hash(lambda e, w, s: (e, torch.full_like(w, 0.75), s)))
MUTANTS["hash_layers_use_one_expert"] = gate_with(_hash(lambda e, w, s: (e[:, :1].expand_as(e), w, s)))
MUTANTS["hash_layers_route_by_score"] = gate_with(_hash(lambda e, w, s: (s.topk(2).indices, w, s)))
MUTANTS["router_scores_by_sigmoid"] = gate_with(
    lambda g, x, ids, e, w, s: (e, _normed(g, torch.sigmoid(F.linear(x, g.weight)).gather(1, e)), s)
)
MUTANTS["weights_are_not_normalised"] = gate_with(lambda g, x, ids, e, w, s: (e, s.gather(1, e) * 1.5, s))
MUTANTS["weights_are_not_scaled"] = gate_with(lambda g, x, ids, e, w, s: (e, w / 1.5, s))


@mutant
def no_clamp_on_the_shared_expert(p: Patch, model: Transformer) -> None:
    for block in model.layers:
        p.setattr(block.ffn.shared_experts, "limit", 1e9)


@mutant
def no_clamp_on_the_routed_experts(p: Patch, _: Transformer) -> None:
    p.setattr(moe, "routed_experts", lambda *a: reference.routed_experts(*a[:-1], 1e9))


def expert_with(swiglu: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    return lambda x, w1, w2, w3, limit: F.linear(swiglu(F.linear(x, w1), F.linear(x, w3), limit), w2)


@mutant
def gate_is_clamped_on_both_sides(p: Patch, _: Transformer) -> None:
    p.setattr(moe, "expert", expert_with(lambda g, u, c: F.silu(g.clamp(-c, c)) * u.clamp(-c, c)))


@mutant
def clamp_after_silu(p: Patch, _: Transformer) -> None:
    p.setattr(moe, "expert", expert_with(lambda g, u, c: F.silu(g).clamp(max=c) * u.clamp(-c, c)))


@mutant
def w1_and_w3_are_swapped(p: Patch, _: Transformer) -> None:
    p.setattr(moe, "routed_experts", lambda x, e, w, w1, w2, w3, c: reference.routed_experts(x, e, w, w3, w2, w1, c))


@mutant
def shared_expert_is_scaled(p: Patch, _: Transformer) -> None:
    real = moe.Expert.forward
    p.setattr(moe.Expert, "forward", lambda self, x: 1.5 * real(self, x))


@mutant
def norm_eps_of_1e_3(p: Patch, model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, compressor.Norm):
            p.setattr(module, "eps", 1e-3)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, subject, monkeypatch: Patch) -> None:
    MUTANTS[name](monkeypatch, subject[0])
    assert miss(subject) > 5e-5, f"breaking this rule changes nothing: {name}"
