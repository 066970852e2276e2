"""The bundled model behind a real server, under the official `openai` client: it answers, thinks and calls its tool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from scripted import running

from dsv4.data.tasks import evaluation_items
from dsv4.data.tasks.item import verify, verify_call
from dsv4.server import Service

NANO = Path(__file__).resolve().parents[2] / "models" / "nano"
pytestmark = pytest.mark.e2e
OFF: dict[str, Any] = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with running(Service.load(NANO)) as url:
        yield openai.OpenAI(base_url=url, api_key="none needed", max_retries=0)


def test_it_answers_plainly_and_streaming(client: openai.OpenAI) -> None:
    """Greedy, so the stream must say exactly what the whole answer says."""
    request: dict[str, Any] = {
        "model": "nano", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 60,
    }  # fmt: skip
    whole = client.chat.completions.create(**request, extra_body=OFF)
    assert whole.choices[0].finish_reason == "stop" and whole.choices[0].message.content
    chunks = list(client.chat.completions.create(**request, extra_body=OFF, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_it_thinks_before_it_answers(client: openai.OpenAI) -> None:
    """Recall and addition, greedily 98 in a hundred are right (docs/runs/nano-gpu-chat/tasks.md)."""
    right = 0
    items = [*evaluation_items("recall", 5), *evaluation_items("add", 5)]
    for item in items:
        reply = client.chat.completions.create(model="nano", max_tokens=200, seed=1, **thinking(item.request("high")))
        message = reply.choices[0].message
        assert message.reasoning_content and reply.usage.completion_tokens_details.reasoning_tokens > 0
        assert "<think>" not in message.content and "</think>" not in message.content
        right += verify(item, message.model_dump())
    assert right >= 8, f"{right} of {len(items)} right"


def test_it_calls_its_tool_and_reads_the_result(client: openai.OpenAI) -> None:
    called = answered = 0
    items = [item for item in evaluation_items("calculator", 15) if item.level <= 2]
    for item in items:
        request = item.request("non-think")
        body = {"model": "nano", "messages": request["messages"], "tools": request["tools"], "temperature": 0}
        reply = client.chat.completions.create(**body, extra_body=OFF, max_tokens=100)
        choice = reply.choices[0]
        calls = [call.function.model_dump() for call in choice.message.tool_calls or []]
        if not verify_call(item, {"tool_calls": calls}):
            continue
        called += 1
        assert choice.finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": item.answer}
        body["messages"] = [*body["messages"], choice.message, result]
        final = client.chat.completions.create(**body, extra_body=OFF, max_tokens=100)
        answered += verify(item, final.choices[0].message.model_dump())
    assert called and answered, f"{called} right calls and {answered} right answers of {len(items)}"


def thinking(request: dict[str, Any]) -> dict[str, Any]:
    """The body with `thinking` where the client accepts it."""
    rest = {key: value for key, value in request.items() if key != "thinking"}
    return {**rest, "extra_body": {"thinking": request["thinking"]}}
