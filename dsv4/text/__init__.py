"""Text in and out: the tokenizer, the prompt codec by dialect, and the parser of the model's output."""

from __future__ import annotations

from dsv4.text.errors import RequestError
from dsv4.text.prompt import encode_messages, render, render_ids, render_training
from dsv4.text.request import Settings, settings, validate
from dsv4.text.stream import Event, StreamParser, collect, parse
from dsv4.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Event",
    "RequestError",
    "Settings",
    "StreamParser",
    "Tokenizer",
    "collect",
    "encode_messages",
    "load_tokenizer",
    "parse",
    "render",
    "render_ids",
    "render_training",
    "settings",
    "train_tokenizer",
    "validate",
]
