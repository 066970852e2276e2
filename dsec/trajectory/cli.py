"""`dsec log`: look at trajectories, check them, print what they did, find where two part."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from dsec.trajectory.log import Branch, LogReader

app = typer.Typer(
    help="The trajectory log: show, verify, replay, diff, delete, compact.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
FOLDER = typer.Option(None, "--folder", help="The log's folder (default: `log` in DSEC_HOME).")
JSON = typer.Option(False, "--json", help="One JSON value a line, for programs.")


def _folder(given: Path | None) -> Path:
    from dsec.guest.build import home

    return given or home() / "log"


def _open(folder: Path | None) -> LogReader:
    from dsec.errors import DsecError
    from dsec.trajectory.log import LogReader

    try:
        return LogReader(_folder(folder))
    except DsecError as problem:
        typer.echo(f"dsec: error: {problem}", err=True)
        raise typer.Exit(1) from None


def _named(log: LogReader, name: str) -> Branch:
    """`trajectory` or `trajectory@branch`."""
    from dsec.errors import NotFound

    trajectory, at, branch = name.rpartition("@")
    try:
        return log.branch(trajectory, branch) if at else log.branch(name)
    except NotFound as problem:
        typer.echo(f"dsec: error: {problem}", err=True)
        raise typer.Exit(1) from None


def _line(text: str, width: int) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 1] + "…"


def _asked(row: dict[str, Any]) -> str:
    args = row["args"]
    return str(next((args[name] for name in ("command", "cmd", "path") if name in args), args))


@app.command()
def show(
    name: str = typer.Argument("", help="A trajectory, or trajectory@branch; none lists them all."),
    folder: Path | None = FOLDER,
    as_json: bool = JSON,
) -> None:
    """The trajectories in the log, or one of them step by step.

    \b
    Example:
      dsec log show run-7/sample-3
    """
    from dsec.trajectory.show import steps

    with contextlib.closing(_open(folder)) as log:
        if not name:
            for trajectory, branch_name in log.names():
                branch = log.branch(trajectory, branch_name)
                unknown = sum(not (entry.ended or entry.aborted) for entry in branch.entries)
                found = {"trajectory": trajectory, "branch": branch_name, "steps": len(branch.entries)}
                found |= {"unknown": unknown, "snapshots": len(branch.snapshots)}
                found |= {"epoch": branch.epoch, "closed": branch.closed}
                text = f"{trajectory}@{branch_name}  {found['steps']} steps, {unknown} unknown, epoch {branch.epoch}"
                typer.echo(json.dumps(found) if as_json else text + ("  closed" if branch.closed else ""))
            return
        branch = _named(log, name)
        snapshots = {snapshot.step: snapshot.marker for snapshot in branch.snapshots}
        for row in steps(log, branch):
            if as_json:
                typer.echo(json.dumps(row))
                continue
            if row["step"] in snapshots:
                typer.echo(f"      snapshot {json.dumps(snapshots[row['step']])}")
            result = row.get("result", {})
            outcome = f"exit {result['exit_code']}" if "exit_code" in result else row["state"]
            seconds = f"{row['seconds']:8.3f} s" if "seconds" in row else " " * 10
            typer.echo(f"{row['step']:5d} {row['kind']:8} {outcome:9} {seconds}  {_line(_asked(row), 80)}")


@app.command()
def verify(folder: Path | None = FOLDER, as_json: bool = JSON) -> None:
    """Check every frame, every chain of keys and every blob; exit code 1 if something is wrong.

    \b
    Example:
      dsec log verify
    """
    from dsec.trajectory.show import verify as check

    counts, problems = check(_folder(folder))
    if as_json:
        typer.echo(json.dumps({**counts, "problems": problems}))
    else:
        typer.echo(", ".join(f"{number} {what}" for what, number in counts.items()))
        for problem in problems:
            typer.echo(problem, err=True)
    raise typer.Exit(1 if problems else 0)


@app.command()
def quarantine(shard: str = typer.Argument("local"), folder: Path | None = FOLDER) -> None:
    """Put a damaged log aside so that its Edge starts again; trajectories that were in it stay closed.

    \b
    Example:
      dsec log quarantine local
    """
    from dsec.errors import DsecError
    from dsec.trajectory.log import quarantine as aside

    try:
        typer.echo(aside(_folder(folder), shard))
    except DsecError as problem:
        typer.echo(f"dsec: error: {problem}", err=True)
        raise typer.Exit(1) from None


def _write(folder: Path | None, op: str, args: dict[str, Any], work: Any) -> dict[str, Any]:
    """Changes a log: by its Edge if one has it open, otherwise here."""
    import asyncio

    from dsec.errors import DsecError, Fenced
    from dsec.trajectory.log import LogReader, TrajectoryLog

    async def here() -> Any:
        log = TrajectoryLog(_folder(folder))
        try:
            return await work(log)
        finally:
            log.close()

    async def there() -> Any:
        from dsec.client import EmbeddedTransport

        transport = EmbeddedTransport(_folder(folder).parent)
        try:
            return (await transport.call(op, args))[0]
        finally:
            await transport.close()

    try:
        LogReader(_folder(folder)).close()  # NotFound instead of a new, empty log
        try:
            return dict(asyncio.run(here()))
        except Fenced:
            return dict(asyncio.run(there()))
    except DsecError as problem:
        typer.echo(f"dsec: error: {problem}", err=True)
        raise typer.Exit(1) from None


@app.command()
def delete(trajectory: str, folder: Path | None = FOLDER, as_json: bool = JSON) -> None:
    """Delete a trajectory with all its branches. A program that asks for it again runs everything again.

    \b
    Example:
      dsec log delete run-7/sample-3
    """
    from dsec.trajectory.log import TrajectoryLog
    from dsec.trajectory.retention import delete as forget
    from dsec.trajectory.retention import sweep_snapshots

    async def work(log: TrajectoryLog) -> dict[str, Any]:
        found = {"branches": await forget(log, trajectory)}
        sweep_snapshots(log, _folder(folder).parent / "snapshots")
        return found

    found = _write(folder, "log_delete", {"trajectory": trajectory}, work)
    typer.echo(json.dumps(found) if as_json else f"{trajectory}: deleted {', '.join(found['branches'])}")


@app.command()
def compact(
    older_than: float = typer.Option(
        0.0, help="Days: delete trajectories in which nothing was done for so long first."
    ),
    folder: Path | None = FOLDER,
    as_json: bool = JSON,
) -> None:
    """Give the room of deleted trajectories back.

    \b
    Example:
      dsec log compact --older-than 30
    """
    from dsec.trajectory.log import TrajectoryLog
    from dsec.trajectory.retention import compact as free
    from dsec.trajectory.retention import expire, sweep_snapshots

    seconds = older_than * 86400 if older_than > 0 else None

    async def work(log: TrajectoryLog) -> dict[str, Any]:
        expired = await expire(log, seconds) if seconds is not None else []
        freed = await free(log)
        sweep_snapshots(log, _folder(folder).parent / "snapshots")
        return {"expired": expired, **freed._asdict()}

    found = _write(folder, "log_compact", {"older_than": seconds}, work)
    text = f"{len(found['expired'])} expired, {found['segments']} segments freed, {found['bytes']} bytes"
    typer.echo(json.dumps(found) if as_json else text)


@app.command()
def replay(name: str, step: int = typer.Option(-1, help="Only this step."), folder: Path | None = FOLDER) -> None:
    """Print what a trajectory's commands printed, in order, as its program saw it. Nothing runs.

    \b
    Example:
      dsec log replay run-7/sample-3 | less
    """
    from dsec.trajectory.show import steps

    with contextlib.closing(_open(folder)) as log:
        for row in steps(log, _named(log, name), results=True):
            if step not in (-1, row["step"]):
                continue
            typer.echo(f"$ {_asked(row)}")
            for stream in ("stdout", "stderr", "data"):
                output = row.get("result", {}).get(stream) or b""
                sys.stdout.flush()
                sys.stdout.buffer.write(output.encode("utf-8", "replace") if isinstance(output, str) else output)
            if row["state"] != "ended":
                typer.echo(f"[{row['state']}]")


@app.command()
def diff(one: str, other: str, folder: Path | None = FOLDER, as_json: bool = JSON) -> None:
    """The first step in which two trajectories part; exit code 1 if they do.

    \b
    Example:
      dsec log diff run-7/sample-3 run-7/sample-3@main.1
    """
    from dsec.trajectory.show import difference

    with contextlib.closing(_open(folder)) as log:
        left, right = _named(log, one), _named(log, other)
        found = difference(log, left, right)
        if as_json:
            typer.echo(json.dumps(found))
        elif found is None:
            typer.echo(f"the same for {min(len(left.entries), len(right.entries))} steps")
        else:
            typer.echo(f"step {found['step']}, {found['field']}:\n- {found['one']!r}\n+ {found['other']!r}")
        raise typer.Exit(1 if found else 0)
