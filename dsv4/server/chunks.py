"""The shapes of an answer on the wire: `chat.completion.chunk` objects, and the one object they add up to."""

from __future__ import annotations

import secrets
import string
import time
import uuid
from collections.abc import Iterable
from typing import Any

from dsv4.text import Event

Chunk = dict[str, Any]
_ALPHABET = string.ascii_letters + string.digits


class ChunkWriter:
    """Writes the chunks of one answer, each with the same envelope.

    In thinking mode every delta carries both `content` and `reasoning_content`, the silent one null. Usage rides on the
    last chunk, the one with `finish_reason`; `include_usage` only gives the earlier ones an explicit `usage: null`.
    """

    def __init__(self, model: str, fingerprint: str, thinking: bool, include_usage: bool = False) -> None:
        self.thinking = thinking
        self.envelope: Chunk = {
            "id": str(uuid.uuid4()),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self.early = {"usage": None} if include_usage else {}

    def first(self) -> Chunk:
        """The chunk that opens the answer and names the role."""
        spoken: Chunk = {"content": None, "reasoning_content": ""} if self.thinking else {"content": ""}
        return self._chunk({"role": "assistant", **spoken})

    def event(self, event: Event, logprobs: Chunk | None = None) -> Chunk:
        """A piece of reasoning or answer, the beginning of a tool call, or more of its JSON arguments."""
        if event.kind in ("reasoning", "content"):
            return self._chunk(self._spoken(event.text, event.kind == "reasoning"), logprobs)
        call: Chunk = {"index": event.index}
        if event.kind == "tool_start":
            id = f"call_{event.index:02d}_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))
            call |= {"id": id, "type": "function", "function": {"name": event.text, "arguments": ""}}
        else:
            call |= {"function": {"arguments": event.text}}
        return self._chunk({"tool_calls": [call]}, logprobs)

    def last(self, finish_reason: str, usage: Chunk, logprobs: Chunk | None = None) -> Chunk:
        """The chunk that ends the answer."""
        return self._chunk(self._spoken("", False), logprobs, finish_reason) | {"usage": usage}

    def _spoken(self, text: str, reasoning: bool) -> Chunk:
        if not self.thinking:
            return {"content": text}
        return (
            {"content": None, "reasoning_content": text} if reasoning else {"content": text, "reasoning_content": None}
        )

    def _chunk(self, delta: Chunk, logprobs: Chunk | None = None, finish_reason: str | None = None) -> Chunk:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.envelope, "choices": [choice], **self.early}


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int | None = None) -> Chunk:
    """Token counts; `reasoning` (without the `</think>` token) only in thinking mode."""
    counts: Chunk = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }
    return counts if reasoning is None else counts | {"completion_tokens_details": {"reasoning_tokens": reasoning}}


def assemble(chunks: Iterable[Chunk]) -> Chunk:
    """The `chat.completion` that a list of chunks, first to last, adds up to."""
    message: Chunk = {"role": "assistant", "content": ""}
    calls: list[Chunk] = []
    logprobs: Chunk = {}
    chunk: Chunk = {}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        for key in ("content", "reasoning_content"):
            if delta.get(key) is not None:
                message[key] = message.get(key, "") + delta[key]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({**call, "function": dict(call["function"])})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        for key, rows in (chunk["choices"][0]["logprobs"] or {}).items():
            logprobs.setdefault(key, []).extend(rows)
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "logprobs": logprobs or None}
    choice["finish_reason"] = chunk["choices"][0]["finish_reason"]
    return {**chunk, "object": "chat.completion", "choices": [choice]}
