"""The part of an Edge that belongs to the cluster: its lease, its final say on admission, its report, its clean-up.

Without I/O of its own but the store's: it answers with the ids to destroy, and its driver (`dsec.cluster.node`, or the
simulator) destroys them and then says `ended`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from dsec.cluster.clock import Clock
from dsec.cluster.errors import StoreUnavailable
from dsec.cluster.leases import Lease, Terms
from dsec.cluster.placement import Report, StartRate
from dsec.cluster.store import Budget, Edge, Row, Store
from dsec.cluster.watcher import reconcile
from dsec.errors import Capacity, Fenced

REASONS = {"expired": "expired", "preempted": "preempted", "failed": "failed"}
"""Why a sandbox was told to stop -> the state it ends in; anything else ends as stopped."""


class Member:
    """One Edge in the cluster."""

    def __init__(
        self, store: Store, clock: Clock, edge: Edge, terms: Terms | None = None, rate: StartRate | None = None
    ) -> None:
        self.lease = Lease(store, clock, edge, terms or Terms())
        self.rate = rate or StartRate(clock.monotonic())
        self.running: dict[str, Budget] = {}
        self.images: set[str] = set()
        self.notes: dict[str, Any] = {}
        """More figures for the report, for people."""
        self._store, self._clock, self._lock = store, clock, threading.RLock()
        self._used = Budget(0)
        self._seq = 0
        self._ends: dict[str, tuple[str, str]] = {}
        self._refused: dict[str, float] = {}
        self._waited: dict[str, int] = {}

    def join(self, keep: Mapping[str, Budget] | None = None) -> int:
        """Takes the lease -> its epoch. ``keep``: sandboxes that survived a restart of the Edge process."""
        epoch = self.lease.acquire(keep or ())
        with self._lock:
            self.running = dict(keep or {})
            self._ends.clear()
            self._recount()
        return epoch

    # Admission

    def admit(self, row: Row, warm: bool = False) -> int:
        """Books ``row`` -> the number of the report that counts it. Asking again for what runs changes nothing.
        ``warm``: one like it stands ready, so nothing is started and the start rate has no say.

        Raises:
            Fenced: the row was placed on another epoch of this Edge, or the lease is over.
            Capacity: over a hard cap, starting too fast, or given up on already; nothing was started and nothing will
                be: only after this may the row move to another Edge.
        """
        with self._lock:
            self.lease.check()
            if row.epoch != self.lease.epoch:
                raise Fenced(f"{row.id} was placed on epoch {row.epoch} of {row.edge}, which is at {self.lease.epoch}")
            if row.id in self.running:
                return self._seq + 1
            if row.id in self._refused or row.id in self._ends:
                raise Capacity(f"{row.id} was given up on")
            if full := self._over(row.budget):
                raise Capacity(f"{row.edge} is full: {full}", full=True)
            if not warm and not self.rate.take(self._clock.monotonic()):
                raise Capacity(f"{row.edge} starts {self.rate.rate:.0f} sandboxes a second at most", full=False)
            self.running[row.id] = row.budget
            self._count(row.budget, 1)
            return self._seq + 1

    def _over(self, budget: Budget) -> str:
        has = self.lease.edge.capacity
        for name in ("slots", "memory", "cpu", "pids"):
            limit, taken = getattr(has, name), getattr(self._used, name) + getattr(budget, name)
            if taken > limit and (limit or name == "slots"):  # a budget of 0 is none
                return f"{taken} {name} of {limit}"
        return ""

    def _count(self, budget: Budget, sign: int) -> None:
        used = self._used
        self._used = Budget(
            used.slots + sign * budget.slots,
            used.memory + sign * budget.memory,
            used.cpu + sign * budget.cpu,
            used.pids + sign * budget.pids,
        )

    def _recount(self) -> None:
        self._used = Budget(0)
        for budget in self.running.values():
            self._count(budget, 1)

    def refuse(self, id: str) -> bool:
        """Promises never to start ``id``: its create was given up. False if it runs (destroy it then)."""
        with self._lock:
            if id in self.running:
                return False
            self._refused[id] = self._clock.monotonic()
            return True

    def ended(self, id: str, state: str, reason: str = "") -> None:
        """A sandbox is gone from the host; the store hears of it with the next `flush`."""
        with self._lock:
            if budget := self.running.pop(id, None):
                self._count(budget, -1)
                self._ends[id] = (state, reason)

    # What the driver calls from time to time

    def flush(self) -> list[str]:
        """Reports ends to the store in one transaction -> those the store took. Kept and repeated while it is away."""
        with self._lock:
            ends, edge, epoch = dict(self._ends), self.lease.edge.id, self.lease.epoch
        if not ends:
            return []
        try:
            done = self._store.finish(((id, edge, epoch, *end) for id, end in ends.items()), self._clock.now())
        except StoreUnavailable:
            return []
        with self._lock:
            for id in ends:
                self._ends.pop(id, None)
                self._refused[id] = self._clock.monotonic()
        return done

    def report(self) -> Report:
        with self._lock:
            edge = self.lease.edge
            return Report(edge.id, edge.capacity, self._used, self._seq, self.rate.rate, frozenset(self.images))

    def heartbeat(self, pressure: float = 0.0) -> list[str]:
        """Renews the lease with a report -> []; or, the lease being over, all sandboxes: destroy them, then `join`."""
        with self._lock:
            self.rate.adjust(pressure)
            self._seq += 1
            report = encode(self.report()) | self.notes
        try:
            self.lease.renew(report)
        except Fenced:
            return list(self.running)
        return []

    def reconcile(self) -> dict[str, str]:
        """Compares with the store -> the sandboxes to destroy now and why (then call `ended` with `end_state`)."""
        with self._lock:
            running = set(self.running)
        try:
            rows = self._store.owned(self.lease.edge.id, self.lease.epoch)
        except StoreUnavailable:
            return {}
        with self._lock:
            repair = reconcile(rows, running, self._ends, self._waited)
            for id in repair.missing:
                if self.refuse(id):
                    self._ends[id] = ("failed", "never started, or vanished")
            self._waited = {row.id: self._waited.get(row.id, 0) + 1 for row in rows if row.id not in self.running}
            old = self._clock.monotonic() - 2 * self.lease.terms.ttl
            for id in [id for id, when in self._refused.items() if when < old]:
                del self._refused[id]
            return repair.stop | {id: "orphan" for id in repair.orphans if id in self.running}


def end_state(reason: str) -> str:
    return REASONS.get(reason, "stopped")


def encode(report: Report) -> dict[str, Any]:
    """JSON of what changes in a report; the rest stands in the Edge's own row."""
    used = {"slots": report.used.slots, "memory": report.used.memory, "cpu": report.used.cpu, "pids": report.used.pids}
    return {"used": used, "seq": report.seq, "rate": report.rate, "images": sorted(report.images)}


def decode(edge: Edge) -> Report | None:
    """The report an Edge's row carries, None before its first."""
    if not edge.report:
        return None
    told = edge.report
    return Report(edge.id, edge.capacity, Budget(**told["used"]), told["seq"], told["rate"], frozenset(told["images"]))
