"""The `dsv4` command.

A command's module imports only typer and the standard library at its top, so that `dsv4 --help` is instant.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import typer

import dsv4

# Module and command, in the order in which a reader meets them.
_NAMES = "serve.serve chat.chat generate.generate train.train train.sft estimate.estimate inspect.inspect doctor.doctor"
COMMANDS: tuple[Callable[..., Any], ...] = tuple(
    getattr(importlib.import_module(f"dsv4.cli.{name.split('.')[0]}"), name.split(".")[1])
    for name in _NAMES.split()
    if importlib.util.find_spec(f"dsv4.cli.{name.split('.')[0]}")
)

app = typer.Typer(
    name="dsv4",
    help="DeepSeek-V4, whole, in Python: estimate, train, inspect, talk to and serve it.",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dsv4 {dsv4.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _help(command: Callable[..., Any]) -> str:
    """The command's docstring, with its example lines kept as they stand (typer would flow them into one paragraph)."""
    paragraphs = re.split(r"\n\s*\n", inspect.getdoc(command) or "")
    return "\n\n".join("\b\n" + p if re.search(r"^\s*(\$ )?dsv4 ", p, re.M) else p for p in paragraphs)


for _command in COMMANDS:
    app.command(_command.__name__, help=_help(_command))(_command)


def main() -> None:
    """Runs a command. A user's mistake is one line on stderr and exit code 2; DSV4_DEBUG=1 shows the traceback."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.TyperException as error:
        message, code = error.format_message(), 2
    except (ValueError, OSError) as error:
        if os.environ.get("DSV4_DEBUG"):
            raise
        message, code = " ".join(str(error).split()) or type(error).__name__, 2
    except (KeyboardInterrupt, typer.Abort):
        message, code = "stopped", 130
    print(f"dsv4: error: {message}", file=sys.stderr)
    sys.exit(code)
