"""What the API server does, without HTTP: who may, where it is, what it costs; the rest is the Edge's.

Nothing here outlives a crash but in the store. Bytes of commands and files pass through and are not kept.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar
from urllib.parse import urlencode

from dsec.cluster.clock import RealClock
from dsec.cluster.control import Control, Order, Reservation
from dsec.cluster.errors import StoreUnavailable
from dsec.cluster.leases import Terms
from dsec.cluster.link import Ends, Link, Unreachable
from dsec.cluster.node import LABEL, budget_of
from dsec.cluster.placement import Refusal
from dsec.cluster.store import Key, Project, Row, Store
from dsec.cluster.watcher import Watcher
from dsec.errors import (
    Capacity,
    DsecError,
    Forbidden,
    InvalidRequest,
    NotFound,
    Preempted,
    SandboxFailed,
    StateLost,
    SubstrateUnavailable,
)
from dsec.types import SandboxInfo, Spec, page

T = TypeVar("T")
Answer = tuple[dict[str, Any], bytes]
NOTICE = 10.0
"""Seconds between the notice of a preemption and the end."""
HOT = 2.0
"""Seconds for which a server believes what it read of a key or a sandbox."""
EDGE_OPS = frozenset(
    "connect info kill get_host set_timeout pause resume metrics snapshot log_snapshot fork call commands.run"
    " commands.start commands.list commands.kill commands.send_stdin commands.resize files.read files.write files.list"
    " files.get_info files.remove files.rename files.make_dir files.watch files.url files.watched".split()
)
STREAMS = frozenset({"commands.run", "commands.connect"})
NOWHERE = 1e18
"""The deadline of a paused sandbox: its clock stands still."""


def digest(token: str) -> str:
    """What is kept of an API key. Keys are 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_key(store: Store, project: str, name: str = "", admin: bool = False) -> str:
    """A new API key; this is the only time that it can be read."""
    token = "dsec_" + secrets.token_urlsafe(32)
    store.put_key(Key(digest(token), project, name, admin))
    return token


class Memory(OrderedDict[str, tuple[float, Any]]):
    """A small cache whose entries are believed for `HOT` seconds."""

    def fresh(self, name: str) -> Any:
        when, value = self.get(name, (0.0, None))
        return value if time.monotonic() - when < HOT else None

    def put(self, name: str, value: Any, limit: int = 100_000) -> None:
        self[name] = (time.monotonic(), value)
        self.move_to_end(name)
        if len(self) > limit:
            self.popitem(last=False)


class Service:
    """Call `start` in the event loop; `close` when done."""

    def __init__(
        self, store: Store, token: str = "", wait: float = 60.0, patience: float = 120.0, terms: Terms | None = None
    ) -> None:
        """``wait``: seconds a create may wait for room; ``patience``: seconds an Edge may take for a start."""
        self.store, self.wait, self.patience = store, wait, patience
        self.control = Control(store, RealClock())
        self.watcher = Watcher(store, RealClock(), terms or Terms())
        self.started = self.refused = self.exec = 0
        self.latencies: list[float] = []
        self.ports: Any = None
        """What forwards ports of sandboxes, if this server does (dsec.api.ports)."""
        self._token, self._secret = token, ""
        self._thread = ThreadPoolExecutor(1, "dsec-control")  # `Control` is not for two threads at once
        self._readers = ThreadPoolExecutor(4, "dsec-store")
        self._links: dict[str, Link] = {}
        self._rows, self._keys = Memory(), Memory()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        self._secret = await self._read(self.store.secret, "ports")
        await self._control(self.control.refresh)
        for work, seconds in ((self._refresh, 1.0), (self._pump, 0.05), (self._watch, 1.0)):
            self._spawn(self._often(work, seconds))

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links.values():
            await link.close()
        self._thread.shutdown()
        self._readers.shutdown()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _often(self, work: Callable[[], Any], seconds: float) -> None:
        while True:
            try:
                await work()
            except DsecError as error:
                print(f"{type(error).__name__}: {error}", flush=True)
            await asyncio.sleep(seconds)

    async def _control(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def _read(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *arguments)

    async def _refresh(self) -> None:
        await self._control(self.control.refresh)

    async def _pump(self) -> None:
        if self.control.queue:
            self._take(await self._control(lambda: list(self.control.pump())))

    async def _watch(self) -> None:
        await self._read(self.watcher.tick)

    # Who

    async def who(self, token: str) -> Key:
        """Raises Forbidden unless the key is known."""
        name = digest(token)
        key: Key | None = self._keys.fresh(name)
        if key is None:
            key = await self._read(self.store.key, name)
            if key is None:
                raise Forbidden("no such API key")
            self._keys.put(name, key)
        return key

    # Creating

    async def create(
        self, project: str, spec: Spec, priority: int = 0, pin: str = "", wait: float | None = None
    ) -> SandboxInfo:
        """Waits its turn for room, then starts it. Raises Capacity, QuotaExceeded, and what the Edge raises."""
        pin = pin or await self._home_of(project, spec)
        run = f"{spec.trajectory}@{spec.branch}" if spec.trajectory else ""
        key = spec.idempotency_key or ""
        inner = {"trajectory": spec.trajectory and f"{project}/{spec.trajectory}", "idempotency_key": None}
        data = spec.as_dict() | inner
        order = Order(
            project,
            budget_of(spec),
            spec.image,
            spec.timeout,
            priority,
            run,
            key,
            hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(),
            data,
            pin,
        )
        began = time.monotonic()
        ticket: asyncio.Future[SandboxInfo] = asyncio.get_running_loop().create_future()
        answers = await self._control(lambda: list(self.control.submit(order, ticket)))
        if priority > 0 and not any(each is ticket for each, _, _ in answers):
            self._spawn(self._make_room(order))
        self._take(answers)
        try:
            info = await asyncio.wait_for(ticket, self.wait if wait is None else wait)
        except TimeoutError:
            self.refused += 1
            raise Capacity(f"no room within {self.wait if wait is None else wait:g} s", retry=5.0) from None
        except DsecError:
            self.refused += 1
            raise
        self.started += 1
        self.latencies = [*self.latencies[-999:], time.monotonic() - began]
        return info

    async def _home_of(self, project: str, spec: Spec) -> str:
        """The one Edge that can make it, if there is one: it has the snapshot, or the trajectory's log."""
        if spec.image.startswith("snapshot:"):
            name = spec.image.partition(":")[2]
            edge = await self._read(self.store.snapshot, name, project)
            if edge is None:
                raise NotFound(f"no snapshot {name!r}")
            return edge
        if spec.image.startswith("/"):
            raise Forbidden("a path names a folder of the host; name an image instead")
        if spec.trajectory:
            last = await self._read(self.store.last_of_run, project, f"{spec.trajectory}@{spec.branch}")
            if last:
                home = self.control.edges.get(last.edge)
                if home is None or not home.up:
                    raise StateLost(f"the log of {spec.trajectory!r} is on {last.edge}, which is away", step=0)
                return last.edge
        return ""

    async def _make_room(self, order: Order) -> None:
        for row in await self._control(self.control.make_room, order):
            args = {"id": row.id, "reason": "preempted", "notice": NOTICE}
            self._spawn(self._quietly(self._link(row.edge).call("cluster.stop", args)))

    def aside(self, work: Any) -> None:
        """Does it without anybody waiting."""
        self._spawn(self._quietly(work))

    async def _quietly(self, work: Any) -> None:
        """For what the Edge finds out by itself if it does not hear of it now."""
        try:
            await work
        except DsecError as error:
            print(f"{type(error).__name__}: {error}", flush=True)

    def _take(self, answers: Iterable[tuple[Any, Order, Reservation | DsecError]]) -> None:
        for ticket, _, answer in answers:
            if not isinstance(answer, DsecError):
                self._spawn(self._dispatch(answer, ticket))
            elif not ticket.done():
                ticket.set_exception(answer)

    async def _dispatch(self, reservation: Reservation, ticket: asyncio.Future[SandboxInfo]) -> None:
        """Brings a row to its Edge, or to another one when that says no."""
        try:
            while True:
                row = reservation.row
                if row.ended is not None:
                    raise gone(row)
                try:
                    args = {"row": row.as_dict()}
                    answer, _ = await self._link(row.edge).call("cluster.start", args, timeout=self.patience)
                    break
                except Unreachable as error:
                    await self._control(self.control.abandon, reservation)
                    raise Capacity(f"{row.edge} did not answer; the create was given up", retry=5.0) from error
                except DsecError as error:
                    if "full" not in error.fields and type(error).__name__ != "Fenced":
                        await self._control(self.control.placement.settle, row.id, None)
                        raise
                    other = await self._control(self.control.refused, reservation, bool(error.fields.get("full")))
                    if isinstance(other, Refusal):
                        self.control.again(reservation.order, ticket)
                        return
                    reservation = other
        except DsecError as error:
            if not ticket.done():
                ticket.set_exception(error)
            return
        self._rows.put(row.id, row)
        self._thread.submit(self.control.started, reservation, answer["counted"], answer["warm"])
        if not ticket.done():
            ticket.set_result(SandboxInfo(**outward(answer["info"])))
        elif not reservation.order.key and reservation.fresh:  # nobody waits for it, and nobody can ask for it again
            await self._quietly(self._link(row.edge).call("cluster.stop", {"id": row.id, "reason": "stopped"}))

    # Using

    def _link(self, edge: str) -> Link:
        known = self.control.edges.get(edge)
        if known is None:
            raise Unreachable(f"no Edge {edge!r}")
        if known.address not in self._links:
            self._links[known.address] = Link(known.address, self._token)
        return self._links[known.address]

    async def row(self, project: str | None, id: str) -> Row:
        """Raises NotFound, also for another project's id (None: whosesoever it is); Preempted or SandboxFailed for one
        that ended so."""
        row: Row | None = self._rows.fresh(id)
        if row is None:
            row = await self._read(self.store.get, project, id)
            if row is None:
                raise NotFound(f"no sandbox {id!r}")
            self._rows.put(id, row)
        if project is not None and row.project != project:
            raise NotFound(f"no sandbox {id!r}")
        if row.ended is not None:
            raise gone(row)
        return row

    async def call(self, project: str, op: str, args: dict[str, Any], data: bytes = b"") -> Answer:
        """One operation of the SDK. Raises DsecError."""
        if op == "create":
            spec = args["spec"] if isinstance(args.get("spec"), dict) else {}
            return (await self.create(project, Spec.from_dict(spec))).as_dict(), b""
        if op == "list":
            found = await self.listing(project, args.get("metadata"), args.get("state"))
            return page([SandboxInfo(**each) for each in found], args.get("limit"), args.get("next_token")), b""
        if op == "list_snapshots":
            return {"snapshots": await self._read(self.store.snapshots, project)}, b""
        if op == "delete_snapshot":
            return await self.delete_snapshot(project, str(args.get("snapshot"))), b""
        if op not in EDGE_OPS or not isinstance(args.get("id"), str):
            raise NotFound(f"no operation {op!r} of a sandbox")
        row = await self.row(project, args["id"])
        if op == "fork":
            return {"forks": await self.fork(project, row, args.get("count", 1), args.get("timeout"))}, b""
        if op == "kill":
            return await self.kill(row), b""
        if op == "files.url":
            return {"url": self.url(row, args)}, b""
        if op == "get_host":
            return {"host": await self.host(row, args.get("port"))}, b""
        if op == "commands.run":
            self.exec += 1
        try:
            answer, out = await self._link(row.edge).call(op, args, data)
        except NotFound:
            self._rows.pop(row.id, None)
            await self.row(project, row.id)  # says how it ended, if it did
            raise
        if op in ("pause", "resume", "set_timeout", "connect"):
            paused = answer["state"] == "paused"
            state, deadline = ("paused", NOWHERE) if paused else ("live", answer["deadline"])
            await self._read(self.store.change, row.id, state, "", deadline)
        if op in ("snapshot", "log_snapshot"):
            await self._read(self.store.put_snapshot, answer["snapshot"], project, row.edge)
        return outward(answer), out

    async def stream(self, project: str, op: str, args: dict[str, Any]) -> AsyncIterator[tuple[str, bytes]]:
        if op not in STREAMS or not isinstance(args.get("id"), str):
            raise NotFound(f"no stream {op!r} of a sandbox")
        row = await self.row(project, args["id"])
        self.exec += 1
        async for event in self._link(row.edge).stream(op, args):
            yield event

    # Ports

    def ticket(self, id: str) -> str:
        """The token with which anybody may reach the open ports of a sandbox: 120 bits as 24 letters and digits."""
        mac = hmac.digest(self._secret.encode(), id.encode(), "sha256")
        return base64.b32encode(mac[:15]).decode().lower()

    def is_ticket(self, id: str, token: str) -> bool:
        return hmac.compare_digest(self.ticket(id).encode(), token.encode())

    # URLs that need no key

    def url(self, row: Row, args: dict[str, Any]) -> str:
        """The path below this server with which anybody may read (method GET) or write (PUT) one file."""
        path, method, seconds = args.get("path"), args.get("method", "GET"), args.get("expires")
        if not isinstance(path, str) or method not in ("GET", "PUT"):
            raise InvalidRequest(f"a URL is to GET or to PUT a path, not to {method!r} {path!r}")
        if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < 2**31):
            raise InvalidRequest(f"expires is a number of seconds, not {seconds!r}")
        until = str(round(time.time() + seconds)) if seconds else ""
        query = urlencode({"path": path, "until": until, "mac": self._mac(method, row.id, until, path)})
        return f"/v1/signed/{row.id}?{query}"

    def _mac(self, *words: str) -> str:
        return hmac.digest(self._secret.encode(), "\n".join(words).encode(), "sha256").hex()

    async def signed(self, method: str, id: str, path: str, until: str, mac: str, data: bytes = b"") -> bytes:
        """What such a URL does. Raises Forbidden for one that was not made by `url`, or is too old."""
        if not hmac.compare_digest(self._mac(method, id, until, path).encode(), mac.encode()):
            raise Forbidden("this URL was not made here for that")
        if until and time.time() > float(until):
            raise Forbidden("this URL is too old")
        row = await self.row(None, id)
        op = "files.read" if method == "GET" else "files.write"
        return (await self.call(row.project, op, {"id": id, "path": path}, data))[1]

    async def host(self, row: Row, port: Any) -> str:
        """Where a port of the sandbox is reached. Forbidden unless its policy opens it."""
        if self.ports is None:
            text = "this API server forwards no ports"
            raise SubstrateUnavailable(text, reason=text, fix="dsec serve with --ports 0 or more")
        if not isinstance(port, int) or isinstance(port, bool):
            raise InvalidRequest(f"a port is a number, not {port!r}")
        await self._link(row.edge).call("check_port", {"id": row.id, "port": port})
        return str(self.ports.address(row.id, port))

    async def tunnel(self, row: Row, port: int) -> Ends:
        """A connection to a port of the sandbox, over its Edge."""
        try:
            return await self._link(row.edge).tunnel(row.id, port)
        except NotFound:
            self._rows.pop(row.id, None)
            raise

    async def kill(self, row: Row) -> dict[str, Any]:
        """At once if its Edge answers; otherwise it is marked, and the Edge's next look ends it."""
        self._rows.pop(row.id, None)
        try:
            answer, _ = await self._link(row.edge).call("cluster.stop", {"id": row.id}, timeout=30)
        except Unreachable:
            return {"killed": await self._read(self.store.change, row.id, "stopping", "killed")}
        if answer["killed"]:
            self._thread.submit(self.control.ended, row)
        return answer

    async def delete_snapshot(self, project: str, name: str) -> dict[str, Any]:
        """Raises NotFound, also for another project's."""
        edge = await self._read(self.store.snapshot, name, project)
        if edge is None:
            raise NotFound(f"no snapshot {name!r}")
        await self._link(edge).call("delete_snapshot", {"snapshot": name})
        await self._read(self.store.drop_snapshot, name)
        return {}

    async def fork(self, project: str, row: Row, count: int, timeout: float | None = None) -> list[dict[str, Any]]:
        """Copies with the files of now, on the same Edge, each with a place and a quota of its own."""
        if not isinstance(count, int) or not 1 <= count <= 1000:
            raise InvalidRequest(f"count is 1 to 1000, not {count!r}")
        link = self._link(row.edge)
        name = (await link.call("snapshot", {"id": row.id}))[0]["snapshot"]
        await self._read(self.store.put_snapshot, name, project, row.edge)
        spec = Spec.from_dict(dict(row.spec)).but(trajectory=None, image=f"snapshot:{name}", idempotency_key=None)
        spec = spec.but(timeout=timeout or spec.timeout)
        each = (self.create(project, spec, row.priority, row.edge) for _ in range(count))
        made = await asyncio.gather(*each, return_exceptions=True)
        await self._quietly(link.call("delete_snapshot", {"snapshot": name}))
        forks: list[dict[str, Any]] = []
        for one in made:
            if isinstance(one, SandboxInfo):
                forks.append({"info": one.as_dict()})
            elif isinstance(one, DsecError):
                forks.append({"error": type(one).__name__, "message": one.message, "fields": one.fields})
            else:
                raise one
        return forks

    async def listing(
        self, project: str, metadata: dict[str, str] | None, state: list[str] | None
    ) -> list[dict[str, Any]]:
        wanted = (metadata or {}).items()
        rows = await self._read(self.store.sandboxes, project, True, 100_000)
        found = []
        for row in rows:
            spec = Spec.from_dict(dict(row.spec))
            shown = {"live": "running", "stopping": "dead"}.get(row.state, row.state)
            if shown in (state or ("running", "paused")) and wanted <= spec.metadata.items():
                info = SandboxInfo(
                    id=row.id,
                    substrate=spec.substrate,
                    image=spec.image,
                    state=shown,  # type: ignore[arg-type]
                    isolation=-1,  # the Edge knows: `info` tells
                    capabilities={},
                    created=row.created,
                    deadline=row.deadline,
                    host=row.edge,
                    metadata=spec.metadata,
                    trajectory=spec.trajectory,
                )
                found.append(info.as_dict())
        return [outward(each) for each in found]

    async def put_project(self, project: Project) -> None:
        await self._read(self.store.put_project, project)

    async def fleet(self) -> dict[str, Any]:
        """For the page: hosts with what they report, sandboxes by host and state, start latencies."""
        edges = await self._read(self.store.edges)
        rows = await self._read(self.store.sandboxes, None, True, 5000)
        return {
            "edges": [asdict(edge) for edge in edges],
            "sandboxes": [row.as_dict() for row in rows],
            "latencies": self.latencies[-200:],
            "waiting": self.control.queue.waiting(),
            "now": time.time(),
        }

    async def delete_trajectory(self, project: str, name: str) -> dict[str, Any]:
        """Deletes a project's trajectory on every Edge that has some of it -> its branches."""
        found: list[str] = []
        for edge in self.control.edges.values():
            if edge.up:
                try:
                    answer, _ = await self._link(edge.id).call("log_delete", {"trajectory": f"{project}/{name}"})
                except NotFound:
                    continue
                found += answer["branches"]
        if not found:
            raise NotFound(f"no trajectory {name!r}")
        return {"branches": sorted(found)}

    async def steps(self, id: str) -> list[dict[str, Any]]:
        """One sandbox's trajectory for the page: step, what, result, seconds, output (cut)."""
        rows = await self._read(self.store.sandboxes, None, True, 5000)
        row = next((each for each in rows if each.id == id), None)
        if row is None:
            raise NotFound(f"no sandbox {id!r}")
        answer, _ = await self._link(row.edge).call("cluster.steps", {"id": id})
        shown = []
        for step in answer["steps"]:
            args, result = step["args"], step.get("result", {})
            what = next((args[name] for name in ("command", "path", "function") if name in args), "")
            output = str(result.get("stdout", "")) + str(result.get("stderr", ""))
            shown.append(
                {
                    "step": step["step"],
                    "what": f"{step['kind']} {what if isinstance(what, str) else ' '.join(what)}"[:300],
                    "result": f"exit {result['exit_code']}" if "exit_code" in result else step["state"],
                    "seconds": step.get("seconds"),
                    "output": output[:2000],
                }
            )
        return shown

    async def state(self) -> bool:
        """Does the store answer, and is any Edge up?"""
        try:
            await self._read(self.store.projects)
        except StoreUnavailable:
            return False
        return any(edge.up for edge in self.control.edges.values())


def outward(info: dict[str, Any]) -> dict[str, Any]:
    """A sandbox's record as its owner may see it: without our label, the trajectory under the owner's own name."""
    changes: dict[str, Any] = {}
    if isinstance(info.get("metadata"), dict):
        changes["metadata"] = {name: value for name, value in info["metadata"].items() if name != LABEL}
    if info.get("trajectory") and "substrate" in info:
        changes["trajectory"] = info["trajectory"].partition("/")[2]
    return info | changes


def gone(row: Row) -> DsecError:
    """Why a sandbox that ended cannot be used."""
    if row.state == "preempted":
        return Preempted(f"{row.id} was preempted")
    if row.state in ("failed", "lost"):
        return SandboxFailed(f"{row.id} {row.state}: {row.reason}")
    return NotFound(f"{row.id} has ended: {row.state}")
