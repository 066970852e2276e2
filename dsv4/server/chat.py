"""One chat completion: from the request's JSON to the chunks of its answer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4.engine import Engine, SamplingParams
from dsv4.server.chunks import Chunk, ChunkWriter, usage
from dsv4.text import Event, RequestError, StreamParser, render_ids, settings, validate

ALIASES = ("deepseek-v4-flash", "deepseek-v4-pro", "deepseek-flash")
DIALECTS = ("v4-preview", "v4-ga")
MARKUP = ("<think>", "</think>", "｜DSML｜")  # the control tokens that mean something in an answer


class Service:
    """What is served: an engine under a name and its aliases, in one prompt dialect.

    sampling  temperature and top_p where the request does not decide: when it is silent, and in thinking mode, where
              DeepSeek ignores it. A folder's generation_config.json recommends them; the releases say 1.0 and 1.0.
    need_reasoning  refuse tool calls in progress that come back without their reasoning, as the API once did.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        dialect: str = "v4-preview",
        aliases: Sequence[str] = ALIASES,
        sampling: dict[str, float] | None = None,
        need_reasoning: bool = False,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"unknown dialect {dialect!r}; known: {', '.join(DIALECTS)}")
        self.engine, self.name, self.dialect, self.need_reasoning = engine, name, dialect, need_reasoning
        self.models = [name, *(alias for alias in aliases if alias != name)]
        self.sampling = {"temperature": 1.0, "top_p": 1.0} | (sampling or {})
        packed = (math.prod(getattr(module, "shape", (0,))) for module in engine.model.modules())  # FP4, FP8, on disk
        self.parameters = sum(parameter.numel() for parameter in engine.model.parameters()) + sum(packed)
        about = json.dumps([name, dialect, engine.config.to_dict()], sort_keys=True)
        self.fingerprint = f"fp_{hashlib.sha256(about.encode()).hexdigest()[:10]}_dsv4"

    @staticmethod
    def load(
        path: str | Path,
        dialect: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        aliases: Sequence[str] = ALIASES,
        need_reasoning: bool = False,
        expert_memory: str | None = None,
    ) -> Service:
        """Read a model folder; its name is the model's name, its dialect `detect_dialect`'s unless given."""
        import dsv4

        path = Path(path)
        model = dsv4.load(path, dtype=dtype, device=device, expert_memory=expert_memory, progress=True)
        engine = Engine(model, dsv4.load_tokenizer(path))
        advice = path / "generation_config.json"
        advised = json.loads(advice.read_text(encoding="utf-8")) if advice.is_file() else {}
        sampling = {key: float(advised[key]) for key in ("temperature", "top_p") if key in advised}
        dialect = dialect or detect_dialect(path)
        return Service(engine, path.resolve().name, dialect, aliases, sampling, need_reasoning)

    def list_models(self) -> Chunk:
        """The body of `GET /models`, with what the chat page wants to know besides."""
        facts = {"context_length": self.engine.context, "parameters": self.parameters}
        rows = [{"id": name, "object": "model", "owned_by": "deepseek", **facts} for name in self.models]
        return {"object": "list", "data": rows}


def detect_dialect(path: Path) -> str:
    """The prompt dialect of a model folder. No config key names it; the releases carry their prompt encoder, and the
    0731/0813 ones (v4-ga) are those whose encoder has a table of effort prompts."""
    encoder = path / "encoding" / "encoding_dsv4.py"
    if encoder.is_file() and "REASONING_EFFORT_PROMPTS" in encoder.read_text(encoding="utf-8"):
        return "v4-ga"
    return "v4-preview"


class Reply:
    """The answer to one request. Raises `RequestError` (the user's mistake) before any token is made."""

    def __init__(self, service: Service, request: Any) -> None:
        validate(request, models=service.models, need_reasoning=service.need_reasoning)
        self.engine = engine = service.engine
        self.settings = chosen = settings(request)
        ids = render_ids(request, engine.tokenizer, dialect=service.dialect)
        asked = {} if chosen.thinking else {k: request[k] for k in service.sampling if request.get(k) is not None}
        sampling = service.sampling | asked
        if chosen.thinking and chosen.tools and service.dialect == "v4-ga":
            sampling["top_p"] = min(sampling["top_p"], 0.95)
        params = SamplingParams(**sampling, max_tokens=self._max_tokens(request, len(ids)), seed=request.get("seed"))
        self.parser = StreamParser.of(chosen)
        include_usage = bool((request.get("stream_options") or {}).get("include_usage"))
        self.writer = ChunkWriter(request["model"], service.fingerprint, chosen.thinking, include_usage)
        self.top_logprobs = (request.get("top_logprobs") or 0) if request.get("logprobs") else None
        self.generation = engine.generate(ids, params)
        self.reasoning_tokens = 0
        self._decoder = engine.tokenizer.stream_decoder()
        special = engine.tokenizer.special
        self._silent = {id for token, id in special.items() if token not in MARKUP}
        self._in_thought = chosen.start == "reasoning"
        self._logprobs: list[Chunk] = []  # of tokens whose text is not out yet

    def _max_tokens(self, request: Chunk, prompt: int) -> int:
        context = self.engine.context
        wanted = next((request[key] for key in ("max_tokens", "max_completion_tokens") if request.get(key)), None)
        if wanted is None:
            usual = 8192 if not self.settings.thinking else 131072 if self.settings.effort == "max" else 65536
            wanted = max(1, min(usual, context - prompt))
        if prompt + wanted > context:
            raise RequestError(
                f"This model's maximum context length is {context} tokens. However, you requested {prompt + wanted} "
                f"tokens ({prompt} in the messages, {wanted} in the completion). Please reduce the length of the "
                "messages or completion."
            )
        return wanted

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The chunks, first to last, as the model writes. Closing the iterator stops the model."""
        yield self.writer.first()
        async for id in self.generation:
            for chunk in self._feed(id):
                yield chunk
            if self.parser.done:
                break
        for chunk in self._end():
            yield chunk

    def _feed(self, id: int) -> Iterator[Chunk]:
        if self._in_thought:
            self._in_thought = id != self.engine.tokenizer.special.get("</think>")
            self.reasoning_tokens += self._in_thought
        if self.top_logprobs is not None:
            self._logprobs.append(self._logprob(id, self.top_logprobs))
        return self._write(self.parser.push("" if id in self._silent else self._decoder.push(id)))

    def _end(self) -> Iterator[Chunk]:
        last = self.parser.push(self._decoder.flush())
        return self._write(last + self.parser.finish("length" if self.generation.finish_reason == "length" else "stop"))

    def _write(self, events: Iterable[Event]) -> Iterator[Chunk]:
        for event in events:
            if event.kind == "tool_end":
                continue
            rows, self._logprobs = self._logprobs, []
            logprobs = {"reasoning_content" if event.kind == "reasoning" else "content": rows} if rows else None
            if event.kind == "finish":
                reasoning = self.reasoning_tokens if self.settings.thinking else None
                counts = usage(self.generation.prompt_tokens, self.generation.completion_tokens, reasoning=reasoning)
                yield self.writer.last(event.text, counts, logprobs)
            else:
                yield self.writer.event(event, logprobs)

    def _logprob(self, id: int, top: int) -> Chunk:
        """Natural-log probabilities of the model itself, before temperature and top_p."""
        assert self.generation.logits_V is not None
        logprobs_V = torch.log_softmax(self.generation.logits_V, -1)

        def row(id: int) -> Chunk:
            data = self.engine.tokenizer.token_bytes(id)
            return {"token": data.decode("utf-8", "replace"), "logprob": float(logprobs_V[id]), "bytes": list(data)}

        return row(id) | {"top_logprobs": [row(int(id)) for id in logprobs_V.topk(top).indices]}
