"""DeepSeek-V4, whole, in Python. Public names are imported on first use, so that `import dsv4` costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "load", "load_tokenizer", "save", "text"]

if TYPE_CHECKING:
    from dsv4 import text
    from dsv4.checkpoint import load, save
    from dsv4.config import Config
    from dsv4.text import load_tokenizer

_HOME = {"Config": "dsv4.config", "load": "dsv4.checkpoint", "save": "dsv4.checkpoint", "load_tokenizer": "dsv4.text"}


def __getattr__(name: str) -> Any:
    if name == "text":
        return importlib.import_module("dsv4.text")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dsv4' has no attribute {name!r}")
