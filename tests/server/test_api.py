"""The API against an ASGI transport: shapes, errors, headers. The network is scripted, everything above it is real."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import TOKENIZER, scripted_service

from dsv4.server import Service
from dsv4.server.app import create_app
from dsv4.server.chat import detect_dialect
from dsv4.server.chunks import ChunkWriter, assemble, usage
from dsv4.text import StreamParser, render_ids, settings

HELLO: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
QUICK = HELLO | {"thinking": {"type": "disabled"}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Sum", "parameters": {"type": "object"}}}
CALL = (
    'Adding.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n'
    '<｜DSML｜parameter name="a" string="false">12</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="note" string="true">say "hi"</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def post(service: Service, body: Any, path: str = "/chat/completions", **options: Any) -> httpx.Response:
    """One request through the application; `body` as bytes or as JSON."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service, **options), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content)

    return asyncio.run(send())


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a complete stream."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def vectors(root: Path, kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((root / "tests/vectors/prompt_vectors.json").read_text())[kind]
    assert rows
    return rows


def test_a_plain_answer() -> None:
    reply = post(scripted_service("Hi there."), QUICK)
    assert reply.status_code == 200
    body = reply.json()
    choice = body.pop("choices")
    assert choice == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi there."},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, completion = len(render_ids(QUICK, TOKENIZER)), len(TOKENIZER.encode("Hi there."))
    assert body.pop("usage") == usage(prompt, completion)
    assert body.pop("created") > 1_700_000_000 and body.pop("id") and body.pop("system_fingerprint").startswith("fp_")
    assert body == {"object": "chat.completion", "model": "scripted"}


def test_thinking_is_the_default_and_reasoning_is_counted() -> None:
    service = scripted_service("First 1, then 2.</think>It is 2.")
    body = post(service, HELLO).json()
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "It is 2.", "reasoning_content": "First 1, then 2."}
    thought, answer = len(TOKENIZER.encode("First 1, then 2.")), len(TOKENIZER.encode("It is 2."))
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert body["usage"]["completion_tokens"] == thought + 1 + answer
    off = post(scripted_service("Fine."), HELLO | {"reasoning_effort": "none"}).json()
    assert "reasoning_content" not in off["choices"][0]["message"]
    assert "completion_tokens_details" not in off["usage"]


@pytest.mark.parametrize("extra", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/beta/chat/completions"])
def test_a_stream_says_what_the_whole_says(path: str, extra: dict[str, Any]) -> None:
    service = scripted_service("Hm, 12.</think>Café " + CALL)
    request = HELLO | {"tools": [TOOL], "max_tokens": 400}
    whole = post(service, request).json()
    response = post(service, request | {"stream": True} | extra, path)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(response)
    for chunk in chunks[:-1]:
        assert chunk.get("usage", "absent") == (None if extra else "absent")
        assert chunk["choices"][0]["finish_reason"] is None
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"], c["object"]) for c in chunks}) == 1
    message, streamed = (json.loads(json.dumps(c["choices"][0]["message"])) for c in (whole, assemble(chunks)))
    for call in (*message["tool_calls"], *streamed["tool_calls"]):
        assert call.pop("id").startswith("call_00_")
    assert message == streamed
    assert message["content"] == "Café Adding." and message["reasoning_content"] == "Hm, 12."
    function = message["tool_calls"][0]["function"]
    assert function["name"] == "add" and json.loads(function["arguments"]) == {"a": 12, "note": 'say "hi"'}


def test_stray_control_tokens_are_no_text() -> None:
    service = scripted_service("Hi<｜begin▁of▁sentence｜> there<｜title｜>.")
    assert post(service, QUICK).json()["choices"][0]["message"]["content"] == "Hi there."


def test_stop_strings_and_max_tokens() -> None:
    service = scripted_service("one two three")
    stopped = post(service, QUICK | {"stop": [" three", "nine"]}).json()
    assert stopped["choices"][0]["message"]["content"] == "one two"
    assert stopped["choices"][0]["finish_reason"] == "stop"
    for name in ("max_tokens", "max_completion_tokens"):
        cut = post(service, QUICK | {name: 2}).json()
        assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 2


def test_logprobs() -> None:
    request = HELLO | {"logprobs": True, "top_logprobs": 2}
    service = scripted_service("Hm.</think>Yes.")
    logprobs = post(service, request).json()["choices"][0]["logprobs"]
    assert "".join(row["token"] for row in logprobs["reasoning_content"]).startswith("Hm.")
    assert "".join(row["token"] for row in logprobs["content"]).endswith("Yes.")
    row = logprobs["content"][-1]
    assert row["logprob"] > -1e-6 and bytes(row["bytes"]).decode() == row["token"]
    assert [top["logprob"] for top in row["top_logprobs"]] == sorted([row["logprob"], -100.0], reverse=True)
    streamed = assemble(chunks_of(post(service, request | {"stream": True})))
    assert streamed["choices"][0]["logprobs"] == logprobs


def joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring fragments of tool arguments in one: where they are cut is nobody's promise."""
    out: list[dict[str, Any]] = []
    for chunk in json.loads(json.dumps(chunks)):
        calls = [c["choices"][0]["delta"].get("tool_calls", [{"id": ""}])[0] for c in (*out[-1:], chunk)]
        if len(calls) == 2 and not any("id" in call for call in calls):
            calls[0]["function"]["arguments"] += calls[1]["function"]["arguments"]
        else:
            out.append(chunk)
    return out


def test_chunks_are_the_reference_s(root: Path) -> None:
    for row in vectors(root, "stream_chat"):
        request = row["request"]
        thinking = (request.get("thinking") or {}).get("type") != "disabled"
        parser = StreamParser.of(settings(request))
        include = bool((request.get("stream_options") or {}).get("include_usage"))
        writer = ChunkWriter(row["request"]["model"], "fp_x", thinking, include)
        chunks = [writer.first()]
        for piece in row["backend_pieces"]:
            chunks += [writer.event(event) for event in parser.push(piece) if event.kind != "tool_end"]
        *rest, end = parser.finish(row["backend_finish"])
        counts = row["prompt_usage"]
        tokens = usage(counts["prompt_tokens"], len(row["backend_pieces"]), counts["prompt_cache_hit_tokens"])
        chunks += [*(writer.event(event) for event in rest if event.kind != "tool_end"), writer.last(end.text, tokens)]
        for chunk in chunks:
            chunk |= {"id": "ID-1", "created": 0}
            for call in chunk["choices"][0]["delta"].get("tool_calls", []):
                if "id" in call:
                    assert len(call["id"]) == 8 + 24
                    call["id"] = call["id"][:8] + "*"
        assert joined(chunks) == joined(row["chunks"]), row["id"]


def test_errors_are_the_reference_s(root: Path) -> None:
    service = scripted_service("no")
    checked = 0
    for row in vectors(root, "errors"):
        if row["api"] == "chat" and row["id"] != "model_unknown":
            request = row["request"] | {"model": "deepseek-v4-pro"}
            response = post(service, request)
            assert (response.status_code, response.json()) == (row["status"] or 400, row["body"]), row["id"]
            checked += 1
    assert checked >= 15


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (QUICK | {"model": "gpt-x"}, "supported API model names are deepseek-flash, "),
        (b'{"model": "scripted",\n "messages": [}', "line 2 column 15"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b"[]", "Failed to deserialize"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": "scripted", "messages": [{"role": "\\ud800"}]}', "unknown variant"),
        (QUICK | {"messages": [{"role": "wizard", "content": "x"}]}, "unknown variant"),
        (QUICK | {"messages": [{"role": "user", "content": "x" * 5000}]}, "maximum context length is 4096 tokens"),
        (QUICK | {"max_tokens": 4090}, "4090 in the completion"),
        (QUICK | {"max_completion_tokens": 0}, "range of max_completion_tokens is [1, 393216]"),
        (QUICK | {"seed": "x"}, "seed"),
        (QUICK | {"stop": [3]}, "stop"),
        (QUICK | {"temperature": "hot"}, "temperature"),
        ({"messages": HELLO["messages"]}, "model"),
    ],
)
def test_bad_requests_get_one_clear_error(body: Any, told: str) -> None:
    response = post(scripted_service("no"), body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert told in error["message"]
    assert error | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": None, "code": "invalid_request_error",
    }  # fmt: skip


def test_key_headers_models_and_unknown_paths() -> None:
    async def talk() -> None:
        app = create_app(scripted_service("Hi"), api_key="sk-right-key")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            wrong = await client.post(
                "/chat/completions", json=QUICK, headers={"Authorization": "Bearer sk-wrong-abcd"}
            )
            assert wrong.status_code == 401
            error = wrong.json()["error"]
            assert error["type"] == "authentication_error" and error["code"] == "invalid_request_error"
            assert error["message"].startswith("Authentication Fails, Your api key: ****abcd is invalid")
            assert (await client.get("/models")).status_code == 401
            key = {"Authorization": "Bearer sk-right-key", "Origin": "http://elsewhere"}
            right = await client.post("/chat/completions", json=QUICK, headers=key)
            assert right.status_code == 200 and right.headers["access-control-allow-origin"] == "*"
            traces = [response.headers["x-ds-trace-id"] for response in (wrong, right)]
            assert len(set(traces)) == 2 and all(len(bytes.fromhex(trace)) == 16 for trace in traces)
            for path in ("/models", "/v1/models"):
                rows = (await client.get(path, headers=key)).json()
                assert rows["object"] == "list" and rows["data"][0]["id"] == "scripted"
                assert {"object": "model", "owned_by": "deepseek"}.items() <= rows["data"][1].items()
            lost = await client.get("/nowhere")
            assert lost.status_code == 404 and "/nowhere" in lost.json()["error"]["message"]
            page = await client.get("/")
            assert page.headers["content-type"].startswith("text/html") and "http" not in page.text.split("<script>")[1]

    asyncio.run(talk())


def test_waiting_clients_are_kept_alive() -> None:
    slow = scripted_service("Hi", delay=0.08)
    stream = post(slow, QUICK | {"stream": True}, keep_alive=0.02)
    assert ": keep-alive\n\n" in stream.text and assemble(chunks_of(stream))["choices"][0]["message"]["content"] == "Hi"
    whole = post(slow, QUICK, keep_alive=0.02)
    assert whole.text.startswith("\n") and whole.json()["choices"][0]["message"]["content"] == "Hi"


def test_a_fault_of_ours_is_told_and_no_done_is_faked() -> None:
    def broken(prompt: str) -> str:
        raise RuntimeError("secret detail")

    whole = post(scripted_service(broken), QUICK)
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "internal_error"
    stream = post(scripted_service(broken), QUICK | {"stream": True})
    assert "internal_error" in stream.text and "[DONE]" not in stream.text
    assert "secret" not in whole.text + stream.text


def test_the_dialect_is_what_the_folder_s_encoder_says(tmp_path: Path) -> None:
    assert detect_dialect(tmp_path) == "v4-preview"
    encoder = tmp_path / "encoding" / "encoding_dsv4.py"
    encoder.parent.mkdir()
    for line, dialect in (("REASONING_EFFORT_MAX = ''", "v4-preview"), ("REASONING_EFFORT_PROMPTS = {}", "v4-ga")):
        encoder.write_text(line)
        assert detect_dialect(tmp_path) == dialect
    with pytest.raises(ValueError, match="known: v4-preview, v4-ga"):
        Service(scripted_service("x").engine, "x", dialect="v9")


def test_missing_reasoning_is_empty_unless_the_server_is_strict() -> None:
    service = scripted_service("Fine.</think>Done.")
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    request = HELLO | {"messages": HELLO["messages"] + turns, "tools": [TOOL]}
    assert post(service, request).json()["choices"][0]["message"]["content"] == "Done."
    strict = Service(service.engine, "scripted", need_reasoning=True)
    assert (
        "`reasoning_content` in the thinking mode must be passed back"
        in post(strict, request).json()["error"]["message"]
    )
