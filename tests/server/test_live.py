"""A real server on loopback under the official `openai` client, and clients that leave."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from scripted import running, scripted_service, still
from test_api import CALL, QUICK, TOOL

from dsv4.server import Service

pytestmark = pytest.mark.e2e
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def answer(prompt: str) -> str:
    """Calls the tool once, then speaks; thinks when asked to."""
    if "<tool_result>" in prompt:
        text = "It is 46."
    else:
        text = CALL if '"add"' in prompt else "Hello to you."
    return f"Let me see.</think>{text}" if prompt.endswith("<think>") else text


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with running(scripted_service(answer)) as url:
        yield openai.OpenAI(base_url=url, api_key="none needed", max_retries=0)


def test_plain_and_thinking(client: openai.OpenAI) -> None:
    off: dict[str, Any] = {"thinking": {"type": "disabled"}}
    plain = client.chat.completions.create(model="scripted", messages=HELLO, extra_body=off)
    assert plain.choices[0].message.content == "Hello to you." and plain.usage.total_tokens > 4
    thought = client.chat.completions.create(model="deepseek-v4-pro", messages=HELLO, reasoning_effort="high")
    assert thought.choices[0].message.reasoning_content == "Let me see."  # type: ignore[attr-defined]
    assert thought.usage.completion_tokens_details.reasoning_tokens > 0
    assert next(model.id for model in client.models.list()) == "scripted"


def test_streaming(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="scripted", messages=HELLO, stream=True)
    thought, said, usage = "", "", None
    for chunk in stream:
        delta = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", None) or ""
        said += delta.content or ""
        usage = chunk.usage or usage
    assert (thought, said) == ("Let me see.", "Hello to you.") and usage.completion_tokens > 4


def test_a_tool_call_and_its_result(client: openai.OpenAI) -> None:
    messages = list(HELLO)
    called = client.chat.completions.create(model="scripted", messages=messages, tools=[TOOL])  # type: ignore[list-item]
    choice = called.choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "add" and json.loads(call.function.arguments)["a"] == 12
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "46"}]
    final = client.chat.completions.create(model="scripted", messages=messages, tools=[TOOL])  # type: ignore[list-item]
    assert final.choices[0].message.content == "It is 46." and final.choices[0].finish_reason == "stop"


def test_errors_are_the_client_s_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="supported API model names") as caught:
        client.chat.completions.create(model="gpt-x", messages=HELLO)
    assert caught.value.code == "invalid_request_error" and caught.value.response.headers["x-ds-trace-id"]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "x" * 9999}])
    with running(scripted_service("x"), api_key="sk-1") as url, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="sk-2", max_retries=0).models.list()


WORDS = 3000
"""Of an answer that takes a minute and that nobody waits for: a server that gives it in full has not noticed."""


def leave(url: str, service: Service) -> None:
    """Asks for an answer in one piece, and goes away while it is being made."""
    before = service.engine.model.steps

    async def body() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            asking = asyncio.create_task(client.post(f"{url}/chat/completions", json=QUICK))
            while service.engine.model.steps < before + 5:
                assert not asking.done()
                await asyncio.sleep(0.01)
            asking.cancel()

    asyncio.run(body())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_model(stream: bool) -> None:
    service = scripted_service("word " * WORDS, delay=0.02)
    with running(service) as url:
        if stream:
            with httpx.stream("POST", f"{url}/chat/completions", json=QUICK | {"stream": True}) as response:
                for _ in zip(range(5), response.iter_lines()):
                    pass
        else:
            leave(url, service)
        assert 2 <= still(service) < WORDS


def test_two_streams_advance_together_and_the_server_stays_awake() -> None:
    service = scripted_service("one two three four five six seven eight " * 3, delay=0.02)
    arrivals: list[str] = []

    def follow(name: str, url: str) -> None:
        with httpx.stream("POST", f"{url}/chat/completions", json=QUICK | {"stream": True}) as response:
            for line in response.iter_lines():
                arrivals.extend([name] if '"content": "' in line else [])

    with running(service) as url:
        threads = [threading.Thread(target=follow, args=(name, url)) for name in "ab"]
        for thread in threads:
            thread.start()
        while len(set(arrivals)) < 2:
            time.sleep(0.01)
        assert httpx.get(f"{url}/models").status_code == 200
        meanwhile = len(arrivals)
        for thread in threads:
            thread.join()
    turns = sum(x != y for x, y in itertools.pairwise(service.engine.model.turns))
    assert arrivals.count("a") == arrivals.count("b") >= 24 and turns > len(arrivals) / 4, service.engine.model.turns
    assert meanwhile < len(arrivals), "another client was answered before they had ended"


def test_too_many_clients_get_429() -> None:
    with running(scripted_service("word " * WORDS, delay=0.02), clients=1) as url:
        with httpx.stream("POST", f"{url}/chat/completions", json=QUICK | {"stream": True}) as first:
            lines = first.iter_lines()  # kept: a dropped iterator closes the connection
            next(lines)
            second = httpx.post(f"{url}/chat/completions", json=QUICK)
            assert second.status_code == 429 and "1 answers" in second.json()["error"]["message"]
        for _ in range(600):  # until the server has seen that the first one left
            third = httpx.post(f"{url}/chat/completions", json=QUICK | {"max_tokens": 1})
            if third.status_code != 429:
                break
            time.sleep(0.1)
        assert third.status_code == 200
