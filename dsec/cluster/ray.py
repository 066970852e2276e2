"""One Edge per node of a Ray cluster. Ray brings membership, placement and restart; it never hears of a sandbox.

Nodes that declare the resource `dsec_slots` (``ray start --resources='{"dsec_slots": 400}'``) get an Edge of that many
sandboxes; if none does, every node gets one. The Edge is a process of its own beside a small detached actor: a Ray
worker that is killed, or a driver that ends, takes no sandbox with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMESPACE = "dsec"
RESOURCE = "dsec_slots"


class EdgeActor:
    """Starts this node's Edge, or finds the one that runs, and watches over it."""

    def __init__(self, store: str, name: str, zone: str, home: str, port: int, slots: int, token: str) -> None:
        self._command = [sys.executable, "-m", "dsec.cluster.node", "--store", store, "--name", name, "--zone", zone]
        self._home = Path(home or os.environ.get("DSEC_HOME", "/var/lib/dsec"))
        self._command += ["--home", str(self._home)]
        self._env = dict(os.environ)
        if token:
            self._command += ["--listen", f"{socket.gethostbyname(socket.gethostname())}:{port}"]
            self._env["DSEC_TOKEN"] = token
        if slots:
            self._env["DSEC_MAX_LIVE"] = str(slots)
        self._process: subprocess.Popen[bytes] | None = None
        self.ensure()

    def ensure(self) -> dict[str, Any]:
        """Starts the Edge unless it runs -> {"pid", "alive", "log"}."""
        if self._process is None or self._process.poll() is not None:
            self._home.mkdir(parents=True, exist_ok=True, mode=0o711)
            with (self._home / "node.log").open("ab") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._env,
                    start_new_session=True,
                )
            with suppress(PermissionError):  # Ray's workers run at nice 15, and an Edge is no background job
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 0)
        return self.status()

    def status(self) -> dict[str, Any]:
        assert self._process is not None
        return {"pid": self._process.pid, "alive": self._process.poll() is None, "home": str(self._home)}

    def stop(self, seconds: float = 20.0) -> bool:
        """Ends the Edge. Its sandboxes live on until it is back or their lease is over."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return True


def nodes(listed: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(node id, host name, slots) of the nodes that are to have an Edge, from ``ray.nodes()``."""
    alive = [node for node in listed if node["Alive"]]
    chosen = [node for node in alive if node["Resources"].get(RESOURCE)] or alive
    return [(n["NodeID"], n["NodeManagerHostname"], int(n["Resources"].get(RESOURCE, 0))) for n in chosen]


def up(
    store: str, token: str = "", home: str = "", port: int = 8701, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """One detached actor `edge-<node id>` per node, made or found -> what each says. Run it again after nodes joined.

    Raises ImportError without Ray, ValueError for a store that only one host can see.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False)
    wanted = nodes(ray.nodes())
    if len(wanted) > 1 and not store.startswith("postgres"):
        raise ValueError(f"{len(wanted)} nodes need one PostgreSQL store, not {store!r}")
    remote: Any = ray.remote(EdgeActor)
    actors = {}
    for id, host, slots in wanted:
        options = {
            "name": f"edge-{id}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_restarts": -1,
            "num_cpus": 0,
            "resources": {RESOURCE: slots} if slots else None,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=id, soft=False),
        }
        actors[host] = remote.options(**options).remote(store, f"{host}-{id[:8]}", "", home, port, slots, token)
    found = {host: ray.get(actor.ensure.remote(), timeout=120) for host, actor in actors.items()}
    for host, status in found.items():
        say(f"{host}: Edge {status['pid']} in {status['home']}")
    return found


def down(seconds: float = 30.0) -> int:
    """Ends all Edges and their actors -> how many there were."""
    import ray

    if not ray.is_initialized():
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False)
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]
    for name in names:
        actor = ray.get_actor(name, namespace=NAMESPACE)
        ray.get(actor.stop.remote(), timeout=seconds)
        ray.kill(actor)
    time.sleep(0.1)
    return len(names)
