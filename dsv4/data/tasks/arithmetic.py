"""Arithmetic and comparison, digit by digit from the right, as on paper."""

from __future__ import annotations

import random

from dsv4.data.tasks.item import Family, Item, phrase


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def add_steps(a: int, b: int) -> str:
    """Both numbers reversed, then one line per column: digit + digit + carry = two digits."""
    width = max(len(str(a)), len(str(b)))
    x, y = (str(n).zfill(width)[::-1] for n in (a, b))
    lines, carry = [f"{x} {y}"], 0
    for p, q in zip(x, y):
        total = int(p) + int(q) + carry
        lines.append(f"{p}+{q}+{carry}={total:02}")
        carry = total // 10
    return "\n".join(lines)


def subtract_steps(a: int, b: int) -> str:
    """For a >= b: both reversed, then per column: digit - digit - borrow = digit, b1 when it borrows."""
    x, y = str(a)[::-1], str(b).zfill(len(str(a)))[::-1]
    lines, borrow = [f"{x} {y}"], 0
    for p, q in zip(x, y):
        difference = int(p) - int(q) - borrow
        lines.append(f"{p}-{q}-{borrow}={difference % 10}b{int(difference < 0)}")
        borrow = int(difference < 0)
    return "\n".join(lines)


def multiply_steps(a: int, digit: int) -> str:
    """A number times one digit, per column: digit * digit + carry = two digits."""
    lines, carry = [str(a)[::-1]], 0
    for p in str(a)[::-1]:
        total = int(p) * digit + carry
        lines.append(f"{p}*{digit}+{carry}={total:02}")
        carry = total // 10
    return "\n".join(lines)


def _nines(number: int) -> tuple[str, int]:
    """Repeated digit sums down to one digit: the remainder by nine (9 for 0 when the number is not 0)."""
    text = str(number)
    while number > 9:
        digits = str(number)
        number = sum(map(int, digits))
        text += f" {'+'.join(digits)}={number}"
    return text, number


def _off(rng: random.Random, value: int) -> int:
    """A number that differs in one digit, as a slip of the pen would."""
    digits = list(str(value))
    place = rng.randrange(len(digits))
    digits[place] = str((int(digits[place]) + rng.choice((1, 2, 8, 9))) % 10)
    return int("".join(digits))


def _add(rng: random.Random, level: int) -> Item:
    a, b = _number(rng, level), _number(rng, rng.randint(max(1, level - 1), level))
    if rng.random() < 0.5:
        a, b = b, a
    prompt = phrase(
        rng,
        "What is {a} + {b}?|{a} + {b} = ?|Add {a} and {b}.|Calculate {a}+{b}|How much is {a} plus {b}?",
        a=a,
        b=b,
    )
    wrong = _off(rng, a + b)
    exposed = (
        f"{wrong}-{b}\n{subtract_steps(wrong, b)}\n{wrong - b} is not {a}"
        if wrong >= b
        else f"{wrong} is less than {b}"
    )
    check = f"{a + b}-{b}\n{subtract_steps(a + b, b)}\n{a}"
    low, high = sorted((a, b))
    return Item("add", level, f"add {low} {high}", prompt, str(a + b), add_steps(a, b), check, (str(wrong), exposed))


def _subtract(rng: random.Random, level: int) -> Item:
    a, b = _number(rng, level), _number(rng, rng.randint(max(1, level - 1), level))
    prompt = phrase(
        rng,
        "What is {a} - {b}?|{a} - {b} = ?|Subtract {b} from {a}.|Calculate {a}-{b}|How much is {a} minus {b}?",
        a=a,
        b=b,
    )
    high, low = max(a, b), min(a, b)
    sign = "-" if a < b else ""
    steps = (f"{a} is less than {b}, so minus {b}-{a}\n" if sign else "") + subtract_steps(high, low)

    def check(size: int) -> str:
        return f"{size}+{low}\n{add_steps(size, low)}\n{size + low}"

    wrong = _off(rng, high - low)
    slip = (f"{sign}{wrong}", f"{check(wrong)} is not {high}")
    return Item("subtract", level, f"subtract {a} {b}", prompt, str(a - b), steps, check(high - low), slip)


def _multiply(rng: random.Random, level: int) -> Item:
    a, b = (_number(rng, level), rng.randint(2, 9)) if level < 5 else (_number(rng, 2), _number(rng, 2))
    if level == 5:
        tens, ones = divmod(b, 10)
        parts = a * ones, a * tens * 10
        steps = (
            f"{a}*{ones}\n{multiply_steps(a, ones)}\n{parts[0]}\n{a}*{tens}0\n{multiply_steps(a, tens)}\n{parts[1]}\n"
        )
        steps += add_steps(*parts)
    else:
        steps = multiply_steps(a, b)
    prompt = phrase(
        rng,
        "What is {a} * {b}?|{a} x {b} = ?|Multiply {a} by {b}.|Calculate {a}*{b}|How much is {a} times {b}?",
        a=a,
        b=b,
    )
    left, right = _nines(a), _nines(b)
    product = _nines(left[1] * right[1])

    def check(value: int) -> str:
        return f"{left[0]}\n{right[0]}\n{left[1]}*{right[1]}={product[0]}\n{_nines(value)[0]}"

    wrong = _off(rng, a * b)
    exposed = f"{check(wrong)} is not {product[1]}"
    slip = (str(wrong), exposed) if _nines(wrong)[1] != product[1] else None
    return Item("multiply", level, f"multiply {a} {b}", prompt, str(a * b), steps, check(a * b), slip)


def _compare(rng: random.Random, level: int) -> Item:
    decimals = rng.choice((0, 0, 1, 2)) if level > 1 else 0
    a = _number(rng, level + 1)
    b = rng.choice([_number(rng, level + 1), _off(rng, a), _off(rng, a), _number(rng, rng.randint(1, level + 1))])
    if a == b:
        b += 1
    shown = [f"{n / 10**decimals:.{decimals}f}" for n in (a, b)]
    if decimals == 2:  # 9.9 against 9.11
        shown = [s.rstrip("0") if not s.endswith(".00") and rng.random() < 0.8 else s for s in shown]
    larger = rng.random() < 0.5
    answer = shown[(a < b) == larger]
    width = max(len(str(a)), len(str(b)), decimals + 1)
    rows = [str(n).zfill(width) for n in (a, b)]

    def steps(p: str, q: str) -> str:
        lines = [f"{p} {q}"]
        for x, y in zip(p, q):
            lines.append(f"{x}{'<' if x < y else '>' if x > y else '='}{y}")
            if x != y:
                break
        return "\n".join(lines)

    word = "larger" if larger else "smaller"
    prompt = phrase(
        rng,
        "Which is {w}, {a} or {b}?|Which number is {w}: {a} or {b}?|{a} or {b}, which one is {w}?|"
        "Name the {w} of {a} and {b}.",
        w=word,
        a=shown[0],
        b=shown[1],
    )
    key = f"compare {min(shown)} {max(shown)}"
    other = shown[(a < b) != larger]
    slip = (other, f"{steps(*rows[::-1])} {other} is not {word}")
    return Item("compare", level, key, prompt, answer, steps(*rows), steps(*rows[::-1]), slip)


FAMILIES = [
    Family("add", _add),
    Family("subtract", _subtract),
    Family("multiply", _multiply),
    Family("compare", _compare),
]
