"""The figures of the bundled model: every token scored once, batches equal to single answers, both turns of a tool."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dsv4.config import Config
from dsv4.data.tasks import evaluation_items, training_requests
from dsv4.model import Transformer
from dsv4.text import Tokenizer, render_ids, train_tokenizer


def _script(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bits_per_byte, tasks = _script("nano_bits_per_byte"), _script("nano_tasks")


@pytest.fixture(scope="module")
def small() -> tuple[Any, Tokenizer]:
    tokenizer = train_tokenizer([json.dumps(body) for body in training_requests(9, 100)], 512)
    config = Config.from_dict(Config.preset("micro").to_dict() | {"vocab_size": 512})
    return Transformer(config).init_weights(1).eval(), tokenizer


@pytest.mark.parametrize("length", [2, 63, 64, 65, 96, 97, 1000])
def test_every_token_is_scored_once_with_context(length: int) -> None:
    scored = []
    for start, stop, first in bits_per_byte.windows(length, 64):
        assert stop - start <= 64 and first > start
        assert start == 0 or first - start >= 32, "half a context behind every scored token"
        scored += range(first, stop)
    assert scored == list(range(1, length))


def test_bits_are_those_of_the_chain_rule(small: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = small
    texts = {"a": "def add(a, b):\n    return a + b\n", "b": "x = 1\n" * 12}
    found = bits_per_byte.model_bits(model, tokenizer, texts, 4096, 8192)
    for name, text in texts.items():
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        with torch.inference_mode():
            odds = torch.log_softmax(model(torch.tensor([ids]))[0], -1)
        wanted = -sum(float(odds[t - 1, ids[t]]) for t in range(1, len(ids))) / math.log(2)
        assert found[name] == pytest.approx(wanted, rel=1e-5)
    windowed = bits_per_byte.model_bits(model, tokenizer, texts, 16, 64)
    assert windowed["b"] != found["b"] and windowed["b"] == pytest.approx(found["b"], rel=0.2)


def test_the_table_weighs_bytes_and_files() -> None:
    rows = bits_per_byte.table({"a": 100, "b": 300}, {"xz -9e": {"a": 200.0, "b": 300.0}})
    assert rows["xz -9e"] == {"total": 1.25, "mean": 1.5, "standard_error": pytest.approx(0.5)}
    better = rows | {"model": {"total": 1.0, "mean": 1.0, "standard_error": 0.0}}
    assert "| model | 1.0000 | 1.0000 +- 0.0000 | 20.0 % |" in bits_per_byte.markdown(better)


def test_ragged_batches_answer_like_single_requests(small: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = small
    prompts = [render_ids(item.request("high"), tokenizer) for item in evaluation_items("add", 5)]
    limits = [7, 3, 12, 1, 9]
    together = tasks.complete(model, tokenizer, prompts, limits)
    assert together == [tasks.complete(model, tokenizer, [p], [n])[0] for p, n in zip(prompts, limits)]
    assert any(len(answer) == limit for answer, limit in zip(together, limits))
    assert all(len(answer) <= limit for answer, limit in zip(together, limits))


class _Scripted:
    """Stands in for the network only: it says what the test tells it to, so that the judging can be judged."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def complete(self, _: Any, tokenizer: Tokenizer, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        found = [next((a for key, a in self.answers.items() if text.endswith(key)), "?") for text in texts]
        return [tokenizer.encode(answer, control=True)[:limit] for answer, limit in zip(found, limits)]


def test_a_tool_task_needs_the_call_and_the_answer(
    small: tuple[Any, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = small
    items = evaluation_items("calculator", 4)
    block = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="calculator">\n'
        '<｜DSML｜parameter name="expression" string="true">{}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    calls = [block.format(items[0].call), block.format(items[1].call), block.format("1 + 1"), items[3].answer]
    answers = {f"<｜User｜>{i.prompt}<｜Assistant｜></think>": call for i, call in zip(items, calls)}
    results = {f"<tool_result>{i.answer}</tool_result><｜Assistant｜></think>": i.answer for i in items[:1]}
    monkeypatch.setattr(tasks, "complete", _Scripted(answers | results).complete)
    with tasks.Progress(8, "test", "answers") as progress:
        judged = tasks.judge(model, tokenizer, items, "non-think", 2, progress)
    assert [right for right, _ in judged] == [True, False, False, False]
    assert judged[0][1] == len(tokenizer.encode(calls[0], control=True)) + len(tokenizer.encode(items[0].answer))


def test_the_statement_needs_two_standard_errors() -> None:
    def report(difference: float) -> str:
        row = {m: {"accuracy": 0.5, "standard_error": 0.1, "tokens": 9} for m in ("non-think", "high")}
        gain = {"high": {"difference": difference, "standard_error": 0.1}}
        content = {"modes": ["non-think", "high"], "families": {"add": row}, "all": row, "items": 9}
        text: str = tasks.markdown(content | {"against_non_think": gain})
        return text

    assert "high beats non-think" in report(0.21) and "high does not beat non-think" in report(0.19)
    assert "| add | 50.0 +- 10.0 % | 50.0 +- 10.0 % |" in report(0.0)
