"""Prompts in, token ids out, one at a time, for several callers at once.

One thread owns the model. Every unit of work (a chunk of a prompt, or one token) is a task in that thread's queue,
first come first served, so callers take turns step by step, a long prompt delays nobody by more than one chunk, and an
event loop that waits for a step is never blocked by it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from dsv4.config import Config
from dsv4.engine.sampler import SamplingParams, sample, uniform


class Engine:
    """A model (`dsv4.model.Transformer`) and its tokenizer, ready to answer.

    chunk  prompt tokens per unit of work: larger is faster alone, smaller is fairer in company.
    """

    def __init__(self, model: Any, tokenizer: Any, chunk: int = 256) -> None:
        self.model, self.tokenizer, self.chunk = model.eval(), tokenizer, chunk
        self.config: Config = model.config
        self.device = model.device
        special = tokenizer.special
        self.stop_ids = frozenset({tokenizer.eos_id, special.get("<｜User｜>", tokenizer.eos_id)})
        self._thread = ThreadPoolExecutor(1, "dsv4-engine")

    @property
    def context(self) -> int:
        """Tokens a sequence may hold, prompt and answer together."""
        return self.config.max_position_embeddings

    def generate(
        self, ids: Sequence[int], params: SamplingParams | None = None, cancelled: Callable[[], bool] = lambda: False
    ) -> Generation:
        """The answer to a prompt of token ids: iterate over it (`for` or `async for`) for the ids, stop token excluded.

        `cancelled` is asked before every unit of work. Raises ValueError when the prompt fills the context.
        """
        return Generation(self, ids, params or SamplingParams(), cancelled)

    def submit(self, work: Callable[[], int | None]) -> Future[int | None]:
        """Queue a unit of work for the thread that owns the model."""
        return self._thread.submit(work)

    def close(self) -> None:
        """Drop what is queued and end the thread."""
        self._thread.shutdown(cancel_futures=True)


class Generation:
    """One answer in the making.

    finish_reason  None until the end, then "stop" (a stop token), "length" (max_tokens or the context) or "cancelled".
    logits_V       float32 [V], the scores from which the latest id was chosen.
    """

    def __init__(
        self, engine: Engine, ids: Sequence[int], params: SamplingParams, cancelled: Callable[[], bool]
    ) -> None:
        room = engine.context - len(ids)
        if not ids or room < 1:
            raise ValueError(
                f"a prompt of {len(ids)} tokens: it needs 1 to {engine.context - 1} (context {engine.context})"
            )
        if not 0 <= min(ids) <= max(ids) < engine.config.vocab_size:
            raise ValueError(
                f"token ids {min(ids)}..{max(ids)} exceed the model's vocabulary of {engine.config.vocab_size}"
            )
        self.engine, self.params, self.cancelled = engine, params, cancelled
        self.limit = min(room, params.max_tokens or room)
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.stop_ids = engine.stop_ids.union(params.stop_ids)
        self.prompt_tokens, self.completion_tokens = len(ids), 0
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self.logits_V: Tensor | None = None
        self._pending = list(ids)  # ids the model has not seen yet
        self._state: Any = None

    def _step(self) -> int | None:
        """Runs in the model's thread: the next chunk of the prompt (None), or the next token."""
        chunk, self._pending = self._pending[: self.engine.chunk], self._pending[self.engine.chunk :]
        with torch.inference_mode():
            if self._state is None:
                self._state = self.engine.model.new_state(batch=1)
            logits_BV = self.engine.model.last_logits(torch.tensor([chunk], device=self.engine.device), self._state)
            if self._pending:
                return None
            self.logits_V = logits_BV[0, : self.engine.tokenizer.vocab_size]
            draw = uniform(self.seed, self.prompt_tokens + self.completion_tokens)
            return sample(self.logits_V, self.params.temperature, self.params.top_p, draw)

    def _accept(self, id: int | None) -> int | None:
        """`id` if it belongs to the answer; notes why the answer ends."""
        if id in self.stop_ids:
            self.finish_reason = "stop"
            return None
        if id is not None:
            self._pending = [id]
            self.completion_tokens += 1
        return id

    def _goes_on(self) -> bool:
        if self.finish_reason is None and self.cancelled():
            self.finish_reason = "cancelled"
        if self.finish_reason is None and self.completion_tokens == self.limit:
            self.finish_reason = "length"
        return self.finish_reason is None

    def __iter__(self) -> Iterator[int]:
        while self._goes_on():
            id = self._accept(self.engine.submit(self._step).result())
            if id is not None:
                yield id

    async def __aiter__(self) -> AsyncIterator[int]:
        while self._goes_on():
            id = self._accept(await asyncio.wrap_future(self.engine.submit(self._step)))
            if id is not None:
                yield id
