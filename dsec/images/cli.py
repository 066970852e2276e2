"""`dsec image`: build, list, pull, push, remove, verify."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dsec.images.layers import Images

app = typer.Typer(
    help="Images: build from a folder, a tar, an OCI layout or Debian's packages; share them through a store.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
STORE = typer.Option(None, "--store", help="A folder or s3://bucket/prefix?endpoint=... (default: DSEC_STORE).")
JSON = typer.Option(False, "--json", help="JSON, for programs.")


@contextmanager
def _images(store: str | None = None) -> Iterator[Images]:
    """The host's images; an error of theirs ends the command with one line and code 1."""
    from dsec.errors import DsecError
    from dsec.guest.build import home
    from dsec.images.layers import Images

    try:
        yield Images(home(), store)
    except (DsecError, OSError) as problem:
        typer.echo(f"dsec: error: {problem}", err=True)
        raise typer.Exit(1) from None


@app.command()
def build(
    name: str = typer.Argument(help="`debian` and `python` are built from packages; any other needs SOURCE."),
    source: Path | None = typer.Argument(None, help="A root folder, a tar (plain, gz, bz2, xz) or an OCI layout."),
    base: str | None = typer.Option(None, help="Put it on top of this image's layers."),
    role: str | None = typer.Option(None, help="base, workspace or toolkit (default: base, or workspace on a base)."),
    compress: str | None = typer.Option(None, help="lz4 or lz4hc; smaller to send, slower to read."),
) -> None:
    """Build an image.

    \b
    Example:
      dsec image build mytools ./rootfs --base python --role toolkit
    """
    if role not in (None, "base", "workspace", "toolkit"):
        raise typer.BadParameter(f"{role!r} is none of base, workspace, toolkit", param_hint="--role")
    with _images() as images:
        if source is None:
            from dsec.errors import ImageError
            from dsec.images.debian import PACKAGES
            from dsec.images.debian import build as build_debian

            if name not in PACKAGES:
                raise ImageError(f"{name!r} needs a SOURCE; without one: {', '.join(PACKAGES)}")
            build_debian(images, name)
        else:
            images.add(name, source, base, role, compress)  # type: ignore[arg-type]
        for kind, digest, size in images.get(name).layers:
            typer.echo(f"{kind:9} {digest[:12]} {size / 2**20:8.1f} MiB")


@app.command("list")
def list_(as_json: bool = JSON) -> None:
    """The images of this host, and how much of each is here.

    \b
    Example:
      dsec image list
    """
    with _images() as images:
        for name in images.names():
            image = images.get(name)
            row = {
                "name": name,
                "digest": image.digest,
                "bytes": sum(size for _, _, size in image.layers),
                "here": sum(size for _, digest, size in image.layers if images.present(digest)),
                "layers": [{"role": role, "digest": digest, "bytes": size} for role, digest, size in image.layers],
            }
            text = f"{name:24} {image.digest[:12]} {row['bytes'] / 2**20:8.1f} MiB  {len(image.layers)} layers"  # type: ignore[operator]
            typer.echo(json.dumps(row) if as_json else text + ("" if row["here"] == row["bytes"] else "  on demand"))


@app.command()
def push(name: str, store: str | None = STORE) -> None:
    """Put an image into the store; chunks that are there already are not sent.

    \b
    Example:
      dsec image push python --store /mnt/3fs/images
    """
    with _images(store) as images:
        sent = images.push(name, lambda line: typer.echo(line, err=True))
        typer.echo(f"{sent} bytes sent")


@app.command()
def pull(name: str, store: str | None = STORE) -> None:
    """Fetch an image from the store in whole (a sandbox starts without it, and fetches what it reads).

    \b
    Example:
      dsec image pull python
    """
    with _images(store) as images:
        images.pull(name, lambda line: typer.echo(line, err=True))


@app.command()
def rm(name: str) -> None:
    """Remove an image from this host, and the layers no other image uses.

    \b
    Example:
      dsec image rm old/workspace
    """
    with _images() as images:
        typer.echo(f"{len(images.remove(name))} layers deleted")


@app.command()
def verify(name: str) -> None:
    """Check every chunk of an image on this host against its digest; exit code 1 if one differs.

    \b
    Example:
      dsec image verify python
    """
    with _images() as images:
        problems = images.verify(name)
        for problem in problems:
            typer.echo(problem, err=True)
        raise typer.Exit(1 if problems else 0)
