"""Reading what the model writes: reasoning, answer and tool calls, as they arrive, in pieces of any size.

The text is an optional reasoning part up to `</think>`, the answer, and at most one DSML block of tool calls. Events
joined together are the same however the text was cut. Only text that could still turn out to be markup or a stop
string is held back; markup never comes out as text.

The published parser of DeepSeek's protocol library decides what is right; these differences are deliberate:

1. Parameter names may hold blanks and quotes (the published parser writes broken JSON for them).
2. A parameter without `string=`, or with another value than true and false, is JSON if it parses and a string if not
   (the published parser swallows the rest of the answer).
3. `string="false"` with a value that is no JSON gives a string, so that arguments always parse.
4. A name given twice counts once: the last value wins, or the first if it is so long that it was streamed already.
5. A cut-off call is closed into valid JSON: an unfinished string keeps what there is, any other unfinished value goes.
6. A call after an unclosed parameter or invoke is kept (the published parser drops it).
7. Without tools, a block is removed instead of shown as text; so is the first part of an opening tag at the very end.
8. JSON mode gives the first JSON object or array alone, without padding blanks that depend on the chunks.
9. Newlines before markup go even after "<" or "</" (the published parser keeps the one that directly follows).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsv4.text.dialects import DSML, END_THINK
from dsv4.text.dsml import is_json
from dsv4.text.request import Settings
from dsv4.text.tokenizer import EOS

OPEN, CLOSE = f"<{DSML}", f"</{DSML}"
TAG = re.compile(rf'<(/?){DSML} ?(\w*)(?: name="(.*?)"(?: string="(\w*)")?)?\s*>', re.DOTALL)
BROKEN_TAG = re.compile(rf'</?{DSML} ?\w*+(?! name=")[^>]*>')
STREAM_AFTER = 64
"""Characters of a string argument after which it is sent on as it grows, instead of when it ends."""

State = Literal["reasoning", "content", "tools", "value", "done"]
Kind = Literal["reasoning", "content", "tool_start", "tool_arguments", "tool_end", "finish"]


@dataclass(frozen=True)
class Event:
    """Something to pass on. `text`: the text, the tool's name, a part of its arguments, or the finish reason."""

    kind: Kind
    text: str = ""
    index: int = 0  # which tool call


class StreamParser:
    """`push` text, pass on the events, `finish` once.

    tools      whether the model was shown tools; without, calls are removed from the text
    stop       strings that end the answer (looked for in the answer only, and never shown)
    start      what the prompt ended in: "reasoning", "content" or "tools" (a call block that the prompt opened)
    continues  the text goes on from a prefix, so leading newlines belong to it
    json       pass on the first JSON object or array of the answer only

    `done` turns true when nothing that follows can matter (generation may end); `stopped_by` is the stop string found.
    """

    def __init__(
        self,
        thinking: bool = True,
        tools: bool = True,
        stop: Sequence[str] = (),
        start: State | None = None,
        continues: bool = False,
        json: bool = False,
    ) -> None:
        self._state: State = start or ("reasoning" if thinking else "content")
        self._tools = tools
        self._marks = {"reasoning": (END_THINK, OPEN), "content": (END_THINK, OPEN, *stop)}
        self._fresh = not continues  # nothing shown yet: leading newlines go
        self._json = _FirstJson() if json else None
        self._buffer = ""
        self._events: list[Event] = []
        self._calls = 0
        self._call: _Arguments | None = None
        self._parameter = _Parameter("", "")
        self.stopped_by: str | None = None

    @classmethod
    def of(cls, chosen: Settings) -> StreamParser:
        """The parser for the answer to a request."""
        return cls(chosen.thinking, bool(chosen.tools), chosen.stop, chosen.start, chosen.continues, chosen.json)

    @property
    def done(self) -> bool:
        return self._state == "done"

    def push(self, text: str) -> list[Event]:
        """Take in the next piece of text."""
        self._buffer += text
        steps = {"reasoning": self._read_text, "content": self._read_text, "tools": self._read_tag}
        while not self.done and steps.get(self._state, self._read_value)():
            pass
        return self._taken()

    def finish(self, reason: str = "stop") -> list[Event]:
        """The text is over, for the backend's `reason` ("stop", "length", "content_filter" ...)."""
        if self._state in ("reasoning", "content"):
            held = _held(self._buffer, (OPEN,))
            cut_tag = held > 1  # "<" alone may be meant; "<｜" is ours
            self._say(self._buffer[:-held].rstrip("\n") if cut_tag else self._buffer)
        elif self._state == "value":
            held = _held(self._buffer, (CLOSE,))
            self._take(self._buffer[:-held] if held > 2 else self._buffer)
            self._end_value(complete=False)
        self._end_call()
        if self.stopped_by is not None:
            reason = "stop"
        elif reason == "stop" and self._calls:
            reason = "tool_calls"
        self._state = "done"
        self._emit(Event("finish", reason))
        return self._taken()

    def _read_text(self) -> bool:
        """Reasoning or answer, up to the mark that is complete first. True: go on reading."""
        text, marks = self._buffer, self._marks[self._state]
        found = min(((at + len(mark), at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=None)
        if found is None:
            held = _held(text, marks)
            tail = text[len(text) - held :]
            ready = text[: len(text) - held]
            if OPEN.startswith(tail) or (self._state == "reasoning" and END_THINK.startswith(tail)):
                ready = ready.rstrip("\n")  # newlines before markup are part of it
            self._say(ready)
            self._buffer = text[len(ready) :]
            return False
        end, at, mark = found
        before, self._buffer = text[:at], text[end:]
        if mark == OPEN:
            self._say(before.rstrip("\n"))
            self._buffer, self._state = text[at:], "tools"
        elif mark == END_THINK and self._state == "reasoning":
            self._say(before.rstrip("\n"))
            self._state, self._fresh = "content", True
        elif mark == END_THINK:
            self._say(before)
            self._fresh = False
        else:
            self._say(before)
            self._state, self.stopped_by = "done", mark
        return True

    def _read_tag(self) -> bool:
        """The next tag of a block of calls; text between tags is dropped."""
        at = min((at for mark in (OPEN, CLOSE) if (at := self._buffer.find(mark)) >= 0), default=None)
        if at is None:
            held = _held(self._buffer, (OPEN, CLOSE))
            self._buffer = self._buffer[len(self._buffer) - held :]
            return False
        self._buffer = self._buffer[at:]
        match = TAG.match(self._buffer) or BROKEN_TAG.match(self._buffer)
        if match is None:
            return False
        self._buffer = self._buffer[match.end() :]
        closes, tag, name, kind = match.groups() if match.re is TAG else ("", "", None, None)
        if closes and tag not in ("invoke", "parameter"):
            self._end_call()
            self._state = "done"
        elif tag == "invoke":
            self._end_call()
            if not closes and name is not None:
                self._start_call(name)
        elif tag == "parameter" and not closes and name is not None:
            self._parameter, self._state = _Parameter(name, kind), "value"
        return True

    def _read_value(self) -> bool:
        end = self._buffer.find(CLOSE)
        ready = end if end >= 0 else len(self._buffer) - _held(self._buffer, (CLOSE,))
        self._take(self._buffer[:ready])
        self._buffer = self._buffer[ready:]
        if end < 0:
            return False
        self._end_value(complete=True)
        self._state = "tools"
        return True

    def _take(self, text: str) -> None:
        """Part of a parameter's value. A long string is sent on while it grows."""
        parameter = self._parameter
        if parameter.streaming:
            self._argue(_escaped(text))
            return
        parameter.value += text
        long = parameter.kind == "true" and len(parameter.value) > STREAM_AFTER
        if long and self._call and parameter.name not in self._call.sent:
            self._argue(self._call.open_string(parameter.name) + _escaped(parameter.value))
            parameter.streaming = True

    def _end_value(self, complete: bool) -> None:
        parameter = self._parameter
        if parameter.streaming:
            self._argue('"')
        elif self._call and (complete or parameter.kind == "true"):
            bare = parameter.value.strip()
            raw = parameter.kind != "true" and is_json(bare)
            self._call.add(parameter.name, bare if raw else json.dumps(parameter.value, ensure_ascii=False))

    def _start_call(self, name: str) -> None:
        if self._tools:
            self._call = _Arguments()
            self._calls += 1
            self._emit(Event("tool_start", name, self._calls - 1))

    def _end_call(self) -> None:
        if self._call:
            self._argue(self._call.close())
            self._emit(Event("tool_end", index=self._calls - 1))
            self._call = None

    def _argue(self, text: str) -> None:
        if text:
            self._emit(Event("tool_arguments", text, self._calls - 1))

    def _say(self, text: str) -> None:
        if self._fresh:
            text = text.lstrip("\n")
        self._fresh = self._fresh and not text
        if self._state == "content" and self._json:
            text = self._json.push(text)
        if text:
            self._emit(Event("reasoning" if self._state == "reasoning" else "content", text))

    def _emit(self, event: Event) -> None:
        last = self._events[-1] if self._events else None
        joins = event.kind in ("reasoning", "content", "tool_arguments")
        if last and joins and (last.kind, last.index) == (event.kind, event.index):
            self._events[-1] = replace(last, text=last.text + event.text)
        else:
            self._events.append(event)

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def parse(
    completion: str, thinking: bool = True, tools: bool = True, finish_reason: str = "stop", **options: Any
) -> dict[str, Any]:
    """Read a whole completion (a final EOS is ignored); `options` are those of StreamParser.

    Returns content, reasoning_content (None where thinking is off), tool_calls as {"name", "arguments"} with the
    arguments as JSON text, and finish_reason.
    """
    parser = StreamParser(thinking, tools, **options)
    return collect(parser.push(completion.removesuffix(EOS)) + parser.finish(finish_reason), thinking)


def collect(events: Sequence[Event], thinking: bool) -> dict[str, Any]:
    """The reply that events add up to, as `parse` returns it."""
    text = {"reasoning": "", "content": "", "finish": ""}
    calls: list[dict[str, str]] = []
    for event in events:
        if event.kind in text:
            text[event.kind] += event.text
        elif event.kind == "tool_start":
            calls.append({"name": event.text, "arguments": ""})
        elif event.kind == "tool_arguments":
            calls[event.index]["arguments"] += event.text
    return {
        "content": text["content"],
        "reasoning_content": text["reasoning"] if thinking else None,
        "tool_calls": calls,
        "finish_reason": text["finish"],
    }


class _Parameter:
    """A parameter while its value is read. `kind`: what `string=` says, if anything."""

    def __init__(self, name: str, kind: str | None) -> None:
        self.name, self.kind, self.value, self.streaming = name, kind, "", False


class _Arguments:
    """JSON text of a call's arguments. Values wait until a string is streamed or the call ends, so the last can win."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self._waiting: dict[str, str] = {}

    def add(self, name: str, value: str) -> None:
        if name not in self.sent:
            self._waiting[name] = value

    def open_string(self, name: str) -> str:
        self._waiting.pop(name, None)
        return self._flush() + self._key(name) + '"'

    def close(self) -> str:
        text = self._flush()
        return text + ("}" if self.sent else "{}")

    def _flush(self) -> str:
        text = "".join([self._key(name) + value for name, value in self._waiting.items()])
        self._waiting.clear()
        return text

    def _key(self, name: str) -> str:
        start = ", " if self.sent else "{"
        self.sent.add(name)
        return f"{start}{json.dumps(name, ensure_ascii=False)}: "


class _FirstJson:
    """Passes on the first object or array of a text, brackets counted outside strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = self._over = False

    def push(self, text: str) -> str:
        shown = ""
        for character in text:
            if self._over:
                break
            if not self._depth and character not in "{[":
                continue
            shown += character
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self._over = not self._depth
        return shown


def _held(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` could be the start of a mark."""
    return max(
        (size for mark in marks for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])),
        default=0,
    )


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
