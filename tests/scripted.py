"""The dummy of the serving tests: a network that writes what a script says, under the real engine, codec and server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import uvicorn
from torch import Tensor

from dsv4.config import Config
from dsv4.engine import Engine
from dsv4.server import Service
from dsv4.server.app import create_app
from dsv4.text import Tokenizer, train_tokenizer

TOKENIZER: Tokenizer = train_tokenizer(["The quick brown fox. 12 + 34 = 46 {}[]\n"], 512)


class ScriptedModel:
    """Answers a prompt (text) with `script(prompt)`, token by token, each `delay` seconds apart.

    Implements what `Engine` uses of `dsv4.model.Transformer`; `steps` counts its forward passes.
    """

    device = torch.device("cpu")

    def __init__(self, script: Callable[[str], str], delay: float = 0.0, context: int = 4096) -> None:
        self.script, self.delay, self.steps = script, delay, 0
        self.turns: list[int] = []  # whose state each step was for
        vocabulary = TOKENIZER.vocab_size
        self.config = Config.preset("micro").replace(vocab_size=vocabulary, max_position_embeddings=context)

    def eval(self) -> ScriptedModel:
        return self

    def parameters(self) -> list[Tensor]:
        return [torch.zeros(3)]

    def modules(self) -> list[object]:
        return []

    def new_state(self, batch: int) -> dict[Any, Any]:
        return {"ids": []}

    def last_logits(self, ids: Tensor, state: dict[Any, Any]) -> Tensor:
        self.steps += 1
        self.turns.append(id(state))
        time.sleep(self.delay)
        state["ids"] += ids[0].tolist()
        logits = torch.zeros(1, self.config.vocab_size)
        seen, header = state["ids"], TOKENIZER.special["<｜Assistant｜>"]
        if header in seen:
            start = len(seen) - seen[::-1].index(header) + 1  # after the header and its <think> or </think>
            if len(seen) == start:
                answer = self.script(TOKENIZER.decode(seen))
                state[start] = [*TOKENIZER.encode(answer, control=True), TOKENIZER.eos_id]
            if start in state:  # else an older header, in the middle of a prompt
                logits[0, state[start][len(seen) - start]] = 100.0
        return logits


def scripted_service(script: Callable[[str], str] | str, delay: float = 0.0, context: int = 4096) -> Service:
    """A service whose model answers with `script`."""
    text = script if callable(script) else lambda prompt: script
    return Service(Engine(ScriptedModel(text, delay, context), TOKENIZER), "scripted")


@contextlib.contextmanager
def running(service: Service, **options: Any) -> Iterator[str]:
    """A real server on a free loopback port, in a thread; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service, **options), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
        assert not thread.is_alive()


def still(service: Service) -> int:
    """Waits until the model makes no step in half a second; how many it has made."""
    for _ in range(120):
        before = service.engine.model.steps
        time.sleep(0.5)
        if service.engine.model.steps == before:
            return int(before)
    raise AssertionError("it goes on for a minute")
