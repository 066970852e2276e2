"""What a recipe file says: the frozen records behind ``recipes/*.toml``. One file is one run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv4.config import Config
from dsv4.training.optimizer import OptimizerSettings
from dsv4.training.schedule import Schedule, StepPlan


@dataclass(frozen=True)
class ModelSettings:
    """A preset with changed fields, or the folder of a model to start from (its tokenizer comes along). ``qat`` "fp4":
    the forward pass sees routed experts and index rows as the released formats hold them (report 5.2.1); what is saved
    are the masters."""

    preset: str = "nano"
    changes: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    qat: Literal["fp4"] | None = None

    def config(self) -> Config:
        """The network's config. Raises ValueError for unknown presets and fields."""
        if self.start:
            return Config.load(self.start)
        preset = Config.preset(self.preset).to_dict("official")
        return Config.from_dict({**preset, **self.changes})


@dataclass(frozen=True)
class DataSettings:
    """Text: the corpus folder (built there when absent) and how often each source is seen per epoch. Tasks: how many
    procedural samples, spread over all families, levels and effort modes; `replay` adds plain text to them (in tokens
    per task token)."""

    kind: Literal["text", "tasks"] = "text"
    corpus: str = "runs/corpus"
    max_bytes: int = 150_000_000
    repeats: dict[str, float] = field(default_factory=lambda: {"stdlib": 1.0, "packages": 1.0, "docs": 1.0, "man": 1.0})
    fim_rate: float = 0.0
    samples: int = 100_000
    replay: float = 0.0


@dataclass(frozen=True)
class BatchSettings:
    """Tokens of an optimiser step, and of one forward pass; the first is a multiple of the second."""

    tokens: int = 8192
    micro_tokens: int = 4096

    def rows(self, length: int) -> tuple[int, int]:
        """(rows of a forward pass, forward passes per step) at a sequence length."""
        rows = self.micro_tokens // length
        if rows < 1 or self.micro_tokens % length or self.tokens % self.micro_tokens:
            raise ValueError(
                f"batch: micro_tokens {self.micro_tokens} must be a multiple of length {length}, "
                f"tokens {self.tokens} one of micro_tokens"
            )
        return rows, self.tokens // self.micro_tokens


@dataclass(frozen=True)
class EvalSettings:
    """Bits per byte on held-out text, every `every` steps, over the first `bytes` of each of `files` files."""

    every: int = 200
    files: int = 16
    bytes: int = 4096
    rows: int = 4


@dataclass(frozen=True)
class Recipe:
    """One run. `name` is the run's folder under runs/, `export` where the model goes at the end (official layout)."""

    name: str
    schedule: Schedule
    export: str | None = None
    seed: int = 0
    device: Literal["cpu", "cuda", "auto"] = "auto"
    threads: int = 0
    model: ModelSettings = ModelSettings()
    data: DataSettings = field(default_factory=DataSettings)
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    balance_weight: float = 1e-4
    indexer_weight: float = 1.0
    evaluate: EvalSettings = EvalSettings()
    log_every: int = 1
    checkpoint_every: int = 200
    keep: int = 2

    def plan(self, step: int) -> StepPlan:
        """What the schedule says for `step`."""
        return self.schedule.at(step, self.optimizer.lr, self.optimizer.end_lr_ratio)

    def agrees(self, other: Recipe, steps: int) -> bool:
        """Whether `other` would have done the first `steps` steps alike: then a run may go on under it, and it alone
        reproduces the whole run. What only concerns reporting or the machine does not count."""
        reporting = ("export", "device", "threads", "evaluate", "log_every", "checkpoint_every", "keep")
        aside = {key: getattr(self, key) for key in reporting}
        same = dataclasses.replace(other, schedule=self.schedule, **aside) == self
        known = steps <= self.schedule.steps
        return same and known and all(self.plan(step) == other.plan(step) for step in range(steps))

    def __post_init__(self) -> None:
        for _, length in self.schedule.lengths:
            self.batch.rows(length)
        if min(self.log_every, self.checkpoint_every, self.keep, self.evaluate.every) < 1:
            raise ValueError("log_every, checkpoint_every, keep and evaluate.every must be at least 1")
