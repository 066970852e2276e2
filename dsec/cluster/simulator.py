"""A cluster on a virtual clock: the real placement, lease, member, watcher and store code; hosts, network and clients
are played (`dsec.cluster.players`). The world knows what truly runs where, which no part of the control plane does, and
checks it.

Each client wants a number of things done, one sandbox (a run) each; it asks an API server, waits, and asks again with
the same idempotency key when the answer was lost, or for the same run when its host was.
"""

from __future__ import annotations

import gc
import heapq
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from dsec.cluster.clock import VirtualClock
from dsec.cluster.leases import Terms
from dsec.cluster.players import ApiServer, FlakyDatabase, Host, Task
from dsec.cluster.store import Budget, Project, Row, Store
from dsec.cluster.watcher import Watcher

FAULTS = (
    "hosts",
    "zone",
    "stale",
    "slow",
    "restart",
    "hot",
    "failover",
    "stall",
    "lossy",
    "servers",
    "preempt",
)
"""hosts: 1 in 20 loses power within the run; zone: one of five is cut off, then back; stale: reports are read every 5 s
only; slow: Edges that answer after the server gave up; restart: a fifth of all hosts loses power at once and comes
back; hot: half of all creates want one image; failover: the database is away for 60 s, its last answers lost; stall:
hosts stop as a whole and go on after their lease; lossy: 1 % of all messages get lost; servers: API servers die in
mid-create; preempt: a burst of urgent creates into a full cluster. Not among them, because the promise against double
runs needs a standby that is synchronous: amnesia, a failover to a standby that missed the last 10 s of creates."""


@dataclass(frozen=True)
class Scene:
    """What to play. ``live`` sandboxes on ``hosts`` hosts, for ``minutes`` after the ramp."""

    live: int = 600
    hosts: int = 12
    minutes: float = 12.0
    life: float = 240.0
    """Mean seconds that a sandbox lives."""
    faults: tuple[str, ...] = FAULTS
    servers: int = 3
    slots: int = 0
    """Of each host; 0: a quarter more than ``live`` needs, a zone's loss being a fifth."""
    seed: int = 0
    terms: Terms = field(default_factory=Terms)
    greedy: float = 0.0
    """If set, demand is this many times what fits, all of the surplus from one project."""


class World:
    """Everything, and the truth about it."""

    def __init__(
        self, scene: Scene, watch: Callable[[World], None] | None = None, tell: Callable[[str], None] | None = None
    ) -> None:
        self.scene, self.rng, self.clock = scene, random.Random(scene.seed), VirtualClock(1000.0)
        self.watch, self.tell = watch, tell
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = 0
        self.database = FlakyDatabase()
        self.store = Store(self.database)
        with self.database.transaction() as run:
            run("create table endings (id text)")
            run(
                "create trigger ended after update of ended on sandboxes when new.ended is not null"
                " begin insert into endings values (new.id); end"
            )
        for name, weight in (("red", 1.0), ("green", 1.0), ("blue", 2.0)):
            self.store.put_project(Project(name, weight, max_live=10**9))
        self.slots = scene.slots or round(scene.live * 1.4 / scene.hosts) + 2
        self.notice, self.closed = 10.0, False
        self.truth: dict[str, set[tuple[str, int]]] = {}
        self.holders: dict[str, Task] = {}
        self.rows: dict[str, Row] = {}
        self.suspects: dict[str, float] = {}
        self.violations: Counter[str] = Counter()
        self.notes: list[str] = []
        """What is known of the first violations of each kind, one line each."""
        self.refusals: Counter[str] = Counter()
        self.waits: list[tuple[int, float]] = []
        self.recovery: list[float] = []
        self.shares: list[dict[str, float]] = []
        self.died: dict[tuple[str, int], float] = {}
        self.asked = self.queued = self.rejected = self.moved = self.abandoned = self.silent = self.preempted = 0
        self.peak = self.done = self.number = self.decisions = 0
        self.deciding = 0.0
        self.failover = (0.0, 0.0)
        self.crowded = bool(scene.greedy or scene.slots)
        self.patience = 4 * scene.terms.ttl
        """Nobody waits longer while there is room: two hosts lost in a row, each settled within a ttl, and as much
        again for a database that is away and Edges that answer too late."""
        self.longest = 0.0
        self.story: list[tuple[float, str]] = []
        """What happened to the client that waited longest."""
        self.seconds = 0
        self.series: list[tuple[float, int, int, int]] = []
        """Every 5 s: time, sandboxes that run, creates that wait, hosts that answer."""
        self.marks: list[tuple[float, str]] = []
        """When a fault began."""
        self.ended: dict[str, int] = {}
        self.rows_made = 0
        self.hosts = {f"h{n}": Host(self, n) for n in range(scene.hosts)}
        self.servers = [ApiServer(self, n) for n in range(scene.servers)]
        self.watchers = [Watcher(self.store, self.clock, scene.terms, keep=1e9) for _ in range(2)]
        self.after(0.5, self.tick)
        self.after(20.0, self.check)

    # Time and messages

    def after(self, seconds: float, work: Callable[..., None], *arguments: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (self.clock.time + seconds, self.count, work, arguments))

    def send(self, work: Callable[..., None], *arguments: Any, slow: float = 0.0, host: Host | None = None) -> None:
        if host and not host.connected:
            return
        if "lossy" in self.scene.faults and self.rng.random() < 0.01:
            return
        self.after(0.001 + slow + 0.004 * self.rng.random(), work, *arguments)

    def until(self, end: float) -> None:
        events, clock = self.events, self.clock
        while events and events[0][0] <= end:
            clock.time, _, work, arguments = heapq.heappop(events)
            work(*arguments)
        clock.time = end

    # The truth

    def violated(self, kind: str, count: int = 1, **state: Any) -> None:
        """Counts violations, and tells of the first ten of their kind what explains them."""
        self.violations[kind] += count
        if 0 < self.violations[kind] < 10 + count:
            told = " ".join(f"{name}={value}" for name, value in state.items())
            self.notes.append(f"{self.clock.time - 1000.0:.1f} s: {kind}: {told}")
            if self.tell:
                self.tell(self.notes[-1])

    def about(self, id: str) -> dict[str, Any]:
        """What the world and the store know of one sandbox, and of its host."""
        row = self.rows.get(id)
        with closing(self.database.look()) as cursor:
            found = cursor.execute(
                "select edge, epoch, state, reason, created, ended, run from sandboxes where id = ?", (id,)
            ).fetchall()
        host = self.hosts[row.edge if row else found[0][0]] if row or found else None
        told: dict[str, Any] = {"id": id, "row": found[0] if found else None, "runs_on": row and (row.edge, row.epoch)}
        if host:
            told["host"] = (host.name, f"zone {host.zone}", f"epoch {host.member.lease.epoch}", f"boots {host.boots}")
            told["host_is"] = [n for n in ("alive", "connected", "stalled") if getattr(host, n)] + [f"slow {host.slow}"]
            told["lease_left"] = round(host.member.lease.left(), 1)
        return told

    def runs(self, row: Row, host: Host) -> None:
        where = self.truth.setdefault(row.run, set())
        where.add((row.id, host.boots))
        self.rows[row.id] = replace(row, edge=host.name)
        if self.executing(row.run) > 1:
            self.violated("double run", run=row.run, each=[self.about(id) for id, _ in where])
        if len(host.member.running) > self.slots:
            self.violated("over the cap", host=host.name, runs=len(host.member.running), cap=self.slots)
        self.peak = max(self.peak, len(self.rows))

    def executing(self, run: str) -> int:
        """How many sandboxes execute this run now; what stands still on a stalled host does not."""
        return sum(not self.hosts[self.rows[id].edge].stalled for id, _ in self.truth[run])

    def gone(self, id: str, host: Host) -> None:
        row = self.rows.pop(id, None)
        if row is None:
            return
        if not host.alive:
            self.died[(host.name, row.epoch)] = self.clock.time
        where = self.truth[row.run]
        where.discard(next(entry for entry in where if entry[0] == id))
        if not where:
            del self.truth[row.run]
        task = self.holders.pop(id, None) or None
        if task and not task.finished:
            task.again()

    def result(self, id: str, host: Host) -> None:
        """A result reached its client."""
        row = self.rows[id]
        if self.executing(row.run) > 1:
            each = [self.about(id) for id, _ in self.truth[row.run]]
            self.violated("two owners, one acknowledged", run=row.run, acknowledged=id, each=each)
        if task := self.holders.pop(id, None):
            task.finished = True
            self.done += 1

    def started(self, task: Task) -> None:
        """A client has its sandbox; it has waited since it first asked for it."""
        seconds = self.clock.time - task.began
        self.waits.append((task.priority, seconds))
        if not self.crowded:
            if seconds > self.longest:
                self.longest, self.story = seconds, [*task.story]
            if seconds > self.patience:
                self.violated("turned away for too long", run=f"run-{task.number}", waited=seconds, story=task.story)

    def tick(self) -> None:
        self.after(1.0, self.tick)
        self.seconds += 1
        if self.seconds % 5 == 0:
            up = sum(host.alive and host.connected and not host.stalled for host in self.hosts.values())
            sample = (self.clock.time - 1000.0, len(self.rows), sum(len(s.control.queue) for s in self.servers), up)
            self.series.append(sample)
        found = [id for watcher in self.watchers for id in watcher.tick().lost]
        if found:
            epochs = {id: epoch for id, epoch, _, _ in self.store.beats()}
            for (host, epoch), when in list(self.died.items()):
                if epochs[host] > epoch:
                    self.recovery.append(self.clock.time - when - self.outage(when))
                    del self.died[(host, epoch)]

    def outage(self, since: float) -> float:
        """Seconds since then for which nobody could have heard of a loss, the database being away."""
        start, end = self.failover
        return max(0.0, min(end, self.clock.time) - max(start, since))

    def check(self) -> None:
        """What the store and the truth disagree on must not last."""
        self.after(20.0 if self.scene.live < 50_000 else 60.0, self.check)
        if self.watch:
            self.watch(self)
        if self.database.away:
            self.suspects.clear()
            return
        with self.database.transaction() as run:
            live: dict[str, str] = dict(run("select id, project from sandboxes where ended is null"))
            stopping = {id for (id,) in run("select id from sandboxes where state = 'stopping' and ended is null")}
        lasting: dict[str, float] = {}
        for id in (self.rows.keys() ^ live.keys()) | (stopping & self.rows.keys()):
            lasting[id] = self.suspects.get(id, self.clock.time)
            if self.clock.time - lasting[id] > self.scene.terms.ttl + 70:
                unwanted = "leak: runs on" if id in live else "leak: runs unknown"
                self.violated(unwanted if id in self.rows else "leak: never ends", **self.about(id))
                lasting[id] = float("inf")
        self.suspects = lasting
        if self.closed:
            return
        held = Counter(live.values())
        self.shares.append({name: held[name] / self.slots / self.scene.hosts for name in ("red", "green", "blue")})

    def forget(self, since: float) -> None:
        """Takes from the store the creates that the standby had not got yet."""
        with self.database.transaction() as run:
            for project, ended in run("delete from sandboxes where created > ? returning project, ended", (since,)):
                run("update projects set live = live - ? where name = ?", (int(ended is None), project))
            run("delete from requests where created > ?", (since,))

    def close(self) -> None:
        """No more creates; everything must come to its end."""
        self.closed = True
        for host in self.hosts.values():
            host.connected, host.slow = True, 0.0
            host.stalled = False
            if not host.alive:
                host.boot()
        self.database.away = False
        for id in list(self.rows):
            self.store.change(id, "stopping", "the end")
        self.until(self.clock.time + 2 * self.scene.terms.ttl + 200)
        with self.database.transaction() as run:
            creates = run(
                "select count(*), count(ended), count(distinct project || json_extract(spec, '$.key')) from sandboxes"
            )
            endings = run("select count(*), count(distinct id) from endings")
            left = [*self.rows, *(id for (id,) in run("select id from sandboxes where ended is null limit 5"))]
        rows, ended, keys = creates[0]
        for name, bad in {
            "leak: never ends": rows - ended,
            "leak: runs unknown": len(self.rows),
            "ended more than once": endings[0][0] - endings[0][1],
            "a key made two": rows - keys,
            "a count is off": sum(abs(project.live) for project in self.store.projects()),
            "a host's books are off": sum(host.member.report().used != Budget(0) for host in self.hosts.values()),
            "a placement's books are off": sum(len(server.control.placement.booked()) for server in self.servers),
        }.items():
            if bad:
                self.violated(name, bad, left=[self.about(id) for id in left[:5]])
        if late := sorted(seconds for seconds in self.recovery if seconds > self.scene.terms.ttl):
            self.violated("recovery past the ttl", len(late), seconds=late[-10:])
        self.ended = dict(self._by_state())
        self.rows_made = rows

    def _by_state(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for (_, state), count in self.store.counts().items():
            total[state] += count
        return total


def simulate(
    scene: Scene, watch: Callable[[World], None] | None = None, tell: Callable[[str], None] | None = None
) -> World:
    """Plays ``scene`` to its end -> the world, with ``violations`` (empty if every property held). ``watch`` sees the
    world from time to time, ``tell`` gets a line for each violation as it happens."""
    world = World(scene, watch, tell)
    fits = world.slots * scene.hosts
    wanted = {name: scene.live * part for name, part in (("red", 0.25), ("green", 0.25), ("blue", 0.5))}
    if scene.greedy:
        wanted = {"red": fits * (scene.greedy - 0.75), "green": fits * 0.25, "blue": fits * 0.5}
    ramp, end = scene.life / 2, world.clock.time + 30 + scene.life / 2 + 60 * scene.minutes

    def arrive(project: str, gap: float) -> None:
        if world.clock.time < end:
            world.number += 1
            Task(world, world.number, project).ask()
            world.after(world.rng.expovariate(1 / gap), arrive, project, gap)

    def first(project: str) -> None:
        world.number += 1
        Task(world, world.number, project).ask()

    for project, count in wanted.items():
        for _ in range(round(count)):
            world.after(10 + ramp * world.rng.random(), first, project)
        world.after(10 + ramp / 2, arrive, project, scene.life / count)
    _schedule(world, 20 + ramp, 60 * scene.minutes)
    collecting = gc.isenabled()
    gc.disable()  # millions of small objects and no cycles: looking for them would take a third of the time
    try:
        world.until(end)
        world.close()
    finally:
        if collecting:
            gc.enable()
    return world


def _schedule(world: World, start: float, length: float) -> None:
    """Puts the faults on the clock, one after the other with room to recover (each needs about a ttl)."""
    scene, rng, hosts = world.scene, world.rng, list(world.hosts.values())

    def some(part: float) -> list[Host]:
        return rng.sample(hosts, max(1, round(part * len(hosts))))

    def power(chosen: list[Host], off: float) -> None:
        for host in chosen:
            if host.alive:
                host.die()
                world.after(off * (0.8 + 0.4 * rng.random()), lambda host=host: host.alive or host.boot())

    def unreachable(host: Host) -> None:
        for id in host.member.running:
            if task := world.holders.get(id):
                world.after(5 + 10 * rng.random(), task.cut_off, id)

    def cut(chosen: list[Host], connected: bool) -> None:
        for host in chosen:
            host.connected = connected
            unreachable(host)

    def stall(host: Host) -> None:
        host.stalled = True
        unreachable(host)
        world.after(rng.choice([20.0, 200.0]), host.wake)

    def slow(chosen: list[Host], seconds: float) -> None:
        for host in chosen:
            host.slow = seconds * rng.choice([1.0, 8.0])

    def failover() -> None:
        world.database.away, world.database.doubtful = True, 20
        world.failover = (world.clock.time, world.clock.time + 60)
        world.after(60.0, back)

    def back() -> None:
        world.database.away = False
        if "amnesia" in scene.faults:
            world.forget(world.failover[0] - 10)

    def crowd() -> None:
        world.crowded = True
        room = world.slots * scene.hosts
        for _ in range(room + min(room // 5, 5000) - len(world.rows)):
            world.number += 1
            world.after(10 * rng.random(), Task(world, world.number, "green", 10).ask)

    def at(part: float, name: str, work: Callable[..., None], *arguments: Any, mark: str = "") -> None:
        if name in scene.faults:
            world.after(start + part * length, work, *arguments)
            if mark:
                world.marks.append((start + part * length, mark))

    zone = [host for host in hosts if host.zone == 3]
    for host in some(0.05):
        at(0.6 * rng.random(), "hosts", power, [host], 300.0)
    for host in some(0.05):
        at(0.6 * rng.random(), "stall", stall, host)
    lazy = some(0.05)
    at(0.05, "slow", slow, lazy, 12.0, mark="slow Edges")
    at(0.35, "slow", slow, lazy, 0.0)
    at(0.1, "failover", failover, mark="database away")
    at(0.1, "amnesia", failover)
    at(0.3, "zone", cut, zone, False, mark="zone cut off")
    at(0.55, "zone", cut, zone, True, mark="zone back")
    at(0.65, "restart", power, some(0.2), 60.0, mark="a fifth restarts")
    at(0.8, "preempt", crowd, mark="urgent creates")


def record(world: World, seconds: float) -> dict[str, Any]:
    """What a run showed, as plain numbers. ``seconds``: what it took, of this process's processor time."""
    waits = sorted(wait for priority, wait in world.waits if not priority) or [0.0]
    urgent = sorted(wait for priority, wait in world.waits if priority) or [0.0]
    at = lambda values, part: round(values[min(len(values) - 1, int(part * len(values)))], 2)  # noqa: E731
    return {
        "seed": world.scene.seed,
        "faults": list(world.scene.faults),
        "hosts": world.scene.hosts,
        "slots": world.slots,
        "live_at_most": world.peak,
        "asked": world.asked,
        "created": world.rows_made,
        "ended": dict(sorted(world.ended.items())),
        "done": world.done,
        "queued": world.queued,
        "rejected": world.rejected,
        "moved": world.moved,
        "abandoned": world.abandoned,
        "unheard": world.silent,
        "wait_p50_s": at(waits, 0.5),
        "wait_p99_s": at(waits, 0.99),
        "wait_p9999_s": at(waits, 0.9999),
        "wait_most_s": round(world.longest, 1),
        "wait_most_story": [f"{when:.0f} s: {what}" for when, what in world.story],
        "wait_bound_s": world.patience,
        "urgent_p50_s": at(urgent, 0.5),
        "urgent_p99_s": at(urgent, 0.99),
        "hosts_lost": len(world.recovery),
        "recovery_most_s": round(max(world.recovery, default=0.0), 1),
        "ttl_s": world.scene.terms.ttl,
        "decisions": world.decisions,
        "decisions_per_s_with_store": round(world.decisions / max(world.deciding, 1e-9)),
        "seconds": round(seconds, 1),
        "violations": dict(world.violations),
    }


def table(world: World, seconds: float) -> list[tuple[str, str]]:
    """The same for people, as (name, value) lines."""
    r = record(world, seconds)
    listed = lambda counts: ", ".join(f"{name} {n:,}" for name, n in counts.items())  # noqa: E731
    return [
        ("hosts x slots", f"{r['hosts']:,} x {r['slots']}"),
        ("live at most", f"{r['live_at_most']:,}"),
        ("asked, created, done", f"{r['asked']:,}, {r['created']:,}, {r['done']:,}"),
        ("ended as", listed(r["ended"])),
        ("queued, told to come back", f"{r['queued']:,}, {r['rejected']:,}"),
        ("moved, abandoned, unheard", f"{r['moved']:,}, {r['abandoned']:,}, {r['unheard']:,}"),
        ("waited for a start, p50 p99", f"{r['wait_p50_s']:.1f} s {r['wait_p99_s']:.1f} s"),
        ("longest wait while there is room", f"{r['wait_most_s']:.0f} s of {r['wait_bound_s']:.0f}"),
        ("urgent ones waited, p50 p99", f"{r['urgent_p50_s']:.1f} s {r['urgent_p99_s']:.1f} s"),
        ("hosts lost, slowest settled", f"{r['hosts_lost']}, {r['recovery_most_s']:.0f} s of {r['ttl_s']:.0f}"),
        ("decisions", f"{r['decisions']:,}, store included {r['decisions_per_s_with_store']:,}/s"),
        ("took", f"{r['seconds']:.0f} s of one processor"),
        ("violations", listed(r["violations"]) or "none"),
    ]
