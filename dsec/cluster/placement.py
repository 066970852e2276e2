"""Which host gets a sandbox. Pure: no clock, no I/O; the caller brings the time, the reports and the random numbers.

Two choices: of two hosts drawn at random the less loaded one (the best of n leaves the same host to everybody who holds
the same stale report; one choice leaves log n / log log n on the unlucky). Two more are drawn among the hosts that
hold the image already, and win unless they are `COLD` fuller: so that a hot image spreads, and a cold one stays put.

A view of a host is its last report plus what was placed since and is not yet in a report (the overlay). The Edge has
the last word: it knows its load, and refuses what does not fit.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from dsec.cluster.store import Budget, Row

COLD = 0.2
"""How much fuller (fraction of a host) a host with the image may be than one without it, and still get the sandbox."""
DRAWS = 2
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Report:
    """What an Edge says of itself with each renewal of its lease. ``seq`` counts reports since the Edge started."""

    edge: str
    capacity: Budget
    used: Budget
    seq: int
    rate: float = 20.0
    """Starts a second that the host takes at present (see `StartRate`)."""
    images: frozenset[str] = frozenset()
    """Images on the host's own disk."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Nothing fits. ``full``: no host has room; otherwise hosts have room but start no faster."""

    full: bool
    retry: float
    """Seconds after which asking again makes sense."""


class Bag(Generic[T]):
    """A set that gives a random member in constant time."""

    __slots__ = ("_items", "_places")

    def __init__(self) -> None:
        self._items: list[T] = []
        self._places: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T) -> None:
        if item not in self._places:
            self._places[item] = len(self._items)
            self._items.append(item)

    def discard(self, item: T) -> None:
        place = self._places.pop(item, None)
        if place is not None:
            last = self._items.pop()
            if last is not item:
                self._items[place] = last
                self._places[last] = place

    def any(self, number: float) -> T:
        """The member at ``number`` (0 <= number < 1) of the way."""
        return self._items[int(number * len(self._items))]

    def from_(self, number: float) -> Iterable[T]:
        """All members, beginning at ``number`` of the way."""
        start = int(number * len(self._items))
        return self._items[start:] + self._items[:start]


class _Host:
    """A view of one host; ``slots`` to ``pids`` are what is taken."""

    __slots__ = (
        "capacity",
        "cpu",
        "images",
        "memory",
        "name",
        "overlay",
        "pids",
        "rate",
        "seq",
        "slots",
        "tokens",
        "when",
    )

    def __init__(self, name: str, now: float) -> None:
        self.name, self.when, self.tokens, self.seq, self.rate = name, now, 1.0, -1, 0.0
        self.overlay: dict[str, tuple[Budget, int | None]] = {}
        self.images: frozenset[str] = frozenset()
        self.capacity = Budget(0)
        self.slots = self.memory = self.cpu = self.pids = 0

    def take(self, budget: Budget, sign: int = 1) -> None:
        self.slots += sign * budget.slots
        self.memory += sign * budget.memory
        self.cpu += sign * budget.cpu
        self.pids += sign * budget.pids

    def load(self, budget: Budget) -> float:
        """The fullest of the four budgets (0 to 1) with ``budget`` added; above 1 it does not fit."""
        top, has = (self.slots + budget.slots) / (self.capacity.slots or 1e-9), self.capacity
        if has.memory and (part := (self.memory + budget.memory) / has.memory) > top:
            top = part
        if has.cpu and (part := (self.cpu + budget.cpu) / has.cpu) > top:
            top = part
        if has.pids and (part := (self.pids + budget.pids) / has.pids) > top:
            top = part
        return top

    def wait(self, now: float) -> float:
        """Seconds until the host's start rate allows one more. A burst is at most one second's starts."""
        if now > self.when:
            self.tokens = min(max(1.0, self.rate), self.tokens + (now - self.when) * self.rate)
            self.when = now
        return 0.0 if self.tokens >= 1 else (1 - self.tokens) / max(self.rate, 0.01)


class Placement:
    """One server's view of all hosts. Several servers may place at once; ``servers`` is how many share a host."""

    def __init__(self, rng: random.Random, servers: int = 1) -> None:
        self._random, self._servers = rng.random, servers
        self._hosts: dict[str, _Host] = {}
        self._up: Bag[_Host] = Bag()
        self._warm: dict[str, Bag[_Host]] = {}
        self._where: dict[str, _Host] = {}
        self._full: set[Budget] = set()

    def __len__(self) -> int:
        return len(self._up)

    def report(self, report: Report, now: float) -> None:
        """Takes a host's word, and drops from the overlay what the report counts."""
        host = self._hosts.get(report.edge)
        if host is None or report.seq < host.seq:  # new, or its Edge started anew
            self.lost(report.edge)
            host = self._hosts[report.edge] = _Host(report.edge, now)
            self._up.add(host)
        host.wait(now)
        host.capacity, host.seq, host.rate = report.capacity, report.seq, report.rate / self._servers
        for image in sorted(report.images - host.images):  # sorted: a set's order differs from process to process
            self._warm.setdefault(image, Bag()).add(host)
        for image in sorted(host.images - report.images):
            self._warm[image].discard(host)
        host.images = report.images
        host.slots = host.memory = host.cpu = host.pids = 0
        host.take(report.used)
        for id, (budget, counted) in list(host.overlay.items()):
            if counted is not None and counted <= report.seq:
                del host.overlay[id], self._where[id]
            else:
                host.take(budget)
        self._full.clear()

    def lost(self, edge: str) -> None:
        """Places nothing on this host until it reports again."""
        if host := self._hosts.pop(edge, None):
            self._up.discard(host)
            for image in host.images:
                self._warm[image].discard(host)
            for id in host.overlay:
                del self._where[id]

    def pin(self, id: str, budget: Budget, edge: str, now: float) -> str | Refusal:
        """Books on a given host, or not at all."""
        host = self._hosts.get(edge)
        if host is None or host.load(budget) > 1:
            return Refusal(True, 1.0)
        if wait := host.wait(now):
            return Refusal(False, wait)
        return self._book(host, id, budget)

    def _book(self, host: _Host, id: str, budget: Budget) -> str:
        host.tokens -= 1
        host.take(budget)
        host.overlay[id] = (budget, None)
        self._where[id] = host
        return host.name

    def rest(self, edge: str, now: float, seconds: float) -> None:
        """Places nothing on a host for so long: it did not answer. Else the empty hosts that swallow every create would
        be chosen before all others."""
        if host := self._hosts.get(edge):
            host.wait(now)
            host.tokens = 1 - seconds * max(host.rate, 0.01)

    def place(self, id: str, budget: Budget, image: str, now: float, avoid: Collection[str] = ()) -> str | Refusal:
        """Chooses a host and books ``budget`` there under ``id`` until `settle`."""
        best, lowest = None, 1e9
        warm, up, random = self._warm.get(image), self._up, self._random
        if budget in self._full and not avoid:
            return Refusal(True, 1.0)
        for bag, penalty in ((warm, 0.0), (up, COLD)):
            if bag:
                for _ in range(DRAWS):
                    host = bag.any(random())
                    load = host.load(budget)
                    if load <= 1 and load + penalty < lowest and host.name not in avoid and not host.wait(now):
                        best, lowest = host, load + penalty
        if best is None:
            soonest = 1e9
            for host in up.from_(random()):  # the draws met only full hosts: look at every one
                if host.load(budget) <= 1 and host.name not in avoid:
                    if not (wait := host.wait(now)):
                        best = host
                        break
                    soonest = min(soonest, wait)
            else:
                if soonest < 1e9:
                    return Refusal(False, soonest)
                if not avoid:
                    self._full.add(budget)
                return Refusal(True, 1.0)
        assert best is not None
        return self._book(best, id, budget)

    def full(self, edge: str) -> None:
        """The Edge says that it has no room: believe it until its next report."""
        if host := self._hosts.get(edge):
            host.slots = max(host.slots, host.capacity.slots)

    def refund(self, edge: str) -> None:
        """A sandbox came from the host's stock: nothing was started, so the start rate has its token back."""
        if host := self._hosts.get(edge):
            host.tokens += 1

    def settle(self, id: str, counted: int | None) -> None:
        """The Edge answered: it will count the sandbox from report ``counted`` on, or (None) it does not run it."""
        if host := self._where.get(id):
            budget, _ = host.overlay[id]
            if counted is None or counted <= host.seq:
                host.take(budget, -1)
                del host.overlay[id], self._where[id]
                self._full.clear()
            else:
                host.overlay[id] = (budget, counted)

    def ended(self, id: str, edge: str, budget: Budget) -> None:
        """A sandbox is gone, and its host's next report will say so: its room is free now. Without this a server that
        creates and kills would think a host full until it reports again."""
        if id in self._where:
            self.settle(id, None)
        elif host := self._hosts.get(edge):
            host.take(budget, -1)
            self._full.clear()

    def booked(self) -> list[str]:
        """Ids that no report counts yet."""
        return list(self._where)

    def free(self, edges: Iterable[str] | None = None) -> dict[str, Budget]:
        """What each host (or each of ``edges`` that is up) has left; a budget that the host does not limit counts as
        endless."""

        def left(limit: int, taken: int) -> int:
            return limit - taken if limit else 2**62

        wanted = None if edges is None else set(edges)
        return {
            name: Budget(
                host.capacity.slots - host.slots,
                left(host.capacity.memory, host.memory),
                left(host.capacity.cpu, host.cpu),
                left(host.capacity.pids, host.pids),
            )
            for name, host in self._hosts.items()
            if wanted is None or name in wanted
        }


class StartRate:
    """How many starts a second a host takes: up by a step while starts are quick and wanted, down by a third when the
    slowest twentieth passes ``target`` or everything stalls (pressure, from /proc/pressure, 0 to 1)."""

    def __init__(
        self, now: float, rate: float = 20.0, target: float = 1.0, low: float = 4.0, high: float = 500.0
    ) -> None:
        self.rate, self.target, self.low, self.high = rate, target, low, high
        self._tokens, self._when, self._refused = rate, now, False
        self._took: deque[float] = deque(maxlen=256)

    def take(self, now: float) -> bool:
        self._tokens = min(max(1.0, self.rate), self._tokens + (now - self._when) * self.rate)
        self._when = now
        if self._tokens < 1:
            self._refused = True
            return False
        self._tokens -= 1
        return True

    def record(self, seconds: float) -> None:
        """A start took this long, in whatever unit ``target`` has."""
        self._took.append(seconds)

    def adjust(self, pressure: float = 0.0) -> float:
        """Called about once a second -> the new rate."""
        slow = sorted(self._took)[int(len(self._took) * 0.95)] > self.target if self._took else False
        if slow or pressure > 0.3:
            self.rate = max(self.low, self.rate * 2 / 3)
            self._took.clear()
        elif self._refused or len(self._took) > self.rate / 2:
            self.rate = min(self.high, self.rate + max(1.0, self.rate * 0.05))
        self._refused = False
        return self.rate


class FairQueue(Generic[T]):
    """Creates that wait for room: the highest priority first; within it the project that holds least for its weight;
    within a project the oldest. A project with a thousand waiting gets no more than one with ten."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[str, deque[T]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, project: str, priority: int, item: T, front: bool = False) -> None:
        queue = self._waiting.setdefault(priority, {}).setdefault(project, deque())
        if front:
            queue.appendleft(item)
        else:
            queue.append(item)
        self._count += 1

    def waiting(self) -> dict[str, dict[str, int]]:
        """How many wait, by priority (as text: it is JSON) and project."""
        return {
            str(priority): {project: len(queue) for project, queue in projects.items()}
            for priority, projects in self._waiting.items()
            if projects
        }

    def pop(self, live: Mapping[str, float], weight: Mapping[str, float]) -> T:
        """The next one, given how many live sandboxes each project has. Raises IndexError when empty."""
        if not self._count:
            raise IndexError("nothing waits")
        priority = max(p for p, projects in self._waiting.items() if projects)
        projects = self._waiting[priority]
        project = min(projects, key=lambda name: (live.get(name, 0) / weight.get(name, 1.0), name))
        item = projects[project].popleft()
        if not projects[project]:
            del projects[project]
        self._count -= 1
        return item


def victims(candidates: Iterable[Row], budget: Budget, priority: int, free: Mapping[str, Budget]) -> list[Row]:
    """The cheapest set of less important sandboxes on one host whose end makes room for ``budget`` ([] if none):
    lowest top priority first, then fewest, then youngest (least work lost). ``free``: what each host has left."""
    hosts: dict[str, list[Row]] = {}
    for row in candidates:
        if row.priority < priority and row.edge in free:
            hosts.setdefault(row.edge, []).append(row)
    found: list[tuple[int, int, float, list[Row]]] = []
    for edge, rows in hosts.items():
        need = [want - have for want, have in zip(_amounts(budget), _amounts(free[edge]))]
        chosen = []
        for row in sorted(rows, key=lambda row: (row.priority, -row.created)):
            if all(amount <= 0 for amount in need):
                break
            chosen.append(row)
            need = [amount - given for amount, given in zip(need, _amounts(row.budget))]
        if chosen and all(amount <= 0 for amount in need):
            found.append((max(r.priority for r in chosen), len(chosen), -max(r.created for r in chosen), chosen))
    return min(found, key=lambda entry: entry[:3])[3] if found else []


def _amounts(budget: Budget) -> tuple[int, int, int, int]:
    return budget.slots, budget.memory, budget.cpu, budget.pids
