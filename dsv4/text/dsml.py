"""How tool arguments are spelled: JSON text on the API side, DSML parameters on the model's side.

A DSML parameter is either a string, written raw with no escaping at all, or any other value, written as JSON.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn


class Parameter(NamedTuple):
    """A parameter; `value` is the raw string, or JSON text."""

    name: str
    is_string: bool
    value: str


def to_parameters(arguments: str, rust_numbers: bool) -> list[Parameter]:
    """The parameters of a call's `arguments`. What is no JSON object goes whole into a string named "arguments"."""
    try:
        values = json.loads(arguments, parse_constant=_reject, parse_float=_finite)
        if isinstance(values, dict):
            to_json(values, rust_numbers).encode()  # lone surrogates have no UTF-8
            return [
                Parameter(name, True, value)
                if isinstance(value, str)
                else Parameter(name, False, to_json(value, rust_numbers))
                for name, value in values.items()
            ]
    except (ValueError, RecursionError):
        pass
    return [Parameter("arguments", True, arguments)]


def to_json(value: Any, rust_numbers: bool = False) -> str:
    """JSON with ", " and ": ", non-ASCII kept, keys in order.

    Numbers as Python spells them, or with `rust_numbers` as the official front-end does: exponents without a leading
    zero and from 1e-6 down only, and integers that do not fit 64 bits as floats.
    """
    if not rust_numbers:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join([f"{json.dumps(key, ensure_ascii=False)}: {to_json(value[key], True)}" for key in value])
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join([to_json(item, True) for item in value]) + "]"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        value = float(value)
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        text = format(Decimal(text), "f") if text.endswith("e-05") else re.sub("e([+-])0", r"e\1", text)
    return text


def is_json(text: str) -> bool:
    """Whether `text` is one JSON value by the letter of the standard (no NaN, no Infinity)."""
    try:
        json.loads(text, parse_constant=_reject, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return True


def _reject(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value
