"""Lists of small numbers: sort, maximum, filter, sum. Items are carried along one step at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from dsv4.data.tasks.item import Family, Item, phrase


def _show(values: Sequence[int]) -> str:
    return f"[{', '.join(map(str, values))}]"


def _numbers(rng: random.Random, level: int, top: int = 99) -> list[int]:
    return [rng.randint(0, top) for _ in range(level + 2)]


def _plain(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _off(rng: random.Random, values: list[int]) -> list[int]:
    """The list with one item lost, or a 0 too many where it was empty."""
    if not values:
        return [0]
    lost = rng.randrange(len(values))
    return values[:lost] + values[lost + 1 :]


def _sort(rng: random.Random, level: int) -> Item:
    values = _numbers(rng, level)
    down = rng.random() < 0.3
    order = "in descending order" if down else rng.choice(["in ascending order", "from small to large"])
    prompt = phrase(
        rng,
        "Sort {v} {o}.|Put {v} {o}.|Order the list {v} {o}.",
        v=_show(
            values,
        ),
        o=order,
    )
    rest, lines, result = values, [], sorted(values, reverse=down)
    for value in result:
        rest = list(rest)
        rest.remove(value)
        lines.append(f"{value}: {_plain(rest)}" if rest else f"{value}:")

    def check(candidate: list[int]) -> str:
        sign = ">=" if down else "<="
        return f"{sign.join(map(str, candidate))}, {len(candidate)} of {len(values)} items"

    wrong = _off(rng, result)
    slip = (_show(wrong), check(wrong))
    key = f"sort {down} {_plain(sorted(values))} {_plain(values)}"
    return Item("sort", level, key, prompt, _show(result), "\n".join(lines), check(result), slip, "json")


def _maximum(rng: random.Random, level: int) -> Item:
    values = _numbers(rng, level + 1, 99 if level < 4 else 999)
    large = rng.random() < 0.6
    pick = max if large else min
    name = rng.choice(["largest", "biggest"] if large else ["smallest", "lowest"])
    prompt = phrase(
        rng,
        "What is the {n} number in {v}?|Find the {n} of {v}.|Give the {n} item of the list {v}.",
        n=name,
        v=_show(
            values,
        ),
    )
    answer = pick(values)
    steps = "\n".join(f"{v}: {pick(values[: i + 1])}" for i, v in enumerate(values))
    sign = "<=" if large else ">="
    check = "\n".join(f"{v}{sign}{answer}" for v in values)
    others = [v for v in values if v != answer]
    slip = None
    if others:
        wrong = rng.choice(others)
        slip = (str(wrong), f"{answer}{sign}{wrong}")
    return Item("maximum", level, f"maximum {large} {_plain(values)}", prompt, str(answer), steps, check, slip)


def _filter(rng: random.Random, level: int) -> Item:
    values = _numbers(rng, level)
    kind = rng.choice(["even", "odd", "greater", "less"])
    limit = rng.randint(20, 80)
    tests: dict[str, Callable[[int], bool]] = {
        "even": lambda v: v % 2 == 0,
        "odd": lambda v: v % 2 == 1,
        "greater": lambda v: v > limit,
        "less": lambda v: v < limit,
    }
    keep = tests[kind]
    wanted = f"{kind} numbers" if kind in ("even", "odd") else f"numbers {kind} than {limit}"
    prompt = phrase(
        rng,
        "Keep only the {w} of {v}.|List the {w} in {v}.|Which {w} are in {v}?|From {v} select the {w}.",
        w=wanted,
        v=_show(
            values,
        ),
    )
    steps = "\n".join(f"{v} {'yes' if keep(v) else 'no'}" for v in values)
    result = [v for v in values if keep(v)]
    dropped = [v for v in values if not keep(v)]

    def check(candidate: list[int]) -> str:
        return f"kept {_plain(candidate) or 'none'}, dropped {_plain(dropped) or 'none'}, of {len(values)} items"

    wrong = _off(rng, result)
    slip = (_show(wrong), check(wrong))
    key = f"filter {wanted} {_plain(values)}"
    return Item("filter", level, key, prompt, _show(result), steps, check(result), slip, "json")


def _running(values: Sequence[int]) -> str:
    total, lines = values[0], [str(values[0])]
    for value in values[1:]:
        lines.append(f"{total}+{value}={total + value}")
        total += value
    return "\n".join(lines)


def _sum(rng: random.Random, level: int) -> Item:
    values = _numbers(rng, level, 9 if level < 4 else 20)
    prompt = phrase(
        rng,
        "What is the sum of {v}?|Add up the list {v}.|Sum {v}.|What does sum({v}) return?",
        v=_show(
            values,
        ),
    )
    total = sum(values)
    wrong = total + rng.choice((-1, 1, 10))
    check = _running(values[::-1])
    key = f"sum {_plain(values)}"
    return Item("sum", level, key, prompt, str(total), _running(values), check, (str(wrong), f"{check} is not {wrong}"))


FAMILIES = [Family("sort", _sort), Family("maximum", _maximum), Family("filter", _filter), Family("sum", _sum)]
