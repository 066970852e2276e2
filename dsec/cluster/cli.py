"""`dsec cluster`: simulate a cluster, watch one, start one."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsec.cluster.simulator import World

app = typer.Typer(
    help="Many hosts: simulate, start.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def simulate(
    live: Annotated[int, typer.Option(help="sandboxes live at once")] = 3000,
    hosts: Annotated[int, typer.Option(help="hosts")] = 40,
    minutes: Annotated[float, typer.Option(help="virtual minutes after the ramp")] = 12.0,
    life: Annotated[float, typer.Option(help="mean seconds that a sandbox lives")] = 240.0,
    faults: Annotated[str, typer.Option(help="faults by name, with commas; all; none")] = "all",
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
    figure: Annotated[str, typer.Option(help="PNG of the run: who runs, who waits, which hosts answer")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="the result as JSON")] = False,
) -> None:
    """Plays a cluster with faults on a virtual clock, around the real placement, lease, watcher and store code.

    Exits with 1 if any property was violated: no double run, no leak, one end for every create, hosts settled within
    the lease's ttl, no client turned away for long while there is room, books that add up, caps.

    \b
    Examples:
      dsec cluster simulate                                                 a minute
      dsec cluster simulate --live 300000 --hosts 2000 --life 1000 --json
    """
    from dsec.cluster.simulator import FAULTS, Scene, record, table
    from dsec.cluster.simulator import simulate as play

    chosen = FAULTS if faults == "all" else () if faults == "none" else tuple(faults.split(","))
    if unknown := set(chosen) - {*FAULTS, "amnesia"}:
        raise typer.BadParameter(f"no fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}, amnesia")
    started, worked = time.monotonic(), time.process_time()
    begin, total = 1000.0, 30 + life / 2 + 60 * minutes + 440

    def watch(world: World) -> None:
        share = min(1.0, (world.clock.time - begin) / total)
        left = (time.monotonic() - started) * (1 - share) / max(share, 1e-9)
        typer.echo(
            f"\r{world.clock.time - begin:7.0f} s of {total:.0f}  {len(world.rows):>9,} live  {world.done:>10,} done "
            f" violations: {dict(world.violations) or 'none'}  ETA {left:5.0f} s ",
            nl=False,
            err=True,
        )

    scene = Scene(live=live, hosts=hosts, minutes=minutes, life=life, faults=chosen, seed=seed)
    world = play(scene, watch, lambda violation: typer.echo(f"\n{violation}", err=True))
    typer.echo("", err=True)
    worked = time.process_time() - worked
    if figure:
        from dsec.cluster.figure import draw

        draw(world, figure)
    if as_json:
        typer.echo(json.dumps(record(world, worked), indent=1))
    else:
        for name, value in table(world, worked):
            typer.echo(f"{name:34}{value}")
    if world.violations:
        raise typer.Exit(1)


@app.command()
def up(
    store: Annotated[str, typer.Option(help="postgresql://... (sqlite:PATH for a single node)")],
    ray: Annotated[bool, typer.Option("--ray", help="one Edge per node of the running Ray cluster")] = False,
    home: Annotated[str, typer.Option(help="state folder on each node; default DSEC_HOME there")] = "",
    port: Annotated[int, typer.Option(help="port of the Edges")] = 8701,
) -> None:
    """Starts one Edge on every node of a cluster; DSEC_TOKEN is the secret between API servers and Edges.

    For Kubernetes apply the manifest that comes with the package, dsec/cluster/kubernetes.yaml.

    \b
    Example:
      dsec cluster up --ray --store postgresql://dsec@db/dsec
    """
    import os

    if not ray:
        raise typer.BadParameter("only --ray is there; for Kubernetes apply dsec/cluster/kubernetes.yaml")
    try:
        from dsec.cluster.ray import up as start

        start(store, os.environ.get("DSEC_TOKEN", ""), home, port, typer.echo)
    except ImportError as error:
        raise typer.BadParameter(f"Ray is missing ({error}): pip install 'dsv4[ray]'") from None
    except (ValueError, ConnectionError) as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def down() -> None:
    """Ends the Edges that `up --ray` started; their sandboxes end with their leases.

    \b
    Example:
      dsec cluster down
    """
    from dsec.cluster.ray import down as stop

    typer.echo(f"{stop()} Edges ended")
