"""`dsv4 chat`: talk to a model in the terminal, from a folder or from any DeepSeek-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

MODES = ("non-think", "high", "max")
HELP = """/mode [non-think|high|max]  how long to think before answering
/clear                      forget the conversation
/help                       this list
/quit                       leave (or Ctrl-D); Ctrl-C stops an answer"""


def chat(
    path: Path = typer.Argument(None, help="The model folder. Default: models/nano."),
    url: str = typer.Option(None, help="Talk to a server instead, for example http://127.0.0.1:8000."),
    model: str = typer.Option(None, help="With --url: the model's name. Default: the server's first."),
    api_key: str = typer.Option(None, envvar="DSV4_API_KEY", help="With --url: the server's key."),
    mode: str = typer.Option("high", help="non-think, high or max; /mode changes it."),
    max_tokens: int = typer.Option(None, help="Longest answer, in tokens."),
    dtype: str = typer.Option("auto", help="float32, bfloat16, native (FP4/FP8 as stored), or auto: as the folder is."),
    expert_memory: str = typer.Option(
        None, help="With native: experts stay on disk, at most this much in memory: 8GiB."
    ),
    device: str = typer.Option("cpu", help="cpu or cuda."),
) -> None:
    """Talk to a model in the terminal.

    Example:
      dsv4 chat models/nano
      dsv4 chat --url http://127.0.0.1:8000 --mode max
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if url is not None and path is not None:
        raise ValueError("give a model folder or --url, not both")
    if url is None:
        from dsv4.common.memory import keep_freed_memory
        from dsv4.server.chat import Service

        keep_freed_memory()
        service = Service.load(path or Path("models/nano"), dtype=dtype, device=device, expert_memory=expert_memory)
        name, ask = service.name, lambda request: local(service, request)
    else:
        server = Server(url, api_key)
        name, ask = model or server.first_model(), server.ask
    typer.echo(f"{name}. /help lists what you can type besides.")
    converse(ask, {"model": name, "max_tokens": max_tokens}, mode)


def converse(ask: Callable[[dict[str, Any]], Iterator[dict[str, Any]]], fixed: dict[str, Any], mode: str) -> None:
    """Reads lines and prints answers until the input ends."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() its history and editing)
    messages: list[dict[str, Any]] = []
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/clear":
            messages = []
        elif command == "/mode":
            mode = argument.strip() if argument.strip() in MODES else mode
            print(f"mode {mode} (of {', '.join(MODES)})")
        elif command.startswith("/"):
            print(HELP)
        elif line:
            thinking = {"type": "disabled" if mode == "non-think" else "enabled"}
            messages.append({"role": "user", "content": line})
            request = {**fixed, "messages": messages, "thinking": thinking, "stream": True}
            try:
                messages.append(show(ask(request if mode == "non-think" else request | {"reasoning_effort": mode})))
            except (ValueError, OSError) as error:
                messages.pop()
                print(f"dsv4: error: {error}", file=sys.stderr)


def show(chunks: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Prints an answer as it comes, the thinking dimmed. Returns the assistant message; Ctrl-C ends it early."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    said = {"reasoning_content": "", "content": ""}
    started, usage = time.perf_counter(), None
    try:
        for chunk in chunks:
            delta, usage = chunk["choices"][0]["delta"], chunk.get("usage")
            if delta.get("reasoning_content"):
                print(dim + delta["reasoning_content"] + plain, end="", flush=True)
            if delta.get("content"):
                if said["reasoning_content"] and not said["content"]:
                    print("\n" + ("" if dim else "---\n"))
                print(delta["content"], end="", flush=True)
            for key in said:
                said[key] += delta.get(key) or ""
    except KeyboardInterrupt:
        print(f"{dim} (stopped){plain}", end="")
    if usage:
        count, seconds = usage["completion_tokens"], time.perf_counter() - started
        print(f"\n{dim}{count} tokens, {count / seconds:.1f} tokens/s{plain}", end="")
    print()
    return {"role": "assistant", **said}


def local(service: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Chunks from a model in this process."""
    from dsv4.server.chat import Reply

    chunks = Reply(service, request).chunks()

    async def following() -> dict[str, Any] | None:
        return await anext(chunks, None)

    with asyncio.Runner() as runner:  # the runner turns Ctrl-C into a cancelled step, which ends the answer cleanly
        while (chunk := runner.run(following())) is not None:
            yield chunk


class Server:
    """A DeepSeek-compatible server at `url`."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/")
        self.headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, self.headers))
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            with contextlib.suppress(ValueError, LookupError, TypeError):  # another shape is shown as it is
                text = json.loads(text)["error"]["message"]
            raise ValueError(f"{self.url}{path}: status {error.code}: {text[:500]}") from None
        except urllib.error.URLError as error:
            raise OSError(f"{self.url}{path}: {error.reason}") from None

    def first_model(self) -> str:
        with self._open("/models") as response:
            return str(json.load(response)["data"][0]["id"])

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks from the server. Raises OSError if the connection ends before the answer does."""
        with self._open("/chat/completions", request) as response:
            for line in response:
                text = line.decode("utf-8").strip()
                if text == "data: [DONE]":
                    return
                if text.startswith("data: "):
                    chunk = json.loads(text[6:])
                    if "error" in chunk:
                        raise ValueError(chunk["error"]["message"])
                    yield chunk
        raise OSError("the connection closed before the answer was complete")
