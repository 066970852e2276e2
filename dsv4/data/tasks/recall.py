"""Recall of a value at a distance, and answers in a demanded format."""

from __future__ import annotations

import json
import random

from dsv4.data.tasks.item import Family, Item, phrase
from dsv4.data.tasks.words import CITIES, COLOURS, NAMES, NOUNS

PAIRS = {1: 4, 2: 8, 3: 14, 4: 21, 5: 30}
"""Key-value pairs by level; from level 4 on the answer may lie further back than the attention window of 128 tokens."""


def _recall(rng: random.Random, level: int) -> Item:
    keys = rng.sample(NOUNS, PAIRS[level])
    values = rng.sample(range(10, 100), len(keys))
    place = rng.randrange(len(keys))
    pairs = ", ".join(f"{k}={v}" for k, v in zip(keys, values))
    prompt = phrase(
        rng,
        "Remember: {p}. What is {k}?|{p}\nWhich value has {k}?|Given {p}, look up {k}.|"
        "Here are values: {p}. Tell me {k}.",
        p=pairs,
        k=keys[place],
    )
    near = keys[place - 1] if place else "the start"
    found = f"{keys[place]}={values[place]}"
    wrong = values[place - 1]
    slip = (str(wrong), f"after {near}: {found}, not {wrong}")
    key = f"recall {keys[place]} {pairs}"
    return Item("recall", level, key, prompt, str(values[place]), found, f"after {near}: {found}", slip)


def _fields(rng: random.Random, count: int) -> dict[str, str | int]:
    choices: dict[str, str | int] = {
        "name": rng.choice(NAMES), "age": rng.randint(5, 99), "city": rng.choice(CITIES), "colour": rng.choice(COLOURS),
        "item": rng.choice(NOUNS), "count": rng.randint(1, 99), "price": rng.randint(1, 500),
    }  # fmt: skip
    return {name: choices[name] for name in rng.sample(list(choices), count)}


def _format(rng: random.Random, level: int) -> Item:
    kind = rng.choice(["json", "json", "array", "csv", "bullets", "repeat", "lines"])
    if kind in ("json", "csv", "lines"):
        fields = _fields(rng, min(level + 1, 6))
        given = ", ".join(f"{k} {v}" for k, v in fields.items())
        answer = {
            "json": json.dumps(fields),
            "csv": f"{','.join(fields)}\n{','.join(map(str, fields.values()))}",
            "lines": "\n".join(f"{k}: {v}" for k, v in fields.items()),
        }[kind]
        ask = {
            "json": ["Write as a JSON object: {g}.", "Give me JSON for {g}.", "Answer in JSON: {g}"],
            "csv": ["Write as CSV with a header: {g}.", "Turn into CSV: {g}"],
            "lines": ["Write one field per line as name: value. {g}", "One line per field, with a colon: {g}"],
        }[kind]
        parts = list(fields)
    else:
        words = rng.sample(NOUNS, min(level + 1, 6))
        if kind == "repeat":
            words = [words[0]] * len(words)
        given = f"{words[0]} {len(words)} times" if kind == "repeat" else ", ".join(words)
        answer = {
            "array": json.dumps(words),
            "bullets": "\n".join(f"- {w}" for w in words),
            "repeat": ", ".join(words),
        }[kind]
        ask = {
            "array": ["Write as a JSON array of strings: {g}.", "Make a JSON list of {g}."],
            "bullets": ["Write as a bullet list: {g}.", "Make a Markdown list of {g}."],
            "repeat": ["Say {g}, separated by commas.", "Repeat {g} with commas between."],
        }[kind]
        parts = words
    prompt = rng.choice(ask).format(g=given)
    steps = f"{kind}\n" + "\n".join(f"{i} {part}" for i, part in enumerate(parts, 1))
    same = "json" if kind in ("json", "array") else "text"
    check = f"{kind}, {len(parts)} of {len(parts)}"
    return Item("format", level, f"format {kind} {given}", prompt, answer, steps, check, None, same)


FAMILIES = [Family("recall", _recall), Family("format", _format)]
