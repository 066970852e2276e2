"""`dsv4 generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import typer


def generate(
    path: Path = typer.Argument(..., help="The model folder."),
    prompt: str = typer.Argument(..., help="What to say, or with --raw what to go on from; - reads it from stdin."),
    raw: bool = typer.Option(False, "--raw/--chat", help="Continue the text as it stands, or answer it as a message."),
    mode: str = typer.Option("non-think", help="With --chat: non-think, high or max."),
    max_tokens: int = typer.Option(256, help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, help="0 = always the most probable token; at most 2."),
    top_p: float = typer.Option(1.0, help="Keep the most probable tokens that together reach this mass."),
    seed: int = typer.Option(None, help="The same seed gives the same answer. Default: another each time."),
    dtype: str = typer.Option("auto", help="float32, bfloat16, native (FP4/FP8 as stored), or auto: as the folder is."),
    expert_memory: str = typer.Option(
        None, help="With native: experts stay on disk, at most this much in memory: 8GiB."
    ),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object: the answer, usage and speed."),
) -> None:
    """Answer one prompt, or continue a text.

    Example:
      dsv4 generate models/nano "What is 27 + 48?" --mode high
      dsv4 generate models/nano "def main():" --raw --max-tokens 64
    """
    import dsv4
    from dsv4.common.memory import keep_freed_memory
    from dsv4.engine import Engine, SamplingParams
    from dsv4.text import parse, render_ids

    keep_freed_memory()
    text = sys.stdin.read() if prompt == "-" else prompt
    model = dsv4.load(path, dtype=dtype, device=device, expert_memory=expert_memory, progress=True)
    engine = Engine(model, dsv4.load_tokenizer(path))
    tokenizer = engine.tokenizer
    request = chat_request([{"role": "user", "content": text}], mode)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)] if raw else render_ids(request, tokenizer)
    params = SamplingParams(temperature, top_p, max_tokens, seed)
    started = time.perf_counter()
    generation = engine.generate(ids, params)
    decoder = tokenizer.stream_decoder()
    written = []
    for id in generation:
        written.append(decoder.push(id))
        if not as_json:
            print(written[-1], end="", flush=True)
    written.append(decoder.flush())
    seconds = time.perf_counter() - started
    engine.close()
    if not as_json:
        print(written[-1])
        return
    answer = {"text": "".join(written)} if raw else parse("".join(written), thinking=mode != "non-think", tools=False)
    usage = {"prompt_tokens": generation.prompt_tokens, "completion_tokens": generation.completion_tokens}
    report = {**answer, "finish_reason": generation.finish_reason, "usage": usage, "seconds": round(seconds, 3)}
    print(json.dumps(report, ensure_ascii=False))


def chat_request(messages: list[dict[str, object]], mode: str) -> dict[str, object]:
    """A Chat Completions body in one of the three modes."""
    if mode not in ("non-think", "high", "max"):
        raise ValueError(f"unknown mode {mode!r}; known: non-think, high, max")
    if mode == "non-think":
        return {"messages": messages, "thinking": {"type": "disabled"}}
    return {"messages": messages, "thinking": {"type": "enabled"}, "reasoning_effort": mode}
