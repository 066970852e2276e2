"""What a Chat Completions body asks for, and what is wrong with it, in DeepSeek's words.

Bodies are plain dicts. Unknown keys are ignored, as the service does. Deliberately accepted beyond it: the role
`developer` (as system), `max_completion_tokens`, `reasoning` for `reasoning_content`, and `task` on a message. At most
128 tools, which the documentation says and the reference does not check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from dsv4.text.errors import RequestError
from dsv4.text.strict import strict_schema

MAX_OUTPUT = 393216
ROLES = ("system", "user", "assistant", "tool", "latest_reminder")
EFFORTS = {
    **dict.fromkeys(("minimal", "low"), "low"),
    **dict.fromkeys(("medium", "high", "xhigh"), "high"),
    **dict.fromkeys(("ultra", "max"), "max"),
}
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value <= 2, "[0, 2]"),
    "top_p": (lambda value: 0 < value <= 1, "(0, 1.0]"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "[-2, 2]"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "[-2, 2]"),
}
TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "max_tokens": (int,),
    "max_completion_tokens": (int,),
    "n": (int,),
    "seed": (int,),
    "top_logprobs": (int,),
    "stream": (bool,),
    "logprobs": (bool,),
    "stream_options": (dict,),
    "thinking": (dict,),
    "response_format": (dict,),
    "tools": (list,),
    **dict.fromkeys(RANGES, (int, float)),
}
FIELDS = {"reasoning_content": str, "reasoning": str, "task": str, "prefix": bool, "tool_calls": list}
UNANSWERED = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'"
)


@dataclass(frozen=True)
class Settings:
    """The choices of a valid body that decide how its prompt is written and its answer read."""

    thinking: bool
    effort: str  # "low", "high" or "max"
    tools: tuple[dict[str, Any], ...]  # the functions that the model is shown
    forced_call: bool  # the prompt opens a tool call block
    json: bool
    stop: tuple[str, ...]
    start: Literal["reasoning", "content", "tools"]  # where the answer begins
    continues: bool  # the answer goes on from a prefix


def settings(body: dict[str, Any]) -> Settings:
    """Read a body that `validate` passed. Thinking is on unless it or the effort says otherwise."""
    effort = body.get("reasoning_effort")
    thinking = body["thinking"]["type"] != "disabled" if body.get("thinking") else effort != "none"
    choice = (body.get("tool_choice") or "auto") if body.get("tools") else "none"
    tools = [] if choice == "none" else [tool["function"] for tool in body["tools"]]
    if isinstance(choice, dict):
        tools = [tool for tool in tools if tool["name"] == choice["function"]["name"]]
    last = body["messages"][-1]
    continues = bool(last.get("prefix")) and last["role"] == "assistant"
    forced = choice == "required" or isinstance(choice, dict)
    reasoning = thinking and not last.get("task") and not (continues and last.get("content"))
    return Settings(
        thinking=thinking,
        effort=EFFORTS.get(effort or "high", "high"),
        tools=tuple(tools),
        forced_call=forced,
        json=(body.get("response_format") or {}).get("type") == "json_object",
        stop=tuple([body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or ()),
        start="tools" if forced else "reasoning" if reasoning else "content",
        continues=continues,
    )


def validate(
    body: dict[str, Any],
    models: Collection[str] | None = None,
    answered: bool = False,
    need_reasoning: bool = False,
) -> None:
    """Raise RequestError for the first thing wrong with a body.

    models          the names to accept, where the model matters
    answered        a training sample, whose last message is the assistant's answer: its tool calls need no results
    need_reasoning  refuse, as the service once did, a thinking turn in progress whose calls came back without the
                    reasoning before them (otherwise that is taken as empty)
    """
    if not isinstance(body, dict):
        raise _shape("", f"invalid type: {_kind(body)}, expected struct ChatCompletionRequest")
    for key, types in TYPES.items():
        value = body.get(key)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise _shape(key, f"invalid type: {_kind(value)}, expected {_kind(types[-1]())}")
    if models is not None and body.get("model") not in models:
        names = ", ".join(sorted(models))
        raise RequestError(f"The supported API model names are {names}, but you passed {body.get('model')}.")
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise _shape("messages", f"invalid type: {_kind(messages)}, expected a sequence")
    if not messages:
        raise RequestError("Empty input messages")
    _check_thinking(body)
    _check_tools(body.get("tools") or [])
    _check_messages(messages, answered)
    if need_reasoning:
        _check_reasoning(body)
    _check_numbers(body)
    _check_stop(body.get("stop"))
    _check_format(body)
    _check_choice(body)
    _check_prefix(body)


def _check_thinking(body: dict[str, Any]) -> None:
    thinking = body.get("thinking")
    if thinking is not None:
        _one_of("thinking.type", thinking.get("type"), ("adaptive", "enabled", "disabled"))
    if body.get("reasoning_effort") is not None:
        names = ("none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max")
        _one_of("reasoning_effort", body["reasoning_effort"], names)


def _check_numbers(body: dict[str, Any]) -> None:
    if body.get("n") not in (None, 1):
        raise RequestError("Invalid n value (currently only n = 1 is supported)")
    for key in ("max_tokens", "max_completion_tokens"):
        if body.get(key) is not None and not 1 <= body[key] <= MAX_OUTPUT:
            raise RequestError(f"Invalid {key} value, the valid range of {key} is [1, {MAX_OUTPUT}]")
    for key, (fits, interval) in RANGES.items():
        if body.get(key) is not None and not fits(body[key]):
            raise RequestError(f"Invalid {key} value, the valid range of {key} is {interval}")
    if body.get("stream_options") is not None and not body.get("stream"):
        raise RequestError("stream_options should be set along with stream = true")
    if body.get("top_logprobs") is not None:
        if not body.get("logprobs"):
            raise RequestError(
                "Invalid top_logprobs and logprobs value, logprobs must be set to true if top_logprobs is used."
            )
        if not 0 <= body["top_logprobs"] <= 20:
            raise RequestError("Invalid top_logprobs value, the valid range of top_logprobs is [0, 20].")


def _check_stop(stop: Any) -> None:
    empty = "Expected a string with minimum length 1, but got an empty string instead."
    if stop is not None and not isinstance(stop, str | list):
        raise _shape("stop", "expected a string or a list")
    if stop == "":
        raise RequestError(f"Invalid 'stop': empty string. {empty}")
    if isinstance(stop, list):
        if len(stop) > 16:
            raise RequestError(f"Stop string array too long: {len(stop)}")
        for index, text in enumerate(stop):
            if not isinstance(text, str):
                raise _shape(f"stop[{index}]", f"invalid type: {_kind(text)}, expected a string")
            if not text:
                raise RequestError(f"Invalid 'stop[{index}]': empty string. {empty}")


def _check_messages(messages: list[Any], answered: bool) -> None:
    waiting: list[str] = []  # call ids of the last assistant message that have no result yet
    seen: set[str] = set()
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        _check_message(at, message)
        if message["role"] == "tool":
            identity = message["tool_call_id"]
            if not seen:
                raise RequestError(
                    "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
                )
            if identity in seen and identity not in waiting and waiting:
                raise RequestError(f"Duplicate value for 'tool_call_id' of {identity} in message[{index}]")
            if not waiting:
                raise RequestError(
                    "Messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
                )
            if identity not in waiting:
                raise RequestError(
                    f"{UNANSWERED}, The following tool_call_ids did not have response messages: {identity}"
                )
            waiting.remove(identity)
            continue
        if waiting:
            break
        seen = set()
        for call in _calls(message):
            if call["id"] in seen:
                raise RequestError(f"Duplicate value for 'tool_call_id' of {call['id']} in message[{index}]")
            seen.add(call["id"])
            waiting.append(call["id"])
        if message.get("prefix") and message["role"] == "assistant" and index != len(messages) - 1:
            raise RequestError(
                "Invalid completion message: prefix set true with message which is not final message or message "
                "role is not assistant"
            )
    if waiting and not (answered and _calls(messages[-1])):
        raise RequestError(f"{UNANSWERED}. (insufficient tool messages following tool_calls message)")
    if answered and messages[-1]["role"] != "assistant":
        raise RequestError(f"a training sample ends with the assistant, not with role {messages[-1]['role']!r}")


def _check_message(at: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise _shape(
            at, f"invalid type: {_kind(message)}, expected internally tagged enum ChatCompletionRequestMessage"
        )
    if "role" not in message:
        raise _shape(at, "missing field `role`")
    if message["role"] != "developer":
        _one_of(f"{at}.role", message["role"], ROLES)
    content, assistant = message.get("content"), message["role"] == "assistant"
    if not assistant and "content" not in message:
        raise _shape(at, "missing field `content`")
    if not isinstance(content, str | list) and not (assistant and content is None):
        raise _shape(f"{at}.content", "content should be a string or a list")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        place = f"{at}.content[{index}]"
        _one_of(f"{place}.type", part.get("type") if isinstance(part, dict) else None, ("text", "image_url", "file"))
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise _shape(place, "missing field `text`")
    if message["role"] == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise _shape(at, "missing field `tool_call_id`")
    for key, kind in FIELDS.items() if assistant else [("task", str)]:
        if message.get(key) is not None and not isinstance(message[key], kind):
            raise _shape(f"{at}.{key}", f"invalid type: {_kind(message[key])}, expected {_kind(kind())}")
    calls = message.get("tool_calls") if assistant else None
    if calls == []:
        raise RequestError(
            f"Invalid '{at}.tool_calls': empty array. Expected an array with minimum length 1, but got an empty array "
            "instead."
        )
    if assistant and content is None and not calls:
        raise RequestError("Invalid assistant message: content or tool_calls must be set")
    for index, call in enumerate(calls or []):
        place = f"{at}.tool_calls[{index}]"
        _field(place, call, "id")
        _one_of(f"{place}.type", call.get("type"), ("function",))
        if not isinstance(call.get("function"), dict):
            raise _shape(place, "missing field `function`")
        _field(f"{place}.function", call["function"], "name")
        _field(f"{place}.function", call["function"], "arguments")


def _check_reasoning(body: dict[str, Any]) -> None:
    messages = body["messages"]
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for message in messages[last + 1 :] if settings(body).thinking else ():
        if _calls(message) and message.get("reasoning_content", message.get("reasoning")) is None:
            raise RequestError("The `reasoning_content` in the thinking mode must be passed back to the API.")


def _check_tools(tools: list[Any]) -> None:
    if len(tools) > 128:
        raise RequestError(
            "Invalid 'tools': array too long. Expected an array with maximum length 128, but got an array with length "
            f"{len(tools)} instead."
        )
    for index, tool in enumerate(tools):
        place = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise _shape(place, f"invalid type: {_kind(tool)}, expected struct ChatCompletionTool")
        _one_of(f"{place}.type", tool.get("type"), ("function",))
        if not isinstance(tool.get("function"), dict):
            raise _shape(place, "missing field `function`")
        _check_function(f"{place}.function", tool["function"])
    functions = [tool["function"] for tool in tools]
    if len({function["name"] for function in functions}) != len(functions):
        raise RequestError("Tool names must be unique.")
    if len({bool(function.get("strict")) for function in functions}) > 1:
        raise RequestError("Cannot use strict tool with non-strict tool in the same request")


def _check_choice(body: dict[str, Any]) -> None:
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        _one_of("tool_choice.type", choice.get("type"), ("function",))
        if not isinstance(choice.get("function"), dict):
            raise _shape("tool_choice", "missing field `function`")
        _field("tool_choice.function", choice["function"], "name")
    elif choice not in (None, "none", "auto", "required"):
        raise _shape("tool_choice", "expected one of `none`, `auto`, `required` or a tool")
    chosen = settings(body)
    if isinstance(choice, dict) and chosen.forced_call and not chosen.tools:
        raise RequestError(
            f"Invalid value for 'tool_call': no function named '{choice['function']['name']}' was specified in the "
            "'tools' parameter."
        )
    if chosen.forced_call and chosen.thinking:
        raise RequestError("Thinking mode does not support this tool_choice")


def _check_function(place: str, function: dict[str, Any]) -> None:
    _field(place, function, "name")
    name, at = function["name"], f"Invalid '{place}.name'"
    if not name:
        raise RequestError(
            f"{at}: empty string. Expected a string with minimum length 1, but got an empty string instead."
        )
    if len(name) > 128:
        raise RequestError(
            f"{at}: string too long. Expected a string with maximum length 128, but got a string with length "
            f"{len(name)} instead."
        )
    if not re.fullmatch("[a-zA-Z0-9_-]+", name):
        raise RequestError(
            f"{at}: string does not match pattern. Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
        )
    if not isinstance(function.get("description", ""), str | None):
        raise _shape(f"{place}.description", f"invalid type: {_kind(function['description'])}, expected a string")
    parameters = function.get("parameters")
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        raise RequestError(
            f'Invalid schema for function \'{name}\': {_shown(parameters)} is not of types "boolean", "object"'
        )
    if function.get("strict"):
        strict_schema(parameters)
    elif parameters.get("type") != "object":
        got = _shown(parameters.get("type"))
        raise RequestError(
            f"Invalid schema for function '{name}': schema must be a JSON Schema of 'type: \"object\"', "
            f"got 'type: {got}'."
        )


def _check_format(body: dict[str, Any]) -> None:
    wanted = body.get("response_format")
    if wanted is None:
        return
    _one_of("response_format.type", wanted.get("type"), ("json_object", "json_schema", "regex", "text"))
    if wanted["type"] == "json_schema":
        schema = wanted.get("json_schema")
        if not isinstance(schema, dict) or "schema" not in schema:
            missing = "schema" if isinstance(schema, dict) else "json_schema"
            raise _shape("response_format", f"missing field `{missing}`")
    if wanted["type"] == "regex" and not isinstance(wanted.get("regex"), str):
        raise _shape("response_format", "missing field `regex`")
    if wanted["type"] == "json_object" and "json" not in _words(body["messages"]).lower():
        raise RequestError(
            "Prompt must contain the word 'json' in some form to use 'response_format' of type 'json_object'."
        )


def _check_prefix(body: dict[str, Any]) -> None:
    if not settings(body).continues:
        return
    if (body.get("response_format") or {}).get("type") == "json_object":
        raise RequestError("response_format json_object should not be used with prefix")
    if body.get("tools") or any(_calls(message) for message in body["messages"]):
        raise RequestError("Function call should not be used with prefix")


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of an assistant message; on other roles the key means nothing."""
    return (message.get("tool_calls") or []) if message["role"] == "assistant" else []


def _words(messages: list[dict[str, Any]]) -> str:
    """All text that the messages put into the prompt as content."""
    contents = [message.get("content") or "" for message in messages]
    parts = [
        [part.get("text", "") for part in content] if isinstance(content, list) else [content] for content in contents
    ]
    return "\n".join(text for texts in parts for text in texts)


def _field(place: str, value: Any, name: str) -> None:
    if not isinstance(value, dict) or name not in value:
        raise _shape(place, f"missing field `{name}`")
    if not isinstance(value[name], str):
        raise _shape(f"{place}.{name}", f"invalid type: {_kind(value[name])}, expected a string")


def _one_of(place: str, value: Any, names: tuple[str, ...]) -> None:
    if value is None:
        raise _shape(place.rpartition(".")[0], f"missing field `{place.rpartition('.')[2]}`")
    if value not in names:
        expected = (
            f"expected one of {', '.join(f'`{name}`' for name in names)}"
            if len(names) > 1
            else f"expected `{names[0]}`"
        )
        raise _shape(place, f"unknown variant `{value}`, {expected}")


def _shape(place: str, problem: str) -> RequestError:
    at = f"{place}: " if place else ""
    return RequestError(f"Failed to deserialize the JSON body into the target type: {at}{problem}")


def _shown(value: Any) -> str:
    return "null" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


def _kind(value: Any) -> str:
    """A JSON type by name."""
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a sequence",
        dict: "a map",
    }
    return names.get(type(value), "null")
