"""A task item: a question with one right answer, the reasoning that leads there, and its verifier.

Reasoning is made for a model of ten million parameters: one fact per line, every digit or letter written out before it
is used. Mode "high" works the steps; "max" then checks the result, and in one item of ten finds a slip and mends it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODES = ("non-think", "high", "max")
LEVELS = range(1, 6)
EVALUATION_SHARE = 0.1  # of all contents, by hash: those are never trained on
SLIP_SHARE = 0.1


def fraction(text: str) -> float:
    """A fixed number in [0, 1) for a text; the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def phrase(rng: random.Random, wordings: str, **values: object) -> str:
    """One of the wordings (separated by |) with its {names} filled in."""
    return rng.choice(wordings.split("|")).format(**values)


@dataclass(frozen=True)
class Item:
    """One task.

    key     the content without its wording ("add 85 347"); decides whether the item may be trained on
    steps   the reasoning up to the result; check: what confirms the result
    slip    a wrong result and the check that exposes it, or None
    same    how an answer is compared: "text", "json"
    call    for tool tasks: the expression the calculator must be given
    """

    family: str
    level: int
    key: str
    prompt: str
    answer: str
    steps: str
    check: str
    slip: tuple[str, str] | None = None
    same: str = "text"
    tools: tuple[dict[str, Any], ...] = ()
    call: str = ""

    @property
    def split(self) -> str:
        """ "train" or "evaluation", by the content alone."""
        return "evaluation" if fraction(self.key) < EVALUATION_SHARE else "train"

    def thoughts(self, mode: str) -> str:
        """The reasoning of a mode ("" for non-think)."""
        if mode == "non-think":
            return ""
        high = f"{self.steps}\n{self.call or self.answer}"  # a call is thought of before its result is known
        if mode == "high":
            return high
        if self.slip and fraction("slip " + self.key) < SLIP_SHARE:
            wrong, exposed = self.slip
            return f"{self.steps}\n{wrong}\nCheck: {exposed} no\nAgain: {self.answer}\nCheck: {self.check} ok"
        return f"{high}\nCheck: {self.check} ok"

    def request(self, mode: str) -> dict[str, Any]:
        """The Chat Completions body that asks for this item."""
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        messages = [{"role": "user", "content": self.prompt}]
        body: dict[str, Any] = {"messages": messages, "thinking": {"type": "disabled"}}
        if mode != "non-think":
            body |= {"thinking": {"type": "enabled"}, "reasoning_effort": mode}
        if self.tools:
            body["tools"] = list(self.tools)
        return body

    def training_request(self, mode: str) -> dict[str, Any]:
        """The same body with the assistant's turn, or turns where a tool is called."""
        body = self.request(mode)
        turns = self._tool_turns(mode) if self.call else [_assistant(self.answer, self.thoughts(mode))]
        return body | {"messages": body["messages"] + turns}

    def _tool_turns(self, mode: str) -> list[dict[str, Any]]:
        first = _assistant("", self.thoughts(mode))
        function = {"name": "calculator", "arguments": json.dumps({"expression": self.call})}
        first["tool_calls"] = [{"id": "call_0", "type": "function", "function": function}]
        result = {"role": "tool", "tool_call_id": "call_0", "content": self.answer}
        return [first, result, _assistant(self.answer, "" if mode == "non-think" else f"The tool says {self.answer}.")]


def _assistant(content: str, thoughts: str) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    return turn | {"reasoning_content": thoughts} if thoughts else turn


@dataclass(frozen=True)
class Family:
    """A kind of task; `make(rng, level)` draws an item of any split, level 1 (easy) to 5."""

    name: str
    make: Callable[[random.Random, int], Item]

    def sample(self, rng: random.Random, level: int, split: str = "train") -> Item:
        """An item of the wanted split."""
        if level not in LEVELS:
            raise ValueError(f"level {level} is outside {LEVELS.start}..{LEVELS.stop - 1}")
        while True:
            item = self.make(rng, level)
            if item.split == split:
                return item


def verify(item: Item, reply: dict[str, Any]) -> bool:
    """Whether the reply (as `dsv4.text.parse` gives it) ends with the right answer. For tool tasks this judges the
    turn after the tool's result; `verify_call` judges the call."""
    content = (reply.get("content") or "").strip()
    if reply.get("tool_calls"):
        return False
    if item.same == "json":
        try:
            return bool(json.loads(content) == json.loads(item.answer)) and content[:1] in "{["
        except ValueError:
            return False
    return content == item.answer or content.removesuffix(".") == item.answer


def verify_call(item: Item, reply: dict[str, Any]) -> bool:
    """Whether the reply is exactly one call of the calculator with the right expression (blanks do not matter)."""
    calls = reply.get("tool_calls") or []
    if len(calls) != 1 or calls[0]["name"] != "calculator":
        return False
    try:
        arguments = json.loads(calls[0]["arguments"])
    except ValueError:
        return False
    if not isinstance(arguments, dict) or set(arguments) != {"expression"}:
        return False
    return str(arguments["expression"]).replace(" ", "") == item.call.replace(" ", "")
