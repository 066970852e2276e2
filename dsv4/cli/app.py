"""The `dsv4` command.

A command's module imports only typer and the standard library at its top, so that `dsv4 --help` is instant.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from inspect import getdoc
from typing import Any

import typer

import dsv4
from dsv4.cli.chat import chat
from dsv4.cli.convert import convert
from dsv4.cli.doctor import doctor
from dsv4.cli.estimate import estimate
from dsv4.cli.generate import generate
from dsv4.cli.inspect import inspect
from dsv4.cli.serve import serve
from dsv4.cli.train import sft, train

# In the order in which a reader meets them.
COMMANDS: tuple[Callable[..., Any], ...] = (serve, chat, generate, train, sft, estimate, inspect, convert, doctor)

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
    paragraphs = re.split(r"\n\s*\n", getdoc(command) or "")
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
