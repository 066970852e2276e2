"""`dsec serve`: the API server, and on one host the Edge behind it."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The API server.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def start_node(home: Path, store: str, name: str = "", listen: str = "", seconds: float = 60.0) -> None:
    """Starts this host's Edge as a member of the cluster unless one runs; it outlives the server.

    Raises RuntimeError with its last words if it does not come up.
    """
    from dsec.cluster.store import open_store

    log = home / "node.log"
    command = [sys.executable, "-m", "dsec.cluster.node", "--home", str(home), "--store", store]
    command += (["--name", name] if name else []) + (["--listen", listen] if listen else [])
    with log.open("ab") as out:
        start = log.stat().st_size
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    end = time.monotonic() + seconds
    while b'"address"' not in (said := log.read_bytes()[start:]):
        if process.poll() is not None or time.monotonic() > end:
            if b"has an Edge already" in said and any(edge.up for edge in open_store(store).edges()):
                return
            raise RuntimeError(f"the Edge did not start: {said.decode(errors='replace').strip()[-500:]}")
        time.sleep(0.02)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 takes a free one")] = 8700,
    store: Annotated[str, typer.Option(help="sqlite:PATH or postgresql://...; default: in the state folder")] = "",
    edge: Annotated[bool, typer.Option(help="also start this host's Edge unless one runs")] = True,
    home: Annotated[Path | None, typer.Option(help="state folder; default DSEC_HOME")] = None,
    ports: Annotated[int, typer.Option(help="port that leads to ports of sandboxes; 0 takes a free one, -1 none")] = 0,
    domain: Annotated[str, typer.Option(help="NAME[:PORT] below which every name leads there (wildcard DNS)")] = "",
    tls_cert: Annotated[Path | None, typer.Option(help="certificate chain (PEM): both listeners speak TLS")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its private key (PEM), unless the chain's file has it")] = None,
) -> None:
    """Serves sandboxes over HTTP: the SDK (DSEC_URL, DSEC_API_KEY), curl, and the fleet page at /.

    The first start makes the project "default" and prints an administrator's key, once.

    \b
    Example:
      dsec serve --port 8700
    """
    import uvicorn

    from dsec.api.app import make_app
    from dsec.api.ports import Ports
    from dsec.api.service import Service, new_key
    from dsec.cluster.store import Project, open_store
    from dsec.guest.build import home as default_home

    tls = None
    if tls_cert or tls_key:
        if tls_cert is None:
            raise typer.BadParameter("--tls-key needs --tls-cert")
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(tls_cert, tls_key)
        except OSError as error:  # ssl.SSLError is one
            text = f"no certificate with its key in {tls_cert}, {tls_key or tls_cert}: {error}"
            raise typer.BadParameter(text) from None
    folder = home or default_home()
    folder.mkdir(parents=True, exist_ok=True)
    url = store or f"sqlite:{folder / 'cluster.db'}"
    opened = open_store(url)
    if not opened.projects():
        opened.put_project(Project("default", max_live=100_000))
        typer.echo(f"administrator's key, shown once: {new_key(opened, 'default', 'first', admin=True)}")
    if edge:
        start_node(folder, url)
    service = Service(opened, os.environ.get("DSEC_TOKEN", ""))
    typer.echo(f"fleet page and API on http{'s' if tls else ''}://{host}:{port}")
    uvicorn.run(
        make_app(service, Ports(service, host, ports, domain, tls) if ports >= 0 else None),
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,  # else each line is made, and then dropped for its level
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,  # longer than the SDK keeps a connection, so that it never asks on one just closed
    )


@app.command()
def key(
    project: Annotated[str, typer.Argument(help="project; made if there is none of that name")],
    store: Annotated[str, typer.Option(help="sqlite:PATH or postgresql://...")] = "",
    admin: Annotated[bool, typer.Option(help="may see the fleet and make projects")] = False,
    weight: Annotated[float, typer.Option(help="share under load")] = 1.0,
    max_live: Annotated[int, typer.Option(help="sandboxes at once")] = 1000,
) -> None:
    """Makes a project and prints a new key for it.

    \b
    Example:
      dsec key team-a --max-live 500
    """
    from dsec.api.service import new_key
    from dsec.cluster.store import Project, open_store
    from dsec.guest.build import home as default_home

    opened = open_store(store or f"sqlite:{default_home() / 'cluster.db'}")
    if project not in {each.name for each in opened.projects()}:
        opened.put_project(Project(project, weight, max_live))
    typer.echo(new_key(opened, project, admin=admin))
