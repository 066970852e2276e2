"""Calculator calls: the tool is declared in the request, the model calls it, reads the result and answers."""

from __future__ import annotations

import random
import re
from typing import Any

from dsv4.data.tasks.item import Family, Item, phrase

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
_EXPRESSION = re.compile(r"\s*(-?\d{1,12})\s*([-+*])\s*(-?\d{1,12})\s*")


def calculate(expression: str) -> str:
    """The result of `a + b`, `a - b` or `a * b` on integers, or a line that begins with "error"."""
    match = _EXPRESSION.fullmatch(expression)
    if not match:
        return f"error: cannot evaluate {expression[:40]!r}"
    a, b = int(match[1]), int(match[3])
    return str({"+": a + b, "-": a - b, "*": a * b}[match[2]])


def _calculator(rng: random.Random, level: int) -> Item:
    a, b = (rng.randint(10 ** (level - 1), 10 ** (level + 1) - 1) for _ in range(2))
    sign = rng.choice("+-**")
    call = f"{a} {sign} {b}"
    spoken = {"+": "plus", "-": "minus", "*": "times"}[sign]
    prompt = phrase(
        rng,
        "What is {c}?|{c} = ?|How much is {a} {s} {b}?|Use the calculator: {c}|Compute {c}.",
        a=a,
        b=b,
        c=call,
        s=spoken,
    )
    answer = calculate(call)
    check = f"{a} {spoken} {b}"
    steps = "I use the calculator."
    key = f"calculator {call}"
    return Item("calculator", level, key, prompt, answer, steps, check, tools=(CALCULATOR,), call=call)


FAMILIES = [Family("calculator", _calculator)]
