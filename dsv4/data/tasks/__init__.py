"""Procedural tasks with verifiers, in three effort modes, and their rendering as training samples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from dsv4.common.seeds import rng as counter_rng
from dsv4.data.tasks import arithmetic, lists, recall, strings, tools
from dsv4.data.tasks.chat import conversation
from dsv4.data.tasks.drills import drill
from dsv4.data.tasks.item import LEVELS, MODES, Family, Item, verify, verify_call
from dsv4.data.tasks.tools import calculate
from dsv4.text import Tokenizer, render_training

__all__ = [
    "FAMILIES", "LEVELS", "MODES", "MODE_SHARES", "RARE", "Family", "Item", "calculate", "conversation", "drill",
    "evaluation_items", "sft_samples", "training_requests", "verify", "verify_call",
]  # fmt: skip

FAMILIES: dict[str, Family] = {
    family.name: family
    for room in (arithmetic, strings, lists, recall, tools)
    for family in room.FAMILIES
}  # fmt: skip

MODE_SHARES = {"non-think": 0.3, "high": 0.55, "max": 0.15}
"""Most tokens of a "max" sample are the effort text and a check: few of them go a long way."""

LEVEL_WEIGHTS = {1: 3.0, 2: 2.5, 3: 2.0, 4: 1.5, 5: 1.0}
"""Relative frequency of the levels: a hard item teaches little before the easy ones are mastered."""

RARE = {"calculator": 0.35}
"""Relative frequency of a family (1 for the others): a tool sample is mostly its preamble of 360 tokens."""

CHAT_SHARE = 0.1
DRILL_SHARE = 0.12
FOLLOW_SHARE = 0.3
SYSTEM_SHARE = 0.1
_SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant", "Be brief.", "Answer briefly.")


def training_requests(seed: int, count: int, modes: Mapping[str, float] = MODE_SHARES) -> Iterator[dict[str, Any]]:
    """`count` bodies with the assistant's turns: mostly tasks of every family, level and mode (by relative
    frequency), the rest drills and plain conversation. Sample number n is a function of (seed, n) alone."""
    names, weights = list(FAMILIES), [RARE.get(name, 1.0) for name in FAMILIES]
    for number in range(count):
        rng = counter_rng(seed, "sft", number)
        (mode,) = rng.choices(list(modes), list(modes.values()))
        if rng.random() < DRILL_SHARE:
            yield drill(rng)
            continue
        if rng.random() < CHAT_SHARE:
            body = conversation(rng, mode)
        else:
            family = FAMILIES[rng.choices(names, weights)[0]]
            (level,) = rng.choices(list(LEVEL_WEIGHTS), list(LEVEL_WEIGHTS.values()))
            body = family.sample(rng, level).training_request(mode)
            if rng.random() < FOLLOW_SHARE:
                body["messages"] = _before(rng, family, mode, "tools" in body) + body["messages"]
        if rng.random() < SYSTEM_SHARE:
            body["messages"] = [{"role": "system", "content": rng.choice(_SYSTEMS)}, *body["messages"]]
        yield body


def _before(rng: random.Random, family: Family, mode: str, tools: bool) -> list[dict[str, Any]]:
    """What was said before a task: small talk, or easier tasks and their answers (with their calls, for a tool's)."""
    if not tools and rng.random() < 0.3:
        return list(conversation(rng, "non-think")["messages"])
    messages: list[dict[str, Any]] = []
    others = [family] if tools else [f for name, f in FAMILIES.items() if name not in RARE]
    for _ in range(1 if tools else rng.choice((1, 1, 2, 3))):
        item = rng.choice(others).sample(rng, rng.choice((1, 1, 2)))
        messages += item.training_request(mode if tools else "non-think")["messages"]
    return messages


def sft_samples(
    seed: int, count: int, tokenizer: Tokenizer, modes: Mapping[str, float] = MODE_SHARES, dialect: str = "v4-preview"
) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, mask) of `training_requests`, rendered by the codec that also serves: mask 1 on what is to be learned."""
    for body in training_requests(seed, count, modes):
        yield render_training(body, tokenizer, dialect)


def evaluation_items(family: str, count: int, seed: int = 0) -> list[Item]:
    """`count` items that training can not have seen (by the hash of their content), levels in turn, all different."""
    if family not in FAMILIES:
        raise ValueError(f"no task family {family!r}; there are {', '.join(FAMILIES)}")
    items: dict[str, Item] = {}
    number = 0
    while len(items) < count and number < 100 * count:
        level = LEVELS[number % len(LEVELS)]
        item = FAMILIES[family].sample(counter_rng(seed, "evaluation", family, number), level, "evaluation")
        items.setdefault(item.key, item)
        number += 1
    if len(items) < count:
        raise ValueError(f"family {family} has only {len(items)} different evaluation items, {count} were asked for")
    return list(items.values())
