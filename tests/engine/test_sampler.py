"""The sampler against the distribution it claims to draw from."""

from __future__ import annotations

import pytest
import torch

from dsv4.engine.sampler import SamplingParams, sample, uniform

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    assert sample(LOGITS, 0, 1, 0.99) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    n = 4000
    counts = torch.bincount(
        torch.tensor([sample(LOGITS, temperature, 1, (i + 0.5) / n) for i in range(n)]), minlength=len(LOGITS)
    )
    expected = torch.softmax(LOGITS / temperature, -1)
    assert (counts / n - expected).abs().max() < 1.5 / n  # evenly spaced draws: the inverse distribution, to rounding


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # softmax: ids 1 and 3 have 0.3966 each, id 2 has 0.1459, id 0 0.0537, id 4 0.0073
    for top_p, kept in ((0.39, {1}), (0.40, {1, 3}), (0.90, {1, 3, 2}), (1.0, {0, 1, 2, 3, 4})):
        assert {sample(LOGITS, 1, top_p, i / 1000) for i in range(1000)} == kept, top_p


def test_uniform_depends_on_seed_and_position_alone() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    draws = torch.tensor([uniform(seed, position) for seed in range(40) for position in range(50)])
    assert len(set(draws.tolist())) == 2000 and draws.min() >= 0 and draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 3 * (1 / 12 / 2000) ** 0.5


@pytest.mark.parametrize(
    "wrong", [{"temperature": 2.1}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": 0}]
)
def test_bad_parameters_name_the_value(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        SamplingParams(**wrong)  # type: ignore[arg-type]
