"""Bad Chat Completions bodies: DeepSeek's words for what is wrong, and nothing but RequestError whatever the body."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.text import RequestError, render, settings, validate

USER = {"role": "user", "content": "x"}
OFF = {"thinking": {"type": "disabled"}}


def tool(name: str = "f", **extra: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **extra}}


def test_error_vectors(vectors: dict[str, Any]) -> None:
    assert len(vectors["errors"]) == 21
    for row in vectors["errors"]:
        named = re.search("names are (.*), but", row["message"])
        with pytest.raises(RequestError) as caught:
            validate(row["request"], models=named[1].split(", ") if named else None)
        assert str(caught.value) == row["message"], row["id"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "messages[0].role: unknown variant `wizard`, expected one of "
            "`system`, `user`, `assistant`, `tool`, `latest_reminder`",
        ),
        ({"messages": [{"content": "x"}]}, "missing field `role`"),
        ({"messages": [{"role": "user"}]}, "missing field `content`"),
        ({"messages": [{"role": "user", "content": None}]}, "content should be a string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "unknown variant `audio`"),
        ({"messages": "x"}, "messages: invalid type: a string, expected a sequence"),
        ({"messages": None}, "messages"),
        ({"temperature": "1"}, "temperature: invalid type: a string"),
        ({"max_tokens": True}, "max_tokens: invalid type: a boolean"),
        ({"max_completion_tokens": 0}, "Invalid max_completion_tokens value"),
        ({"presence_penalty": -2.5}, "Invalid presence_penalty value, the valid range of presence_penalty is [-2, 2]"),
        ({"stop": ""}, "Invalid 'stop': empty string."),
        ({"stop": 3}, "expected a string or a list"),
        ({"thinking": {"type": "maybe"}}, "expected one of `adaptive`, `enabled`, `disabled`"),
        ({"reasoning_effort": "huge"}, "reasoning_effort: unknown variant `huge`"),
        ({"tools": [tool(f"f{n}") for n in range(129)]}, "maximum length 128"),
        ({"tools": [tool("")]}, "empty string"),
        ({"tools": [tool("x" * 129)]}, "string with length 129"),
        ({"tools": [tool(parameters={"type": "string"})]}, "got 'type: \"string\"'"),
        ({"tools": [tool(strict=True), tool("g")]}, "Cannot use strict tool with non-strict tool"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "no function named 'g'"),
        ({"tools": [tool()], "messages": [USER, {"role": "assistant", "content": "", "prefix": True}]}, "with prefix"),
        ({"response_format": {"type": "xml"}}, "unknown variant `xml`"),
        ({"response_format": {"type": "json_schema"}}, "missing field `json_schema`"),
    ],
)
def test_further_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate({"messages": [USER], **change})
    assert message in str(caught.value)


def test_accepted_beyond_the_service() -> None:
    body = {
        "messages": [
            {"role": "developer", "content": "D"},
            USER,
            {"role": "assistant", "content": "a", "reasoning": "r"},
            USER,
        ],
        "max_completion_tokens": 5,
        "tools": [tool()],
        "unknown": {"anything": 1},
        "thinking": {"type": "adaptive", "budget_tokens": 3},
        "user_id": 7,
    }
    prompt = render(body, "v4-ga")
    assert "D\n\n## Tools" in prompt and "<think>r</think>a" in prompt


def test_reasoning_can_be_demanded_for_the_turn_in_progress() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "r"}
    with pytest.raises(RequestError, match="must be passed back to the API"):
        validate({"messages": [USER, asked, result]}, need_reasoning=True)
    validate({"messages": [USER, asked, result]})
    for fine in (
        {"messages": [USER, asked | {"reasoning_content": ""}, result]},
        {"messages": [USER, asked, result, USER]},
        {"messages": [USER, asked, result], **OFF},
    ):
        validate(fine, need_reasoning=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (True, "high", False)),
        (OFF, (False, "high", False)),
        ({"reasoning_effort": "none"}, (False, "high", False)),
        ({"reasoning_effort": "none", "thinking": {"type": "enabled"}}, (True, "high", False)),
        ({"reasoning_effort": "minimal"}, (True, "low", False)),
        ({"reasoning_effort": "ultra"}, (True, "max", False)),
        ({"tool_choice": "required", **OFF}, (False, "high", False)),  # no tools: the choice is ignored
        ({"tool_choice": "required", "tools": [tool()], **OFF}, (False, "high", True)),
        ({"tool_choice": "none", "tools": [tool()]}, (True, "high", False)),
    ],
)
def test_settings(change: dict[str, Any], expected: tuple[bool, str, bool]) -> None:
    chosen = settings({"messages": [USER], **change})
    assert (chosen.thinking, chosen.effort, chosen.forced_call) == expected
    assert len(chosen.tools) == (1 if change.get("tools") and change.get("tool_choice") != "none" else 0)


def test_strict_schemas_are_shown_in_canonical_form() -> None:
    parameters = {
        "additionalProperties": False,
        "$defs": {"leaf": {"type": "string", "maxLength": 3}},
        "properties": {"b": {"$ref": "#/$defs/leaf"}, "a": {"minimum": 1, "type": "integer", "title": "A"}},
        "required": ["a", "b"],
        "type": "object",
    }
    prompt = render({"messages": [USER], "tools": [tool(strict=True, parameters=parameters)]}, "v4-ga")
    assert (
        '{"type": "object", "properties": {"b": {"$ref": "#/$defs/leaf"}, "a": {"type": "integer", "minimum": 1}}, '
        '"additionalProperties": false, "required": ["b", "a"], "$defs": {"leaf": {"type": "string"}}}}\n'
    ) in prompt


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "x", "user", "tool", "function", "enabled"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "id", "function", "name"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
message_keys = st.sampled_from(
    "tools response_format wo_eos tool_calls tool_call_id task prefix reasoning name".split()
)
schemas = st.recursive(
    st.none() | st.sampled_from(["string", "object", "array", "email", 1, ["string", "null"], {"type": "string"}]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from("type properties items required anyOf $ref $defs format additionalProperties p".split()),
            inner,
        )
    ),
    max_leaves=15,
)
keys = st.sampled_from(
    "model messages thinking reasoning_effort max_tokens temperature top_p stop stream stream_options response_format "
    "tools tool_choice logprobs top_logprobs n seed".split()
)


@given(st.dictionaries(keys, anything, max_size=6), anything)
def test_any_body_renders_or_is_refused(body: dict[str, Any], message: Any) -> None:
    body.setdefault("messages", [USER, message])
    for dialect in ("v4-preview", "v4-ga"):
        try:
            prompt = render(body, dialect)
        except RequestError as error:
            assert str(error)
        else:
            assert prompt.startswith("<｜begin▁of▁sentence｜>")


@given(schemas, st.booleans())
def test_any_tool_schema_renders_or_is_refused(schema: Any, strict: bool) -> None:
    parameters = {"type": "object", "properties": {"p": schema}} if strict else schema
    try:
        render({"messages": [USER], "tools": [tool(parameters=parameters, strict=strict)]}, "v4-ga")
    except RequestError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("messages", "start"),
    [
        ([USER], "reasoning"),
        ([USER, {"role": "assistant", "content": "a", "prefix": True}], "content"),
        ([USER, {"role": "assistant", "content": "", "reasoning_content": "r", "prefix": True}], "reasoning"),
        ([USER | {"task": "action"}], "content"),
    ],
)
def test_where_the_answer_starts(messages: list[dict[str, Any]], start: str) -> None:
    """The parser has to know what the prompt ended in, in every dialect."""
    assert settings({"messages": messages}).start == start
    for dialect in ("v4-preview", "v4-ga"):
        open_thought = render({"messages": messages}, dialect).rpartition("<think>")[2]
        assert (start == "reasoning") == ("</think>" not in open_thought and "<｜action｜>" not in open_thought)


@given(st.sampled_from(["system", "user", "assistant", "latest_reminder"]), st.dictionaries(message_keys, anything))
def test_any_extra_keys_of_a_message_are_ignored_or_refused(role: str, extra: dict[str, Any]) -> None:
    for dialect in ("v4-preview", "v4-ga"):
        try:
            prompt = render({"messages": [USER, {"role": role, "content": "y"} | extra]}, dialect)
        except RequestError as error:
            assert str(error)
        else:
            assert "y" in prompt
