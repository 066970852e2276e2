"""Text in and out: the tokenizer, the prompt codec by dialect, and the parser of the model's output."""

from __future__ import annotations

from dsv4.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "train_tokenizer"]
