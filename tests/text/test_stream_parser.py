"""The parser of model output: reference vectors whole and character by character, every chunking alike, no leaks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.text import Event, StreamParser, collect, parse, render, settings
from dsv4.text.stream import STREAM_AFTER

D = "｜DSML｜"
TOOLS = [{"type": "function", "function": {"name": "f"}}]

DELIBERATE = {
    # vector -> what this parser gives instead of the reference (numbers as in dsv4.text.stream)
    "tool_param_name_with_spaces": {"tool_calls": [{"name": "a", "arguments": '{"ship to": "v"}'}]},  # 1
    "tool_false_invalid_json": {"tool_calls": [{"name": "a", "arguments": '{"n": "not json"}'}]},  # 3
    "tool_duplicate_param": {"tool_calls": [{"name": "a", "arguments": '{"x": "2"}'}]},  # 4
    "tool_truncated_in_value": {"tool_calls": [{"name": "a", "arguments": '{"x": "hel"}'}]},  # 5
    "length_in_tool_value": {"tool_calls": [{"name": "a", "arguments": '{"x": "hel"}'}]},  # 5
    "tool_markup_tool_choice_none": {"content": "Sure."},  # 7
    "json_fenced": {"content": '{"a": 1}'},  # 8
}


def block(*parameters: str, name: str = "f") -> str:
    """A block with one call."""
    lines = "".join(f"<{D}parameter {parameter}</{D}parameter>\n" for parameter in parameters)
    return f'\n\n<{D}tool_calls>\n<{D}invoke name="{name}">\n{lines}</{D}invoke>\n</{D}tool_calls>'


def run(parser: StreamParser, pieces: Iterable[str], reason: str = "stop") -> list[Event]:
    return [event for piece in pieces for event in parser.push(piece)] + parser.finish(reason)


def arguments(completion: str, finish_reason: str = "stop") -> str:
    (call,) = parse(completion, thinking=False, finish_reason=finish_reason)["tool_calls"]
    return call["arguments"]


def test_reference_vectors_whole_and_by_character(vectors: dict[str, Any]) -> None:
    assert len(vectors["parse"]) == 37
    for row in vectors["parse"]:
        body = {"messages": [{"role": "user", "content": "json"}], **row["request_extra"]}
        body["thinking"] = {"type": "enabled" if row["thinking"] else "disabled"}
        expected = row["expected"] | DELIBERATE.get(row["id"], {})
        for pieces in ([row["completion"]], row["completion"]):
            events = run(StreamParser.of(settings(body)), pieces, row["backend_finish"])
            assert collect(events, row["thinking"]) == expected, row["id"]
        assert expected == row.get("should_be", expected)
    assert {
        row["id"] for row in vectors["parse"] if row["expected"] | DELIBERATE.get(row["id"], {}) != row["expected"]
    } == set(DELIBERATE)


def test_strict_preview_parser(vectors: dict[str, Any]) -> None:
    """Where the preview's strict parser accepts a completion, ours reads the same, but for newlines at the edges."""
    other = {"tool_false_invalid_json", "required_prefill_continuation"}
    rows = [row for row in vectors["parse_reference_strict"] if "expected" in row and row["id"] not in other]
    assert len(rows) >= 20
    for row in rows:
        reply, expected = parse(row["completion"], thinking=row["thinking"]), row["expected"]
        assert reply["content"] == expected["content"].lstrip("\n"), row["id"]
        assert (reply["reasoning_content"] or "") == expected["reasoning_content"].strip("\n"), row["id"]
        assert reply["tool_calls"] == expected["tool_calls"], row["id"]


def test_stream_vectors(vectors: dict[str, Any]) -> None:
    """Each backend piece gives the text and arguments that the reference's chunks carry, as early."""
    for row in vectors["stream_chat"]:
        chosen = settings(row["request"])
        events = run(StreamParser.of(chosen), row["backend_pieces"], row["backend_finish"])
        shown: list[Event] = []
        for chunk in row["chunks"]:
            choice = chunk["choices"][0]
            delta = choice["delta"]
            for kind, key in (("reasoning", "reasoning_content"), ("content", "content")):
                if delta.get(key):
                    shown.append(Event(kind, delta[key]))  # type: ignore[arg-type]
            for call in delta.get("tool_calls", []):
                if "name" in call["function"]:
                    shown.append(Event("tool_start", call["function"]["name"], call["index"]))
                elif shown[-1].kind == "tool_arguments":
                    shown[-1] = Event("tool_arguments", shown[-1].text + call["function"]["arguments"], call["index"])
                else:
                    shown.append(Event("tool_arguments", call["function"]["arguments"], call["index"]))
            if choice["finish_reason"]:
                shown.append(Event("finish", choice["finish_reason"]))
        assert [event for event in events if event.kind != "tool_end"] == shown, row["id"]


@pytest.mark.parametrize(
    ("completion", "wanted"),
    [
        (block('name="ship to" string="true">v'), '{"ship to": "v"}'),
        (block('name="a\\"b" string="false">5'), '{"a\\\\\\"b": 5}'),
        (block('name="x">5'), '{"x": 5}'),
        (block('name="x">five'), '{"x": "five"}'),
        (block('name="x" string="maybe">[1, 2]'), '{"x": [1, 2]}'),
        (block('name="x" string="false">not json'), '{"x": "not json"}'),
        (block('name="x" string="false"> 1.50\n'), '{"x": 1.50}'),
        (block('name="x" string="false">NaN'), '{"x": "NaN"}'),
        (block('name="x" string="false">'), '{"x": ""}'),
        (
            block('name="x" string="true">1', 'name="y" string="false">2', 'name="x" string="true">3'),
            '{"x": "3", "y": 2}',
        ),
        (block('string="true" name="x">1', 'name="y" string="false">2'), '{"y": 2}'),
        (block('name="x" string="true">1').split(f"</{D}invoke")[0], '{"x": "1"}'),
        (block('name="x" string="true">1').split(f"</{D}param")[0], '{"x": "1"}'),
        (block('name="x" string="true">1', 'name="y" string="false">[1, 2]').split(" 2]")[0], '{"x": "1"}'),
        (block('name="x" string="true">1').split("string")[0], "{}"),
        (block('name="x" string="true">1').split("DSML｜parameter>")[0], '{"x": "1"}'),
        (block('name="x" string="true">a <').split(f"</{D}param")[0], '{"x": "a <"}'),
        (block().split(f"</{D}invoke")[0], "{}"),
    ],
)
def test_deliberate_differences(completion: str, wanted: str) -> None:
    assert arguments(completion) == wanted
    assert json.loads(wanted) is not None


def test_a_cut_off_call_keeps_its_reason() -> None:
    cut = block('name="x" string="true">hello').split("lo<")[0]
    for reason, shown in (("length", "length"), ("stop", "tool_calls"), ("content_filter", "content_filter")):
        reply = parse(cut, thinking=False, finish_reason=reason)
        assert (reply["tool_calls"], reply["finish_reason"]) == ([{"name": "f", "arguments": '{"x": "hel"}'}], shown)


def test_calls_after_a_missing_close_survive() -> None:
    text = f'<{D}tool_calls><{D}invoke name="a"><{D}parameter name="x" string="true">5</{D}invoke><{D}invoke name="b">'
    assert [call["name"] for call in parse(text, thinking=False)["tool_calls"]] == ["a", "b"]


def test_without_tools_markup_is_removed() -> None:
    reply = parse("Sure." + block('name="x" string="true">1') + "more", thinking=False, tools=False)
    assert reply == {"content": "Sure.", "reasoning_content": None, "tool_calls": [], "finish_reason": "stop"}
    assert parse("a\n<｜DS", thinking=False)["content"] == "a"
    assert parse("a < b <", thinking=False)["content"] == "a < b <"


def test_a_long_string_is_streamed_while_it_grows() -> None:
    parser = StreamParser(thinking=False)
    parser.push(block('name="code" string="true">').split(f"</{D}param")[0])
    assert parser.push("x" * STREAM_AFTER) == []
    assert parser.push('y"') == [Event("tool_arguments", '{"code": "' + "x" * STREAM_AFTER + 'y\\"', 0)]
    assert parser.push("z<") == [Event("tool_arguments", "z", 0)]
    rest = parser.push(f'</{D}parameter>\n<{D}parameter name="code" string="true">again</{D}parameter></{D}invoke>')
    assert rest == [Event("tool_arguments", '<"}', 0), Event("tool_end", index=0)]


def test_a_name_given_twice_counts_once_however_long_its_values() -> None:
    first, second = "a" * 2 * STREAM_AFTER, "b" * 2 * STREAM_AFTER
    for values, wanted in (((first, second), first), (("short", second), second), ((first, "short"), first)):
        text = block(*(f'name="x" string="true">{value}' for value in values))
        assert arguments(text) == json.dumps({"x": wanted})


def test_only_what_could_be_markup_is_held_back() -> None:
    parser = StreamParser(thinking=True, stop=["END"])
    assert parser.push("a <b> c\n") == [Event("reasoning", "a <b> c")]
    assert parser.push("d <") == [Event("reasoning", "\nd ")]
    assert parser.push("/think") == []
    assert parser.push("x") == [Event("reasoning", "</thinkx")]
    assert parser.push("</think>\n\nok EN") == [Event("content", "ok ")]
    assert parser.push("d") == [Event("content", "ENd")]
    assert not parser.done
    assert parser.push(" END tail") == [Event("content", " ")]
    assert parser.done and parser.stopped_by == "END" and parser.push("more") == []
    assert parser.finish("length") == [Event("finish", "stop")]


def test_the_first_complete_stop_string_wins() -> None:
    for stop, text, content in ((["abcd", "bc"], "abcd", "a"), (["ab", "abc"], "abc", ""), (["\n\n"], "a\n\nb", "a")):
        for pieces in ([text], text):
            assert collect(run(StreamParser(False, stop=stop), pieces), False)["content"] == content


def test_continuations_keep_their_newlines() -> None:
    body = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "prefix": True}]}
    events = run(StreamParser.of(settings(body)), ["\n\nb"])
    reply = collect(events, True)
    assert (reply["content"], reply["reasoning_content"]) == ("\n\nb", "")


def test_json_mode_gives_the_first_value_alone() -> None:
    for text, content in (
        ('Here:\n```json\n{"a": "}"}\n```\nDone', '{"a": "}"}'),
        ('[1, {"b": "\\"]"}] {"c": 2}', '[1, {"b": "\\"]"}]'),
        ('{"a": 1', '{"a": 1'),
        ('{"a": "\\\\"} {"b": 2}', '{"a": "\\\\"}'),
        ("no json", ""),
    ):
        for pieces in ([text], text):
            assert collect(run(StreamParser(False, json=True), pieces), False)["content"] == content


parts = st.sampled_from(
    [
        *(
            "a",
            "\n",
            "\n\n",
            "<",
            "</",
            ">",
            '"',
            " ",
            "<think>",
            "</think>",
            "</thi",
            D,
            f"<{D}",
            f"</{D}",
            "｜",
            "<｜",
        ),
        *(f"<{D}tool_calls>\n", f"</{D}tool_calls>", f'<{D}invoke name="f">\n', f"</{D}invoke>\n", f"<{D}invoke>"),
        *(f'<{D}parameter name="x" string="true">', f'<{D}parameter name="y z" string="false">', f"</{D}parameter>\n"),
        *(f'<{D}parameter name="x">', "1.50", '{"k": [1, "é"]}', "STOP", "ST", "STOPPED", "long " * 20, "\\", "é😀"),
    ]
)
completions = st.lists(parts, max_size=25).map("".join)


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(completions, st.lists(st.integers(0, 9), max_size=40), st.booleans(), st.booleans(), st.booleans())
def test_any_chunking_of_any_completion(
    text: str, sizes: list[int], thinking: bool, tools: bool, first_json: bool
) -> None:
    reason = "length" if first_json else "stop"
    replies = []
    for pieces in ([text], cut(text, sizes), text):
        parser = StreamParser(thinking, tools, stop=["STOP", "STOPPED"], json=first_json)
        events = run(parser, pieces, reason)
        replies.append(collect(events, thinking))
        starts = [event.index for event in events if event.kind == "tool_start"]
        assert starts == [event.index for event in events if event.kind == "tool_end"] == list(range(len(starts)))
        assert [event.kind for event in events].count("finish") == 1 and events[-1].kind == "finish"
        assert all(event.text for event in events if event.kind in ("reasoning", "content", "tool_arguments"))
    reply = replies[0]
    assert replies[1:] == [reply, reply]
    if text.count("</think>") <= thinking:  # one more is swallowed, and may bring the halves of a tag together
        shown = reply["content"] + "\0" + (reply["reasoning_content"] or "")
        assert f"<{D}" not in shown and "</think>" not in shown
        assert "STOP" not in reply["content"]
    for call in reply["tool_calls"]:
        pairs = json.loads(call["arguments"], object_pairs_hook=list)
        assert len({name for name, _ in pairs}) == len(pairs)
    assert tools or not reply["tool_calls"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
strings = st.text(max_size=120).filter(lambda text: D not in text)
names = st.text("abc _-.é'", min_size=1, max_size=12)


@given(st.lists(st.tuples(names, st.dictionaries(names, strings | json_values, max_size=4)), min_size=1, max_size=3))
def test_calls_survive_render_and_parse(wanted: list[tuple[str, dict[str, Any]]]) -> None:
    calls = [
        {"id": str(n), "type": "function", "function": {"name": name, "arguments": json.dumps(values)}}
        for n, (name, values) in enumerate(wanted)
    ]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "c", "reasoning_content": "r", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": str(n), "content": "t"} for n in range(len(calls))),
    ]
    for dialect in ("v4-preview", "v4-ga"):
        prompt = render({"messages": messages, "tools": TOOLS}, dialect)
        reply = parse(prompt.partition("<｜Assistant｜><think>")[2].partition("<｜end▁of▁sentence｜>")[0])
        assert (reply["reasoning_content"], reply["content"], reply["finish_reason"]) == ("r", "c", "tool_calls")
        assert [(call["name"], json.loads(call["arguments"])) for call in reply["tool_calls"]] == wanted
