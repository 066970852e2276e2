"""A corpus of some standard-library modules, and recipes small enough for seconds."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv4.common import runconfig
from dsv4.data import build_corpus
from dsv4.data.corpus import File
from dsv4.training.recipe import Recipe

SMALL = """
name = "small"
log_every = 1
checkpoint_every = 2
[model]
preset = "micro"
dtype = "float32"
[data]
corpus = "CORPUS"
[batch]
tokens = 512
micro_tokens = 256
[schedule]
steps = 6
warmup = 2
decay = 0.34
dense_steps = 2
indexer_steps = 1
lengths = [[0, 64], [4, 128]]
[optimizer]
lr = 4e-3
[evaluate]
every = 3
files = 2
bytes = 256
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_path("stdlib"))
    modules = sorted(p for p in stdlib.glob("*.py") if 4_000 <= p.stat().st_size <= 30_000)[:50]
    build_corpus(root / "text", 1_000_000, [File("stdlib", "python", p.name, p) for p in modules])
    return root


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def recipe_file(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL.replace("CORPUS", str(corpus)))
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Callable[..., Recipe]:
    """recipe("schedule.steps=3", ...) -> the small recipe with overrides."""
    return lambda *overrides: runconfig.load(Recipe, recipe_file, overrides)
