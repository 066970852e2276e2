"""The prompt codec: a conversation becomes a prompt string, prompt ids, or a training sample with its loss mask.

All three come from the same list of pieces. A piece is either one control token, which becomes one id, or text, which
is tokenised without the added vocabulary: nothing a user, a tool or a schema says can open a turn. What differs
between model generations is in `dialects.py`; the order of things here is that of report sections 3.4 to 3.6:

    BOS effort system tools format { User text | Assistant (<think> reasoning)? </think> answer calls EOS }*
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dsv4.text import dialects
from dsv4.text.dialects import ASSISTANT, DSML, END_THINK, REMINDER, TASKS, THINK, URL, USER, Dialect, get_dialect
from dsv4.text.dsml import to_json, to_parameters
from dsv4.text.errors import RequestError
from dsv4.text.request import settings, validate
from dsv4.text.strict import strict_schema
from dsv4.text.tokenizer import BOS, EOS, Tokenizer

IN_TEMPLATES = re.compile(f"({'|'.join(map(re.escape, (DSML, THINK, END_THINK)))})")


class Piece(NamedTuple):
    """One control token, or a stretch of text. `learn`: the assistant has to produce it."""

    text: str
    control: bool
    learn: bool


def render(request: dict[str, Any], dialect: str = "v4-preview") -> str:
    """The prompt of a Chat Completions body. Raises RequestError (a ValueError) for a bad body."""
    return "".join(piece.text for piece in _request_pieces(request, get_dialect(dialect), answered=False))


def render_ids(request: dict[str, Any], tokenizer: Tokenizer, dialect: str = "v4-preview") -> list[int]:
    """The ids of `render`'s prompt, with control tokens by id and user text as plain text."""
    return _ids(_request_pieces(request, get_dialect(dialect), answered=False), tokenizer)[0]


def render_training(
    request: dict[str, Any], tokenizer: Tokenizer, dialect: str = "v4-preview"
) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a conversation that ends with the assistant's answer.

    Mask 1: reasoning, `</think>`, answer, tool calls and EOS of every assistant turn, as they are rendered (reasoning
    that the dialect drops from history is not there). Mask 0: everything that a prompt would have held, so that the
    ids before the last turn's first 1 are exactly `render_ids` of the request without its last message.
    """
    return _ids(_request_pieces(request, get_dialect(dialect), answered=True), tokenizer)


def encode_messages(
    messages: Sequence[dict[str, Any]],
    thinking_mode: str,
    context: Sequence[dict[str, Any]] = (),
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
) -> str:
    """The `v4-preview` encoder below the front-end: messages as given, with the roles and keys of training data.

    Beyond a chat body, a message may be of role `developer` and may carry `task` (a quick instruction), `tools` and
    `response_format` (system, developer) and `wo_eos` (an assistant turn left open). `context` was encoded before:
    only what follows it is returned. `thinking_mode` is "thinking" or "chat".
    """
    if thinking_mode not in ("thinking", "chat"):
        raise ValueError(f"thinking_mode {thinking_mode!r} is neither 'thinking' nor 'chat'")
    row = get_dialect("v4-preview")
    effort = reasoning_effort or "high"
    if effort not in row.effort:
        raise ValueError(f"reasoning_effort {effort!r} is none of {', '.join(row.effort)}")
    history = _turns(context, row)
    turns = history + _turns(messages, row, before=context)
    keep = not drop_thinking or any(turn.tools for turn in turns)
    plan = _Plan(row, thinking_mode == "thinking", row.effort[effort], keep)
    bos = add_default_bos_token and not context
    return "".join(piece.text for piece in _pieces(turns, plan, len(plan.visible(history)), bos))


@dataclass
class _Turn:
    """A message after merging: parts of one user turn are together, content is text."""

    role: str
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    format: str = ""
    task: str | None = None
    unfinished: bool = False
    parts: list[tuple[str | None, str]] = field(default_factory=list)  # user turns: (tool call id or None, text)


@dataclass(frozen=True)
class _Plan:
    """How to write turns.

    keep      no reasoning is dropped
    chat      the front-end's manners: every answer has a header, whatever stands before it, and a prefix with
              reasoning alone leaves `<think>` open
    generate  the end is a header, for the model to go on from
    """

    dialect: Dialect
    thinking: bool
    effort: str
    keep: bool
    chat: bool = False
    generate: bool = False
    forced_call: bool = False

    def visible(self, turns: list[_Turn]) -> list[_Turn]:
        """Old developer turns vanish together with old reasoning."""
        if self.keep or not self.thinking:
            return turns
        last = _last_user(turns)
        return [turn for index, turn in enumerate(turns) if turn.role != "developer" or index >= last]


def _request_pieces(request: dict[str, Any], dialect: Dialect, answered: bool) -> list[Piece]:
    """Front-end: where a chat body's system texts, tools and format go, then `_pieces`."""
    validate(request, answered=answered)
    chosen = settings(request)
    messages = [_renamed(message) for message in request["messages"]]
    if dialect.hoist_system:
        systems = [_content(message, dialect) for message in messages if message["role"] == "system"]
        system = {"role": "system", "content": "\n\n".join(filter(None, systems))}
        messages = [system, *(message for message in messages if message["role"] != "system")]
    elif messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    turns = _turns(messages, dialect)
    if chosen.tools and dialect.complete_tools:
        turns[0].tools = [_complete(tool) for tool in chosen.tools]
    else:
        turns[0].tools = list(chosen.tools)
    turns[0].format = _format(request.get("response_format") or {}, dialect)
    plan = _Plan(
        dialect,
        chosen.thinking,
        dialect.effort[chosen.effort],
        keep=bool(chosen.tools),
        chat=True,
        generate=not answered,
        forced_call=chosen.forced_call,
    )
    return list(_pieces(turns, plan, 0, bos=True))


def _pieces(turns: list[_Turn], plan: _Plan, first: int, bos: bool) -> Iterator[Piece]:
    """Write `turns[first:]`; the turns before only decide what is old."""
    dialect = plan.dialect
    turns = plan.visible(turns)
    last = _last_user(turns)
    headed = False  # a header or a task token stands at the end: an answer may follow
    if bos:
        yield _control(BOS)
    for index, turn in enumerate(turns[first:], first):
        if index == 0 and plan.thinking:
            yield _text(plan.effort)
        before, after = turns[index - 1] if index else None, turns[index + 1] if index + 1 < len(turns) else None
        if turn.role == "assistant":
            # Where a header is the answer's own, an answer is history as soon as another header follows.
            final = after is None and not plan.generate
            current = plan.keep or turn.unfinished or (index > last and (final or not dialect.header_at_answer))
            if plan.chat and not headed:
                yield from _header(plan.thinking and current)
            to_task = before is not None and before.task is not None
            yield from _answer(turn, plan, reasoned=plan.thinking and current and not to_task)
            headed = turn.unfinished
        elif turn.role == "latest_reminder":
            yield _control(REMINDER)
            yield _text(turn.text)
        else:
            if turn.role != "system":
                yield _control(USER)
            yield from _asked(turn, dialect)
        if after is None or after.role in ("assistant", "latest_reminder"):
            if turn.task is not None:
                if turn.task == "action":
                    yield from _header(plan.thinking)
                yield _control(TASKS[turn.task])
                headed = True
            elif turn.role in ("user", "developer") and not dialect.header_at_answer:
                yield from _header(plan.thinking and (plan.keep or index >= last))
                headed = True
    if plan.generate:
        if not headed:
            yield from _header(plan.thinking)
        if plan.forced_call:
            yield from _template(f"\n\n<{DSML}tool_calls>\n")


def _asked(turn: _Turn, dialect: Dialect) -> Iterator[Piece]:
    """The text of a system, user or developer turn with its tools and format blocks."""
    if turn.task == "read_url" and URL in turn.text:
        question, _, url = turn.text.partition(URL)
        yield from (_text(question), _control(URL), _text(url))
    else:
        yield _text(turn.text)
    if turn.tools:
        yield from _template(dialects.TOOLS)
        yield _text("\n".join(to_json(tool, dialect.rust_numbers) for tool in turn.tools))
        yield from _template(dialects.AFTER_TOOLS)
    yield _text(turn.format)


def _answer(turn: _Turn, plan: _Plan, reasoned: bool) -> Iterator[Piece]:
    """What the assistant wrote, after its header."""
    if reasoned:
        yield _text(turn.reasoning, learn=True)
        if turn.text or turn.calls or not (turn.unfinished and plan.chat):
            yield _control(END_THINK, learn=True)
    yield _text(turn.text, learn=True)
    if turn.calls:
        yield from _template(f"\n\n<{DSML}tool_calls>\n", learn=True)
        for call in turn.calls:
            yield from _call(call, plan.dialect)
        yield from _template(f"</{DSML}tool_calls>", learn=True)
    if not turn.unfinished:
        yield _control(EOS, learn=True)


def _call(call: dict[str, str], dialect: Dialect) -> Iterator[Piece]:
    """One call as DSML: strings raw, everything else as JSON; arguments that are no JSON object as one string."""
    parameters = to_parameters(call["arguments"], dialect.rust_numbers)
    yield from _template(f'<{DSML}invoke name="', learn=True)
    yield _text(f'{call["name"]}">\n' + ("" if parameters else dialect.empty_invoke), learn=True)
    for parameter in parameters:
        kind = "true" if parameter.is_string else "false"
        yield from _template(f"<{DSML}parameter", learn=True)
        yield _text(f' name="{parameter.name}" string="{kind}">{parameter.value}', learn=True)
        yield from _template(f"</{DSML}parameter>\n", learn=True)
    yield from _template(f"</{DSML}invoke>\n", learn=True)


def _turns(messages: Sequence[dict[str, Any]], dialect: Dialect, before: Sequence[dict[str, Any]] = ()) -> list[_Turn]:
    """Merge user messages and tool results into user turns, results in the order of their calls.

    Calls may stand in messages `before`, which are not part of the result.
    """
    turns: list[_Turn] = []
    order: dict[str, int] = {}
    for message in before:
        order = _order(message) or order
    for message in messages:
        role, text = message["role"], _content(message, dialect)
        if role in ("user", "tool"):
            if not (turns and turns[-1].role == "user" and turns[-1].task is None):
                turns.append(_Turn("user"))
            turn = turns[-1]
            turn.task = message.get("task")
            turn.parts.append((message.get("tool_call_id", "") if role == "tool" else None, text))
            turn.text = _joined(turn.parts, order, dialect)
            continue
        calls = [call.get("function", call) for call in message.get("tool_calls") or []]
        order = _order(message) or order
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        turn = _Turn(role, text, reasoning, calls, task=message.get("task"), unfinished=bool(message.get("wo_eos")))
        turn.tools = [tool.get("function", tool) for tool in message.get("tools") or []]
        if message.get("response_format"):
            turn.format = dialects.SCHEMA + to_json(message["response_format"], dialect.rust_numbers)
        turns.append(turn)
    for turn in turns:
        if turn.task is not None and turn.task not in TASKS:
            raise RequestError(f"task {turn.task!r} is none of {', '.join(TASKS)}")
    return turns


def _order(message: dict[str, Any]) -> dict[str, int]:
    """Position of each call of a message by the call's id."""
    return {call.get("id") or "": index for index, call in enumerate(message.get("tool_calls") or [])}


def _joined(parts: list[tuple[str | None, str]], order: dict[str, int], dialect: Dialect) -> str:
    """One user turn's text: results take the results' places in the order of their calls, texts stay where they are."""
    results = iter(
        sorted((part for part in parts if part[0] is not None), key=lambda part: order.get(part[0] or "", 0))
    )
    texts: list[str] = []
    mergeable = False  # the last text is a user's, and an empty neighbour adds no blank line to it
    for call, text in parts:
        if call is not None:
            texts.append(f"<tool_result>{next(results)[1]}</tool_result>")
        elif mergeable and dialect.skip_empty:
            texts[-1] = "\n\n".join(filter(None, (texts[-1], text)))
        else:
            texts.append(text)
        mergeable = call is None
    return "\n\n".join(texts)


def _content(message: dict[str, Any], dialect: Dialect) -> str:
    """A message's content as text."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    shown = [part["text"] if part["type"] == "text" else dialect.unsupported.format(**part) for part in content]
    return "\n\n".join(shown)


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    """A chat body's message in the encoder's words: developer is system, prefix is an open turn, and nothing else of
    what the encoder knows and the API does not."""
    role = "system" if message["role"] == "developer" else message["role"]
    unfinished = role == "assistant" and bool(message.get("prefix"))
    calls = message.get("tool_calls") if role == "assistant" else None
    return message | {"role": role, "wo_eos": unfinished, "tool_calls": calls, "tools": None, "response_format": None}


def _complete(tool: dict[str, Any]) -> dict[str, Any]:
    parameters = tool.get("parameters") or {}
    return {
        "name": tool["name"],
        "description": tool.get("description") or "",
        "parameters": strict_schema(parameters) if tool.get("strict") else parameters,
    }


def _format(wanted: dict[str, Any], dialect: Dialect) -> str:
    if wanted.get("type") == "json_schema":
        return dialects.SCHEMA + to_json(wanted["json_schema"]["schema"], dialect.rust_numbers)
    return dialects.JSON_OBJECT if wanted.get("type") == "json_object" else ""


def _last_user(turns: list[_Turn]) -> int:
    return max((index for index, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _header(think: bool) -> Iterator[Piece]:
    yield _control(ASSISTANT)
    yield _control(THINK if think else END_THINK)


def _control(token: str, learn: bool = False) -> Piece:
    return Piece(token, True, learn)


def _text(text: str, learn: bool = False) -> Piece:
    return Piece(text, False, learn)


def _template(text: str, learn: bool = False) -> Iterator[Piece]:
    """Our own text, in which the spelling of a control token means the token."""
    for index, part in enumerate(IN_TEMPLATES.split(text)):
        yield Piece(part, index % 2 == 1, learn)


def _ids(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Neighbouring texts are tokenised as one, unless only one of them is to be learnt."""
    ids: list[int] = []
    mask: list[int] = []
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.control and not joined[-1].control and piece.learn == joined[-1].learn:
            joined[-1] = piece._replace(text=joined[-1].text + piece.text)
        else:
            joined.append(piece)
    for piece in joined:
        if piece.control and piece.text not in tokenizer.special:
            raise ValueError(f"the tokenizer has no control token {piece.text}")
        new = [tokenizer.special[piece.text]] if piece.control else tokenizer.encode(piece.text)
        ids += new
        mask += [int(piece.learn)] * len(new)
    return ids, mask
