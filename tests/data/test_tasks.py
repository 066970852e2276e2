"""Tasks: right answers, verifiers that refuse wrong ones, reasoning that holds, and evaluation apart from training."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from dsv4.common.seeds import rng as counter_rng
from dsv4.data.tasks import (
    FAMILIES,
    LEVELS,
    MODES,
    Item,
    calculate,
    evaluation_items,
    sft_samples,
    training_requests,
    verify,
    verify_call,
)  # fmt: skip
from dsv4.data.tasks.chat import TERMS
from dsv4.data.tasks.drills import DRILLS, drill
from dsv4.text import Tokenizer, parse, render, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([json.dumps(body) for body in training_requests(9, 200)], 600)


def _items(family: str, count: int = 60, split: str = "train") -> list[Item]:
    every = (FAMILIES[family].sample(counter_rng(4, family, n), LEVELS[n % 5], split) for n in range(count))
    return list(every)


def _reply(content: str) -> dict[str, Any]:
    return {"content": content, "reasoning_content": "", "tool_calls": [], "finish_reason": "stop"}


def _mutations(answer: str) -> list[str]:
    wrong = [
        answer + "1",
        "1" + answer,
        answer[:-1],
        "",
        f"{answer} {answer}",
        answer + "\nand more",
        f"It is {answer}?",
    ]
    wrong += [answer[:i] + ("7" if c != "7" else "3") + answer[i + 1 :] for i, c in enumerate(answer) if c.isalnum()]
    return wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_verifiers_accept_the_answer_and_refuse_mutations(family: str) -> None:
    for item in _items(family):
        assert verify(item, _reply(item.answer)) and verify(item, _reply(f"\n{item.answer} "))
        for wrong in _mutations(item.answer):
            assert not verify(item, _reply(wrong)), f"{item.prompt!r}: {wrong!r} passes for {item.answer!r}"
        call = {"name": "calculator", "arguments": '{"expression": "1 + 1"}'}
        assert not verify(item, _reply(item.answer) | {"tool_calls": [call]})


def _evaluated(item: Item) -> str:
    """The answer worked out from the wording alone, by other means than the generator's."""
    text = item.prompt
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    inside = re.search(r"\[(.*)\]", text)
    values = [int(n) for n in inside[1].split(",")] if inside else []
    match item.family:
        case "add":
            return str(numbers[0] + numbers[1])
        case "subtract":
            return str(numbers[1] - numbers[0] if text.startswith("Subtract") else numbers[0] - numbers[1])
        case "multiply":
            return str(numbers[0] * numbers[1])
        case "compare":
            pick = max if "larger" in text else min
            return str(pick(re.findall(r"\d+(?:\.\d+)?", text), key=float))
        case "sort":
            return str(sorted(values, reverse="descending" in text))
        case "maximum":
            return str(max(values) if re.search("largest|biggest", text) else min(values))
        case "sum":
            return str(sum(values))
        case "filter":
            limit = int(found[1]) if (found := re.search(r"than (\d+)", text)) else 0
            tests = {
                "even": lambda v: v % 2 == 0,
                "odd": lambda v: v % 2,
                "greater": lambda v: v > limit,
                "less": lambda v: v < limit,
            }
            kind = next(k for k in tests if k in text)
            return str([v for v in values if tests[kind](v)])
        case "recall":
            key = re.search(r"What is (\w+)\?$|value has (\w+)\?$|look up (\w+)\.$|Tell me (\w+)\.$", text)
            assert key is not None
            return dict(re.findall(r"(\w+)=(\d+)", text))[key[key.lastindex or 0]]
    raise AssertionError(item.family)


@pytest.mark.parametrize(
    "family", ["add", "subtract", "multiply", "compare", "sort", "maximum", "sum", "filter", "recall"]
)
def test_answers_are_right(family: str) -> None:
    for item in _items(family, 200):
        assert item.answer == _evaluated(item), item.prompt


def test_string_and_format_answers_are_right() -> None:
    for item in _items("reverse"):
        assert item.answer[::-1] in item.prompt
    for item in _items("uppercase"):
        assert item.answer.lower() in item.prompt and item.answer.isupper()
    for item in _items("count"):
        letter, text = item.key.split()[1:]
        assert item.answer == str(text.count(letter)) and text in item.prompt
    for item in _items("format"):
        if item.same == "json":
            given = json.loads(item.answer)
            assert all(str(v) in item.prompt for v in (given.values() if isinstance(given, dict) else given))


ARITHMETIC_LINE = re.compile(r"(\d+)([-+*])(\d+)(?:([-+])(\d+))?=(\d+)(?:b([01]))?$")


@pytest.mark.parametrize("family", ["add", "subtract", "multiply", "sum", "count"])
def test_every_written_sum_holds(family: str) -> None:
    lines = 0
    for item in _items(family, 150):
        for line in item.thoughts("max").replace(" ok", "").splitlines():
            if match := ARITHMETIC_LINE.fullmatch(line):
                a, sign, b, second, c, result, borrow = match.groups()
                value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
                value += {"+": 1, "-": -1, None: 0}[second] * int(c or 0)
                assert value == int(result) - 10 * int(borrow or 0), line
                lines += 1
    assert lines > 100


@pytest.mark.parametrize("family", ["add", "subtract", "multiply"])
def test_the_result_can_be_read_off_the_columns(family: str) -> None:
    for item in _items(family, 200):
        columns = [line.split("=")[1] for line in item.steps.splitlines() if re.fullmatch(r"\d\S\d\S\d=\w+", line)]
        if family == "multiply" and item.level == 5:  # two products, then their sum below its own header
            columns = [line.split("=")[1] for line in item.steps[item.steps.rindex(" ") :].splitlines()[1:]]
        if family == "subtract":
            digits = "".join(column[0] for column in reversed(columns))
        else:
            digits = columns[-1] + "".join(column[1] for column in reversed(columns[:-1]))
        if "minus" in item.steps:
            digits = "-" + digits
        assert int(digits) == int(item.answer), item.steps


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_differ_as_promised(family: str) -> None:
    slips = 0
    for item in _items(family, 200):
        high, most = item.thoughts("high"), item.thoughts("max")
        assert item.thoughts("non-think") == ""
        assert high.endswith("\n" + (item.call or item.answer))
        assert most.startswith(item.steps) and most.endswith(" ok") and len(most) > len(high)
        if "\nAgain: " in most:
            slips += 1
            assert item.slip is not None and item.slip[0] != item.answer and " no\nAgain: " + item.answer in most
    assert slips > 0 or family in ("format", "calculator")


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_never_trained_on(family: str) -> None:
    trained = {item.key for item in _items(family, 400)}
    evaluated = {item.key for item in evaluation_items(family, 60)}
    assert len(evaluated) == 60 and not trained & evaluated
    assert {item.level for item in evaluation_items(family, 60)} == set(LEVELS)
    assert evaluation_items(family, 10)[3] == evaluation_items(family, 10)[3]
    assert all(item.split == "evaluation" for item in evaluation_items(family, 10))


@pytest.mark.parametrize("family", ["add", "multiply", "compare"])
def test_the_split_ignores_wording_and_order(family: str) -> None:
    wordings: dict[tuple[str, ...], set[tuple[str, str]]] = {}
    for n in range(6000):
        item = FAMILIES[family].make(random.Random(n), 1)
        numbers = re.findall(r"\d+", item.prompt)
        content = tuple(numbers if family == "multiply" else sorted(numbers))
        wordings.setdefault(content, set()).add((item.key, item.split))
    assert len(wordings) >= 55 and max(map(len, wordings.values())) == 1


@pytest.mark.parametrize("mode", MODES)
def test_the_codec_gives_back_what_was_rendered(mode: str, tokenizer: Tokenizer) -> None:
    for family in FAMILIES:
        for item in _items(family, 10):
            body = item.training_request(mode)
            asked = body | {"messages": body["messages"][:-1]}
            answer = body["messages"][-1]
            text = (
                f"{answer['reasoning_content']}</think>{answer['content']}"
                if mode != "non-think"
                else answer["content"]
            )
            reply = parse(text, thinking=mode != "non-think", tools=bool(item.tools))
            assert verify(item, reply) and render(asked).endswith("<think>" if mode != "non-think" else "</think>")


def test_masks_cover_the_assistant_alone(tokenizer: Tokenizer) -> None:
    for body, (ids, mask) in zip(training_requests(3, 150), sft_samples(3, 150, tokenizer)):
        assert len(ids) == len(mask) and ids[0] == tokenizer.bos_id and mask[0] == 0
        learned = tokenizer.decode([i for i, m in zip(ids, mask) if m])
        expected = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
        assert learned.count("<｜end▁of▁sentence｜>") == len(expected) and all(e in learned for e in expected)
        prompts = tokenizer.decode([i for i, m in zip(ids, mask) if not m])
        assert all(m["content"] in prompts for m in body["messages"] if m["role"] in ("user", "system"))
        if (thoughts := body["messages"][-1].get("reasoning_content")) is not None:
            assert thoughts in learned


def test_samples_are_a_function_of_seed_and_number(tokenizer: Tokenizer) -> None:
    long, short = list(training_requests(5, 40)), list(training_requests(5, 10))
    assert long[:10] == short and long != list(training_requests(6, 40))
    assert list(islice(sft_samples(5, 40, tokenizer), 3)) == list(sft_samples(5, 3, tokenizer))


def test_all_kinds_of_samples_occur() -> None:
    bodies = list(training_requests(1, 600))
    assert {b.get("reasoning_effort", "non-think") for b in bodies} == set(MODES)
    assert 5 < sum("tools" in b for b in bodies) < 40
    assert 100 < sum(sum(m["role"] == "user" for m in b["messages"]) > 1 for b in bodies) < 300  # several turns
    assert sum(b["messages"][0]["role"] == "system" for b in bodies) > 30
    said = [m["content"] for b in bodies for m in b["messages"] if m["role"] == "assistant"]
    assert any("DeepSeek-V4" in s for s in said) and any(s in TERMS.values() for s in said)
    drills = [b for b in bodies if b["messages"][0]["content"].startswith("Practise ")]
    assert 40 < len(drills) < 110
    modes = {b.get("reasoning_effort", "drill") for b in training_requests(1, 60, {"high": 1.0})}
    assert modes == {"high", "drill"}


def test_drills_are_true() -> None:
    """Every line of every drill, judged by other means than those that wrote it."""
    judges: dict[str, Callable[[str], bool]] = {
        "sums": lambda line: eval(line.split("=")[0]) == int(line.split("=")[1]),
        "differences": lambda line: (
            eval(line.split("=")[0]) == int(line.split("=")[1][0]) - 10 * int(line.rsplit("b", 1)[1])
        ),
        "products": lambda line: eval(line.split("=")[0]) == int(line.split("=")[1]),
        "running sums": lambda line: eval(line.replace("=", "==")),
        "reversed numbers": lambda line: list(line.split()[0]) == list(reversed(line.split()[1])),
        "order": lambda line: eval(line.replace("=", "==")),
        "spelling": lambda line: line.split(": ")[1].replace(" ", "") == line.split(": ")[0],
        "joining letters": lambda line: line.split(": ")[0].split(" ") == list(line.split(": ")[1]),
        "spelling backwards": lambda line: line.split(", ")[0].split(" ")[::-1] == line.split(", ")[1].split(" "),
        "odd and even": lambda line: (int(line.split()[0][-1]) in (1, 3, 5, 7, 9)) == (line.split()[1] == "odd"),
    }
    seen = set()
    for number in range(200):
        asked, answer = drill(random.Random(number))["messages"]
        name = asked["content"].removeprefix("Practise ").split(",")[0]
        lines = answer["content"].split("\n")
        assert asked["content"].endswith(f", {len(lines)} lines.")
        assert all(judges[name](line) for line in lines), (name, lines)
        seen.add(name)
    assert seen == set(judges) == set(DRILLS)


def test_calculator_calls_are_judged_by_their_expression() -> None:
    item = _items("calculator", 1)[0]

    def reply(name: str, arguments: str, calls: int = 1) -> dict[str, Any]:
        return _reply("") | {"tool_calls": [{"name": name, "arguments": arguments}] * calls}

    right = json.dumps({"expression": item.call})
    assert verify_call(item, reply("calculator", right))
    assert verify_call(item, reply("calculator", json.dumps({"expression": item.call.replace(" ", "")})))
    assert not verify_call(item, reply("calculator", json.dumps({"expression": item.call + "1"})))
    assert not verify_call(item, reply("calc", right)) and not verify_call(item, reply("calculator", right, 2))
    assert not verify_call(item, reply("calculator", "{")) and not verify_call(item, reply("calculator", "[]"))
    assert not verify_call(item, reply("calculator", "{}")) and not verify_call(item, _reply(item.answer))
    assert item.answer not in item.thoughts("max"), "the result is not known before the call"


def test_the_calculator_calculates() -> None:
    assert calculate("12 + 30") == "42" and calculate("7-9") == "-2" and calculate(" 6 *7 ") == "42"
    assert calculate("__import__('os')").startswith("error:") and calculate("1/0").startswith("error:")


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="level 6"):
        FAMILIES["add"].sample(random.Random(0), 6)
    with pytest.raises(ValueError, match="no task family 'poetry'"):
        evaluation_items("poetry", 1)
    with pytest.raises(ValueError, match="mode 'medium'"):
        _items("add", 1)[0].request("medium")
