"""Drills: the small facts that every longer solution is made of, many to a sample, as a pupil writes them out.

A sum of five digits is learned only after 5+8+1=14 is; inside whole solutions each such fact is rare. Drills are for
training alone: they have no verifier and are part of no figure.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from dsv4.data.tasks.words import word


def _sum(rng: random.Random) -> str:
    a, b, carry = rng.randrange(10), rng.randrange(10), rng.randrange(2)
    return f"{a}+{b}+{carry}={a + b + carry:02}"


def _difference(rng: random.Random) -> str:
    a, b, borrow = rng.randrange(10), rng.randrange(10), rng.randrange(2)
    return f"{a}-{b}-{borrow}={(a - b - borrow) % 10}b{int(a < b + borrow)}"


def _product(rng: random.Random) -> str:
    a, b = rng.randrange(10), rng.randrange(2, 10)
    carry = rng.randrange(b)
    return f"{a}*{b}+{carry}={a * b + carry:02}"


def _running_sum(rng: random.Random) -> str:
    a, b = rng.randrange(100), rng.randrange(10)
    return f"{a}+{b}={a + b}"


def _reversal(rng: random.Random) -> str:
    number = str(rng.randrange(10, 10 ** rng.randint(2, 5)))
    return f"{number} {number[::-1]}"


def _order(rng: random.Random) -> str:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a}{'<' if a < b else '>' if a > b else '='}{b}"


def _spelling(rng: random.Random) -> str:
    text = word(rng, rng.randint(3, 7))
    return f"{text}: {' '.join(text)}"


def _joining(rng: random.Random) -> str:
    text = word(rng, rng.randint(3, 7))
    text = rng.choice((text, text.upper()))
    return f"{' '.join(text)}: {text}"


def _backwards(rng: random.Random) -> str:
    text = " ".join(word(rng, rng.randint(3, 7)))
    return f"{text}, {text[::-1]}"


def _parity(rng: random.Random) -> str:
    number = rng.randrange(100)
    return f"{number} {'odd' if number % 2 else 'even'}"


DRILLS: dict[str, Callable[[random.Random], str]] = {
    "sums": _sum, "differences": _difference, "products": _product, "running sums": _running_sum,
    "reversed numbers": _reversal, "order": _order, "spelling": _spelling, "joining letters": _joining,
    "spelling backwards": _backwards, "odd and even": _parity,
}  # fmt: skip
LINES = (8, 40)


def drill(rng: random.Random) -> dict[str, Any]:
    """A Chat Completions body: the user asks for a drill, the assistant writes its lines."""
    name = rng.choice(list(DRILLS))
    lines = [DRILLS[name](rng) for _ in range(rng.randint(*LINES))]
    turns = [
        {"role": "user", "content": f"Practise {name}, {len(lines)} lines."},
        {"role": "assistant", "content": "\n".join(lines)},
    ]
    return {"messages": turns, "thinking": {"type": "disabled"}}
