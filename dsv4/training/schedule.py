"""What a run does at each step: a pure function of the step, so that a resumed run continues exactly (report 4.2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Phase = Literal["off", "warmup", "sparse"]


@dataclass(frozen=True)
class StepPlan:
    """lr of the parameters that train; phase of the indexer (`Transformer.train_forward`); length in tokens."""

    lr: float
    phase: Phase
    length: int
    mtp_weight: float
    gamma: float


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, flat, cosine to `end_lr_ratio` over the last `decay` of the run.

    dense_steps     dense attention over all visible entries, the indexer rests
    indexer_steps   then only the indexer trains, at `indexer_lr`; the rest of the run is sparse
    lengths         [[from_step, length], ...]: sequence length in tokens; the tokens of a step stay the same
    mtp_weight      the MTP loss's weight until the decay starts, `mtp_weight_decay` from there on
    gamma           step of the routers' bias balancing; 0 for the last `gamma_off` of the run (V3)
    """

    steps: int
    warmup: int = 100
    decay: float = 0.3
    dense_steps: int = 0
    indexer_steps: int = 0
    indexer_lr: float = 1e-3
    lengths: tuple[tuple[int, ...], ...] = ((0, 512),)
    mtp_weight: float = 0.3
    mtp_weight_decay: float = 0.1
    gamma: float = 0.001
    gamma_off: float = 0.034

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"schedule: steps {self.steps} and warmup {self.warmup} must be positive, decay {self.decay} in 0..1"
            )
        if self.warmup + math.ceil(self.decay * self.steps) > self.steps:
            raise ValueError(f"schedule: warmup {self.warmup} and decay {self.decay} exceed {self.steps} steps")
        if min(self.dense_steps, self.indexer_steps) < 0 or self.dense_steps + self.indexer_steps > self.steps:
            both = f"dense_steps {self.dense_steps} + indexer_steps {self.indexer_steps}"
            raise ValueError(f"schedule: {both} must be at most {self.steps} steps, each at least 0")
        starts = [stage[0] for stage in self.lengths]
        in_order = starts[:1] == [0] and starts == sorted(set(starts))
        if not in_order or any(len(stage) != 2 or stage[1] < 8 for stage in self.lengths):
            raise ValueError(f"schedule.lengths must be [[0, length], [later, length], ...], got {self.lengths}")

    @property
    def decay_start(self) -> int:
        """The first step of the cosine."""
        return self.steps - math.ceil(self.decay * self.steps)

    def stage(self, step: int) -> tuple[int, int]:
        """The length stage of a step: (its first step, length)."""
        return max((stage[0], stage[1]) for stage in self.lengths if stage[0] <= step)

    def at(self, step: int, lr: float, end_lr_ratio: float) -> StepPlan:
        """The plan of `step` (from 0) for a peak learning rate `lr`."""
        assert 0 <= step < self.steps, f"step {step} of {self.steps}"
        phase: Phase = "sparse"
        if step < self.dense_steps:
            phase = "off"
        elif step < self.dense_steps + self.indexer_steps:
            phase = "warmup"
        decaying = step >= self.decay_start
        factor = min(1.0, (step + 1) / max(self.warmup, 1))
        if decaying:
            progress = (step + 1 - self.decay_start) / (self.steps - self.decay_start)
            factor = end_lr_ratio + (1 - end_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
        return StepPlan(
            lr=self.indexer_lr if phase == "warmup" else lr * factor,
            phase=phase,
            length=self.stage(step)[1],
            mtp_weight=self.mtp_weight_decay if decaying else self.mtp_weight,
            gamma=0.0 if step >= self.steps * (1 - self.gamma_off) else self.gamma,
        )
