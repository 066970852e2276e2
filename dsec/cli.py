"""The `dsec` command. Other rooms bring their own subcommands (dsec/<room>/cli.py), imported when they are called."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from importlib import import_module
from typing import Any

import typer

from dsec.errors import CommandFailed, DsecError
from dsec.types import ISOLATION, SUBSTRATES, Spec

ROOMS = {
    "serve": ("dsec.api.cli", "The API server: HTTP, the fleet page."),
    "key": ("dsec.api.cli", "A key for a project of the API server."),
    "image": ("dsec.images.cli", "Build, list and move images."),
    "log": ("dsec.trajectory.cli", "Show, verify, replay and compare trajectories."),
    "cluster": ("dsec.cluster.cli", "Many hosts: simulate, start."),
}
"""Subcommand: the module whose `app` it is, and its line of help."""

app = typer.Typer(
    name="dsec",
    help="Sandboxes: function, container, microvm, vm.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.command()
def doctor(
    only: list[str] = typer.Argument(None, help="substrates to try; all by default"),
    seconds: float = typer.Option(90.0, help="deadline for each"),
    as_json: bool = typer.Option(False, "--json", help="for programs"),
) -> None:
    """Starts one sandbox of each kind, and of each runtime behind a kind, and says what is missing.

    Exit code 1 when one that was named does not work.

    Example:

        dsec doctor container
    """
    from dsec.guest.build import home
    from dsec.substrates.base import Probe, load

    async def one(name: str, runtime: str) -> tuple[Probe, int]:
        given = {"runtime": runtime} if runtime else {}
        try:
            substrate = load(name, home())
            probe = await asyncio.wait_for(substrate.probe(**given), seconds)
            test = getattr(substrate, "self_test", None)
            if probe.usable and test is not None:
                await asyncio.wait_for(test(**given), seconds)
            await substrate.close()
            levels = getattr(substrate, "isolation", None)
            return probe, levels(Spec(runtime=runtime)) if runtime and levels else substrate.capabilities.isolation
        except TimeoutError:
            return Probe(False, f"did not start within {seconds:g} s", "a faster machine, or --seconds"), 0
        except DsecError as error:
            return Probe(False, str(getattr(error, "reason", error)), str(getattr(error, "fix", ""))), 0

    async def all_() -> dict[str, tuple[Probe, int]]:
        found = {}
        for name in only or SUBSTRATES:
            for runtime in ("", *getattr(load(name, home()), "runtimes", ())):
                found[f"{name}:{runtime}" if runtime else name] = await one(name, runtime)
        return found

    unknown = [name for name in only or () if name not in SUBSTRATES]
    if unknown:
        fail(f"no substrate {unknown[0]!r}; there are {', '.join(SUBSTRATES)}", 2)
    found = asyncio.run(all_())
    if as_json:
        typer.echo(
            json.dumps({name: {**probe.as_dict(), "isolation": level} for name, (probe, level) in found.items()})
        )
    else:
        for name, (probe, level) in found.items():
            if probe.usable:
                typer.echo(
                    f"{name:20} ok   {probe.seconds * 1000:7.0f} ms  level {level}: {ISOLATION[level]}; {probe.reason}"
                )
            else:
                typer.echo(f"{name:20} no   {probe.reason}" + (f"\n{'':25} fix: {probe.fix}" if probe.fix else ""))
    if only and not all(found[name][0].usable for name in only):  # other runtimes are a choice
        raise typer.Exit(1)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    command: list[str] = typer.Argument(..., help="a command line, or a program and its arguments"),
    substrate: str = typer.Option("container", help=", ".join(SUBSTRATES)),
    image: str = typer.Option("host", help='"host", "debian", "python", or a root folder'),
    timeout: float = typer.Option(300.0, help="seconds"),
    memory: int = typer.Option(1024, help="MiB"),
    cpu: float = typer.Option(1.0, help="cores"),
) -> None:
    """Runs one command in a sandbox of its own and exits with its exit code.

    Example:

        dsec run -- python3 -c "print(6 * 7)"
    """
    from dsec.sandbox import Sandbox

    text: Any = command[0] if len(command) == 1 else command
    box = Sandbox.create(substrate=substrate, image=image, timeout=timeout, memory=memory, cpu=cpu)
    with box:
        out, err = (lambda s: print(s, end="", flush=True)), (lambda s: print(s, end="", file=sys.stderr, flush=True))
        result = box.commands.run(text, timeout=timeout, on_stdout=out, on_stderr=err, check=False)
    raise typer.Exit(result.exit_code)


@app.command()
def ps(
    watch: bool = typer.Option(False, help="refresh every second until interrupted"),
    as_json: bool = typer.Option(False, "--json", help="for programs"),
) -> None:
    """Lists this host's sandboxes.

    Example:

        dsec ps --json
    """
    from dsec.sandbox import Sandbox

    while True:
        infos = Sandbox.list()
        if as_json:
            typer.echo(json.dumps([info.as_dict() for info in infos]))
        else:
            if watch:
                typer.echo("\033[2J\033[H", nl=False)
            typer.echo(f"{'id':22} {'substrate':10} {'image':16} {'state':8} {'age':>7} {'left':>7}  trajectory")
            for info in infos:
                age, left = time.time() - info.created, info.deadline - time.time()
                line = f"{info.id:22} {info.substrate:10} {info.image:16.16} {info.state:8} {age:6.0f}s {left:6.0f}s"
                typer.echo(f"{line}  {info.trajectory or ''}")
        if not watch:
            return
        time.sleep(1)


@app.command()
def edge(stop: bool = typer.Option(False, help="end the Edge that runs, and its sandboxes")) -> None:
    """Runs this host's Edge in the foreground (the SDK starts one by itself when it is needed).

    Example:

        dsec edge
    """
    from dsec.edge.server import serve
    from dsec.guest.build import home

    async def over() -> None:
        from dsec.client import EmbeddedTransport

        transport = EmbeddedTransport(home())
        await transport.call("shutdown", {"destroy": True})
        await transport.close()

    if not stop:
        asyncio.run(serve(home()))
    elif (home() / "edge.sock").exists():
        asyncio.run(over())


def fail(text: str, code: int = 1) -> None:
    """One line on standard error, and the exit."""
    typer.echo(f"dsec: error: {' '.join(text.split())}", err=True)
    raise typer.Exit(code)


def _room(name: str) -> Any:
    module, line = ROOMS[name]

    def command(context: typer.Context) -> None:
        rest = [*context.args]
        try:
            room = import_module(module).app
        except ModuleNotFoundError as error:
            fail(f"{name} is not part of this installation: {error}")
            return
        own = name in [
            command.name or getattr(command.callback, "__name__", "") for command in room.registered_commands
        ]
        prefix, program = ([name], "dsec") if own else ([], f"dsec {name}")
        room(args=prefix + (rest or ([] if own else ["--help"])), prog_name=program, standalone_mode=True)

    command.__doc__ = f"{line}\n\nExample:\n\n    dsec {name} --help\n"
    return command


for _name in ROOMS:
    _settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(_name, context_settings=_settings)(_room(_name))


def main() -> None:
    """Entry point: a user's mistake is one line and an exit code, never a traceback (DSEC_DEBUG=1 shows it)."""
    try:
        app()
    except CommandFailed as error:
        sys.exit(error.result.exit_code)
    except DsecError as error:
        if os.environ.get("DSEC_DEBUG"):
            raise
        fix = f" (fix: {error.fields['fix']})" if error.fields.get("fix") else ""
        typer.echo(f"dsec: error: {' '.join(str(error).split())}{fix}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
