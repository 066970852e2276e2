"""The schedule, step by step, and the recipes in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv4.common import runconfig
from dsv4.training.recipe import BatchSettings, Recipe
from dsv4.training.schedule import Schedule

S = Schedule(
    steps=100, warmup=10, decay=0.4, dense_steps=30, indexer_steps=5, indexer_lr=7e-3,
    lengths=((0, 64), (50, 128), (90, 256)), gamma_off=0.05,
)  # fmt: skip


def lr(step: int) -> float:
    return S.at(step, 1.0, 0.1).lr


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert [lr(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert Schedule(steps=3, warmup=0, decay=0.0).at(0, 1.0, 0.1).lr == 1.0


def test_flat_then_cosine_to_the_end_rate() -> None:
    assert {lr(s) for s in [*range(9, 30), *range(35, 60)]} == {1.0}
    assert S.decay_start == 60
    assert lr(60) < 1.0
    assert lr(79) == pytest.approx(0.55)  # half way: the mean of both ends
    assert lr(99) == pytest.approx(0.1)
    decay = [lr(s) for s in range(59, 100)]
    assert decay == sorted(decay, reverse=True)
    assert decay[0] - decay[1] < 0.01 < decay[20] - decay[21], "a cosine is flat at first, steep in the middle"


def test_mtp_weight_falls_where_the_decay_starts() -> None:
    assert [S.at(s, 1.0, 0.1).mtp_weight for s in (0, 59, 60, 99)] == [0.3, 0.3, 0.1, 0.1]


def test_phases_of_the_indexer() -> None:
    phases = [S.at(s, 1.0, 0.1).phase for s in range(100)]
    assert phases == ["off"] * 30 + ["warmup"] * 5 + ["sparse"] * 65
    assert {lr(s) for s in range(30, 35)} == {7e-3}, "the warm-up has its own rate"


def test_length_stages_and_bias_balancing() -> None:
    assert [S.at(s, 1.0, 0.1).length for s in (0, 49, 50, 89, 90, 99)] == [64, 64, 128, 128, 256, 256]
    assert S.stage(70) == (50, 128)
    assert [S.at(s, 1.0, 0.1).gamma for s in (0, 94, 95, 99)] == [0.001, 0.001, 0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"decay": 1.5}, r"decay 1\.5 in 0\.\.1"),
        ({"warmup": 70}, "warmup 70 and decay 0.4 exceed 100"),
        ({"dense_steps": 98}, r"dense_steps 98 \+ indexer_steps 5 must be at most 100"),
        ({"lengths": ((5, 64),)}, "lengths must be"),
        ({"lengths": ((0, 64), (0, 128))}, "lengths must be"),
        ({"lengths": ((0, 4),)}, "lengths must be"),
    ],
)
def test_impossible_schedules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**{**S.__dict__, **fields})


def test_batch_divides_into_rows_and_passes() -> None:
    batch = BatchSettings(tokens=8192, micro_tokens=4096)
    assert batch.rows(512) == (8, 2)
    for length in (4097, 8192, 1000):
        with pytest.raises(ValueError, match=f"multiple of length {length}"):
            batch.rows(length)


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def test_recipes_of_the_repository_are_valid() -> None:
    assert {path.stem for path in RECIPES} >= {"micro", "nano", "nano-sft"}
    for path in RECIPES:
        loaded = runconfig.load(Recipe, path)
        assert loaded.name == path.stem
        if not loaded.model.start:
            assert loaded.model.config().num_nextn_predict_layers == 1


def test_a_run_may_go_on_under_a_recipe_that_agrees_so_far() -> None:
    a = Recipe("a", S)
    shorter = Recipe("a", Schedule(**{**S.__dict__, "steps": 90, "lengths": ((0, 64), (50, 128))}), threads=2)
    assert a.agrees(shorter, 54)
    assert shorter.agrees(a, 54)
    assert not shorter.agrees(a, 60), "its decay begins at 54"
    assert not shorter.agrees(a, 95), "it has only 90 steps"
    assert not a.agrees(Recipe("a", S, seed=1), 1)
