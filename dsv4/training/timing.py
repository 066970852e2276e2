"""How long a recipe takes here: measured, not guessed, so that `steps` can be set to fit the time one has."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dsv4.training.recipe import Recipe
from dsv4.training.trainer import Trainer

_MEASURED = 3  # steps of each kind, after one that warms up


def time_check(recipe: Recipe, minutes: float) -> Iterator[str]:
    """Lines: tokens/s of every kind of step in the schedule (indexer phase x length), the time of the whole run, and
    how many steps of the same mixture fit in `minutes`. Weights are thrown away."""
    schedule = recipe.schedule
    kinds: dict[tuple[str, int], int] = {}
    for step in range(schedule.steps):
        plan = recipe.plan(step)
        kinds[plan.phase, plan.length] = kinds.get((plan.phase, plan.length), 0) + 1
    seconds = 0.0
    for (phase, length), steps in kinds.items():
        few = 4 * _MEASURED
        short = dataclasses.replace(
            schedule, steps=few, warmup=0, decay=0.0, lengths=((0, length),),
            dense_steps=few * (phase == "off"), indexer_steps=few * (phase == "warmup"),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(dataclasses.replace(recipe, schedule=short, export=None), Path(folder))
            trainer.advance()
            started = time.monotonic()
            for _ in range(_MEASURED):
                trainer.advance()
            each = (time.monotonic() - started) / _MEASURED
        seconds += each * steps
        speed = recipe.batch.tokens / each
        yield f"{phase:<7} length {length:>5}: {speed:8.0f} tokens/s, {each:.2f} s a step, {steps} steps"
    yield f"whole run: {seconds / 60:.1f} minutes for {schedule.steps} steps, evaluation and checkpoints not counted"
    yield f"{minutes:g} minutes hold {int(schedule.steps * minutes * 60 / seconds)} steps of this mixture"
