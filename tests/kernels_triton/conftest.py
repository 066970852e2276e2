"""Triton's interpreter at twice its speed."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any


def patch_once() -> None:
    """The interpreter patches triton.language anew for every call of a helper. Here it stays patched: nothing is
    compiled in this process."""
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def once(fn: Any) -> Any:
        seen = frozenset(name for name in ("tl", "core") if name in fn.__globals__)
        if seen not in done:
            done.add(seen)
            patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
    patch_once()
