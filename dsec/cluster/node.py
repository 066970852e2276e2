"""An Edge in a cluster: the host's `Edge` with a `Member` beside it, serving API servers by cluster ids.

`dsec serve` and `dsec cluster up` start it; by hand it is `python -m dsec.cluster.node --store URL`. It takes the same
lock as an Edge that serves the SDK on its own, so a folder has one Edge. Everything passes `call` and `stream`, which
look at the lease first: an Edge that lost it answers nothing, destroys its sandboxes and joins anew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hmac
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from dsec.cluster.clock import RealClock
from dsec.cluster.errors import StoreUnavailable
from dsec.cluster.leases import Terms
from dsec.cluster.member import Member, end_state
from dsec.cluster.store import Budget, Row, Store, open_store
from dsec.cluster.store import Edge as Place
from dsec.edge.box import Box
from dsec.edge.edge import Edge
from dsec.edge.server import Server, receive
from dsec.errors import DsecError, Forbidden, NotFound
from dsec.guest.build import home as default_home
from dsec.guest.streams import Stream
from dsec.types import SandboxInfo, Spec

LABEL = "dsec.id"
"""Key of a sandbox's metadata under which the Edge keeps the cluster's id, so that a restart finds it again."""
USUAL = {"function": 0.5, "container": 1.0, "microvm": 5.0, "vm": 60.0}
"""Seconds of a start that is not slow, under load."""
PROCESSES = 8
"""Processes of the host's pid space that a sandbox is expected to use (its limit is `Spec.pids`)."""


def capacity(edge: Edge) -> Budget:
    """What this host offers: its memory and pid space less what the host keeps, processor time 16-fold (in RL, 90 % of
    sandboxes use less than 5 % of what they asked for)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    pids = int(Path("/proc/sys/kernel/pid_max").read_text()) if Path("/proc/sys/kernel/pid_max").exists() else 32768
    cpu = 16_000 * (os.cpu_count() or 1)
    overcommit = float(os.environ.get("DSEC_OVERCOMMIT", "8"))
    return Budget(edge.max_live, round(memory * 0.9 * overcommit), cpu, pids * 3 // 4)


def pressure() -> float:
    """Share of the last 10 s in which everything stood still for want of memory or disk (0 to 1), as the kernel tells.
    Waiting for a processor is no reason to start less: sandboxes wait for each other all day."""
    worst = 0.0
    for name in ("memory", "io"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            full = Path(f"/proc/pressure/{name}").read_text().split("full ", 1)[1]
            worst = max(worst, float(full.split("avg10=")[1].split()[0]) / 100)
    return worst


LOOK = 30.0
"""Seconds between two comparisons with the store. A row that no server asked for ends within two of them."""


class Node:
    """Serves `call` and `stream` like an Edge, with the cluster's ids in place of the Edge's own."""

    def __init__(self, edge: Edge, store: Store, place: Place, terms: Terms | None = None) -> None:
        self.edge, self.terms, self.place = edge, terms or Terms(), place
        self.member = Member(store, RealClock(), place, self.terms)
        self.boxes: dict[str, Box] = {}
        self._starting: dict[str, asyncio.Task[SandboxInfo]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Adopts what an earlier process of this host left, if its lease still stands, and joins."""
        kept: dict[str, Budget] = {}
        for box in self.edge.boxes.values():
            if (id := box.spec.metadata.get(LABEL)) and box.state in ("running", "paused"):
                self.boxes[id] = box
                kept[id] = budget_of(box.spec)
        await asyncio.to_thread(self.member.join, kept)
        for work, seconds in ((self._beat, self.terms.renew), (self._tidy, 1.0), (self._look, LOOK)):
            self._tasks.append(asyncio.create_task(self._often(work, seconds)))

    async def stop(self, destroy: bool = False) -> None:
        for task in self._tasks:
            task.cancel()
        if destroy:
            await self._destroy(dict.fromkeys(self.member.running, "stopped"))
            await asyncio.to_thread(self.member.flush)
        await self.edge.stop(destroy)

    async def _often(self, work: Any, seconds: float) -> None:
        while True:
            try:
                await work()
            except (DsecError, OSError) as error:
                print(f"{self.place.id}: {type(error).__name__}: {error}", flush=True)
            await asyncio.sleep(seconds)

    def _commit_time(self) -> float:
        """Seconds that a commit on the log's disk takes now: what the next command waits for, twice."""
        path = self.edge.home / "log" / ".probe"
        path.parent.mkdir(exist_ok=True)
        began = time.monotonic()
        with path.open("wb") as probe:
            probe.write(b"\0" * 512)
            probe.flush()
            os.fdatasync(probe.fileno())
        return time.monotonic() - began

    async def _steps(self, id: str) -> dict[str, Any]:
        """The trajectory of a sandbox, for the fleet page."""
        from dsec.trajectory.log import LogReader
        from dsec.trajectory.show import steps

        spec = self.boxes[id].spec
        if spec.trajectory is None:
            return {"steps": []}

        def read() -> list[dict[str, Any]]:
            log = LogReader(self.edge.home / "log")
            try:
                return list(steps(log, log.branch(str(spec.trajectory), spec.branch), results=True))
            finally:
                log.close()

        return {"steps": await asyncio.to_thread(read)}

    async def _beat(self) -> None:
        """Renews; or, the lease being over, destroys everything before it joins anew. Between two renewals nothing
        may outlive the lease either: the next one is due long before (2 * renew <= fence)."""
        self.member.notes = {"log_lag": await asyncio.to_thread(self._commit_time)}
        doomed = await asyncio.to_thread(self.member.heartbeat, pressure())
        if not doomed and self.member.lease.left() <= 0:  # it ended after the heartbeat had looked
            doomed = list(self.member.running)
        if doomed or self.member.lease.left() <= 0:
            await self._destroy(dict.fromkeys(doomed, "lost"))
            await asyncio.to_thread(self.member.join)

    async def _tidy(self) -> None:
        """Notices what ended by itself, and tells the store."""
        for id in list(self.member.running):
            box = self.boxes.get(id)
            if id not in self._starting and (box is None or box.state in ("dead", "failed")):
                reason = box.reason if box else "vanished"
                state = "expired" if "time was over" in reason else "stopped" if reason == "killed" else "failed"
                self._ended(id, state, reason)
        await asyncio.to_thread(self.member.flush)

    async def _look(self) -> None:
        await self._destroy(await asyncio.to_thread(self.member.reconcile))

    def _ended(self, id: str, state: str, reason: str) -> None:
        self.boxes.pop(id, None)
        self.member.ended(id, state, reason)

    async def _destroy(self, ids: Mapping[str, str]) -> None:
        async def one(id: str, reason: str) -> None:
            if starting := self._starting.get(id):
                await asyncio.wait([starting])
            if box := self.boxes.get(id):
                await self.edge.call("kill", {"id": box.id})
            self._ended(id, end_state(reason), reason)

        await asyncio.gather(*(one(id, reason) for id, reason in ids.items()))

    # What API servers call

    async def call(self, op: str, args: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        if op == "cluster.start":
            return await self.begin(Row(**args["row"] | {"budget": Budget(**args["row"]["budget"])}))
        if op == "cluster.stop":
            return await self._stop(args["id"], args.get("reason", "killed"), args.get("notice", 0.0)), b""
        if op == "cluster.steps":
            return await self._steps(args["id"]), b""
        self.member.lease.check()
        answer, out = await self.edge.call(op, self._inward(args), data)
        self.member.lease.check()  # it may have taken long
        if answer.get("id") in self.edge.boxes and "id" in args:
            answer = answer | {"id": args["id"]}
        return answer, out

    async def stream(self, op: str, args: dict[str, Any]) -> AsyncIterator[tuple[str, bytes]]:
        self.member.lease.check()
        async for event in self.edge.stream(op, self._inward(args)):
            self.member.lease.check()
            yield event

    async def tunnel(self, id: str, port: int) -> Stream:
        """A connection to a port of the sandbox; it ends with the sandbox, as that does with the lease."""
        self.member.lease.check()
        return await self.edge.tunnel(self._inward({"id": id})["id"], port)

    def _inward(self, args: dict[str, Any]) -> dict[str, Any]:
        if "id" not in args:
            return args
        if args["id"] not in self.boxes:
            raise NotFound(f"no sandbox {args['id']!r}")
        return args | {"id": self.boxes[args["id"]].id}

    async def begin(self, row: Row) -> tuple[dict[str, Any], bytes]:
        """Starts a sandbox once, however often it is asked to -> its info and the number of the report that counts it.

        Raises Capacity or Fenced when it was not started and will not be.
        """
        spec = Spec.from_dict(dict(row.spec))
        warm = spec.trajectory is None and row.id not in self.boxes and self.edge.pool.has(spec)
        counted = self.member.admit(row, warm)
        resumed = row.id in self.boxes and bool(row.spec.get("trajectory"))  # its log goes back to the beginning
        if (row.id not in self.boxes or resumed) and row.id not in self._starting:
            self._starting[row.id] = asyncio.create_task(self._start(row, spec))
        if row.id in self._starting:
            info = await asyncio.shield(self._starting[row.id])
        else:
            info = self.boxes[row.id].info()
        return {"info": info.as_dict() | {"id": row.id, "host": self.place.id}, "counted": counted, "warm": warm}, b""

    async def _start(self, row: Row, spec: Spec) -> SandboxInfo:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            key = None if spec.trajectory else row.id  # a trajectory finds its sandbox by itself
            spec = spec.but(idempotency_key=key, metadata={**spec.metadata, LABEL: row.id})
            info = await self.edge.op_create(spec)
            self.boxes[row.id] = self.edge.boxes[info.id]
            self.member.images.add(spec.image)
            self.member.rate.record((loop.time() - began) / USUAL[spec.substrate])
            return info
        except BaseException as error:
            if row.id not in self.boxes:
                self.member.ended(row.id, "failed", f"{type(error).__name__}: {error}"[:500])
                await asyncio.to_thread(self.member.flush)  # whoever hears of the failure finds it in the store
            raise
        finally:
            del self._starting[row.id]

    async def _stop(self, id: str, reason: str, notice: float) -> dict[str, Any]:
        """``notice``: seconds after which a preempted sandbox goes; its trajectory keeps its files."""
        if self.member.refuse(id):
            return {"killed": False}
        if notice:
            end = asyncio.get_running_loop().time() + notice
            with contextlib.suppress(DsecError):  # it has no trajectory, or the log says why there is no snapshot
                await self.edge.call("preempt", {"id": self.boxes[id].id, "notice": notice})
            await asyncio.sleep(max(0.0, end - asyncio.get_running_loop().time()))
        await self._destroy({id: reason})
        with contextlib.suppress(StoreUnavailable):
            await asyncio.to_thread(self.member.flush)
        return {"killed": True}


def budget_of(spec: Spec) -> Budget:
    """What a sandbox takes of its host."""
    return Budget(1, spec.memory, round(spec.cpu * 1000), min(spec.pids, PROCESSES))


class Door(Server):
    """The Edge's server on TCP: the first message must hold the cluster's secret."""

    def __init__(self, node: Node, path: Path, token: str) -> None:
        super().__init__(node, path)  # type: ignore[arg-type]
        self._token = token

    async def listen(self, host: str, port: int) -> int:
        """Serves TCP -> the port (0 asks for a free one)."""
        if not self._token:
            raise ValueError("an Edge that listens on TCP needs a token (DSEC_TOKEN)")
        self._tcp = await asyncio.start_server(self._knock, host, port)
        return int(self._tcp.sockets[0].getsockname()[1])

    async def _knock(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                head, _ = await receive(reader)
            if not hmac.compare_digest(str(head.get("auth")).encode(), self._token.encode()):
                raise Forbidden("wrong token")
        except (asyncio.IncompleteReadError, OSError, TimeoutError, ValueError, AttributeError, DsecError):
            writer.close()
            return
        await self._client(reader, writer)


async def serve(home: Path, store: str, name: str, zone: str, listen: str, token: str) -> None:
    """Runs until told to stop. Raises ValueError when this folder has an Edge already."""
    lock = open(home / "edge.lock", "w")  # noqa: SIM115 - held as long as the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"{home} has an Edge already") from None
    edge = Edge(home, name)
    await edge.start()
    place = Place(name, zone, f"unix:{home / 'edge.sock'}", capacity(edge))
    node = Node(edge, open_store(store), place)
    door = Door(node, home / "edge.sock", token)
    if listen:
        host, _, port = listen.rpartition(":")
        port = str(await door.listen(host, int(port)))
        public = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
        node.member.lease.edge = Place(name, zone, f"tcp:{public}:{port}", place.capacity)
    await node.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, door.over.set)
    print(json.dumps({"edge": name, "address": node.member.lease.edge.address}), flush=True)
    await door.run()
    lock.close()


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop where it is installed (uvicorn's "standard" extra brings it), else asyncio's own."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop


def main() -> None:
    """`python -m dsec.cluster.node --store URL [--listen HOST:PORT]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--store", required=True)
    parser.add_argument("--name", default=socket.gethostname())
    parser.add_argument("--zone", default="")
    parser.add_argument("--listen", default="", help="HOST:PORT for API servers on other hosts; needs DSEC_TOKEN")
    given = parser.parse_args()
    home = given.home or default_home()
    home.mkdir(parents=True, exist_ok=True)
    token = os.environ.get("DSEC_TOKEN", "")
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(serve(home, given.store, given.name, given.zone, given.listen, token))


if __name__ == "__main__":
    main()
