"""Strings, letter by letter: a model that sees pieces of words must spell before it can reverse or count."""

from __future__ import annotations

import random

from dsv4.data.tasks.item import Family, Item, phrase
from dsv4.data.tasks.words import word


def _spell(text: str) -> str:
    return " ".join(text)


def _off(rng: random.Random, text: str) -> str:
    """Two neighbours swapped, or a letter doubled where a swap would change nothing."""
    place = rng.randrange(len(text) - 1)
    swapped = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    return swapped if swapped != text else text[:place] + text[place] + text[place:]


def _reverse(rng: random.Random, level: int) -> Item:
    text = word(rng, level + 2)
    prompt = phrase(
        rng,
        'Reverse the word {w}.|Write {w} backwards.|What is {w} spelled backwards?|Reverse the string "{w}".',
        w=text,
    )
    answer, wrong = text[::-1], _off(rng, text[::-1])
    steps = f"{_spell(text)}\n{_spell(answer)}"
    slip = (wrong, f"{_spell(wrong)}\n{_spell(wrong[::-1])} is not {text}")
    return Item("reverse", level, f"reverse {text}", prompt, answer, steps, f"{_spelled_back(answer)} is {text}", slip)


def _spelled_back(answer: str) -> str:
    return f"{_spell(answer)}\n{_spell(answer[::-1])}"


def _count(rng: random.Random, level: int) -> Item:
    text = word(rng, 2 * level + rng.randint(2, 3))
    letter = rng.choice(text) if rng.random() < 0.85 else rng.choice("aeiourstln")
    if rng.random() < 0.5:  # repeated letters are what makes it a task
        text = "".join(letter if rng.random() < 0.3 else c for c in text)
    prompt = phrase(
        rng,
        "How many times does {c} occur in {w}?|Count the letter {c} in {w}.|How many {c} are in {w}?|"
        'How often does the letter "{c}" appear in "{w}"?',
        c=letter,
        w=text,
    )
    seen, marks = 0, []
    for c in text:
        seen += c == letter
        marks.append(f"{c}{seen}")
    rest = _spell(text.replace(letter, "")) or "nothing"

    def check(total: int) -> str:
        return f"{len(text)} letters, {len(text) - seen} others: {rest}\n{len(text)}-{len(text) - seen}={total}"

    wrong = seen + 1 if seen == 0 or rng.random() < 0.5 else seen - 1
    slip = (str(wrong), f"{check(seen)} is not {wrong}")
    return Item("count", level, f"count {letter} {text}", prompt, str(seen), " ".join(marks), check(seen), slip)


def _uppercase(rng: random.Random, level: int) -> Item:
    text = word(rng, level + 2)
    prompt = phrase(
        rng,
        'Write {w} in capital letters.|Uppercase {w}.|Convert {w} to uppercase.|What is "{w}".upper() in Python?',
        w=text,
    )
    answer = text.upper()
    wrong = _off(rng, answer)
    slip = (wrong, f"{_spell(wrong)}\n{_spell(wrong.lower())} is not {text}")
    steps = f"{_spell(text)}\n{_spell(answer)}"
    check = f"{_spell(answer)}\n{_spell(text)} is {text}"
    return Item("uppercase", level, f"uppercase {text}", prompt, answer, steps, check, slip)


FAMILIES = [Family("reverse", _reverse), Family("count", _count), Family("uppercase", _uppercase)]
