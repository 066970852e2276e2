"""`dsv4 train` and `dsv4 sft`: run a recipe, continue one, or say what it would do."""

from __future__ import annotations

from pathlib import Path

import typer

_RECIPE = typer.Argument(..., help="The recipe, a TOML file.")
_SET = typer.Option([], "--set", help="Override a value: --set optimizer.lr=0.003 (again for more).")
_DRY = typer.Option(False, "--dry-run", help="Print the resolved recipe and stop.")
_RESUME = typer.Option(True, "--resume/--no-resume", help="Continue the run's newest checkpoint when there is one.")
_RUNS = typer.Option(Path("runs"), "--runs", help="The folder that holds the runs.")
_STOP = typer.Option(0, "--stop-at", help="Stop (with a checkpoint) after this step; the schedule stays the same.")
_CHECK = typer.Option(0.0, "--time-check", metavar="MINUTES", help="Measure, and print how many steps fit in MINUTES.")


def _run(
    kind: str, recipe: Path, overrides: list[str], dry: bool, resume: bool, runs: Path, stop: int, minutes: float
) -> None:  # fmt: skip
    from dsv4.common.runconfig import load, resolved
    from dsv4.training.recipe import Recipe

    settings = load(Recipe, recipe, overrides)
    if settings.data.kind != kind:
        other = "sft" if kind == "text" else "train"
        raise ValueError(f"{recipe} has data.kind {settings.data.kind!r}: use dsv4 {other}")
    if dry:
        settings.model.config()
        typer.echo(resolved(settings), nl=False)
        return
    if minutes:
        from dsv4.training.timing import time_check

        for line in time_check(settings, minutes):
            typer.echo(line)
        return
    from dsv4.training.trainer import Trainer

    trainer = Trainer(settings, runs / settings.name, resume)
    trainer.run(stop or None)
    typer.echo(f"{settings.name}: step {trainer.step}, {trainer.seconds / 3600:.2f} h of training, in {trainer.folder}")
    if settings.export and trainer.step == settings.schedule.steps:
        typer.echo(f"model: {settings.export}")


def train(
    recipe: Path = _RECIPE, override: list[str] = _SET, dry_run: bool = _DRY, resume: bool = _RESUME,
    runs: Path = _RUNS, stop_at: int = _STOP, time_check: float = _CHECK,
) -> None:  # fmt: skip
    """Pre-train a model on text as a recipe says.

    The corpus is built from this machine's own files when it is not there yet. A killed run continues from its newest
    checkpoint when started again.

    Example:
      dsv4 train recipes/nano.toml
      dsv4 train recipes/micro.toml --set schedule.steps=50 --set name=try
      dsv4 train recipes/nano.toml --time-check 60
    """
    _run("text", recipe, override, dry_run, resume, runs, stop_at, time_check)


def sft(
    recipe: Path = _RECIPE, override: list[str] = _SET, dry_run: bool = _DRY, resume: bool = _RESUME,
    runs: Path = _RUNS, stop_at: int = _STOP, time_check: float = _CHECK,
) -> None:  # fmt: skip
    """Fine-tune a trained model on procedural tasks in all effort modes.

    Example:
      dsv4 sft recipes/nano-sft.toml
      dsv4 sft recipes/nano-sft.toml --set model.start=runs/nano/model
    """
    _run("tasks", recipe, override, dry_run, resume, runs, stop_at, time_check)
