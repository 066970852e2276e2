"""What an API server decides for each create. Soft views only: any number of servers may work on one store.

begin      quota, idempotency, placement; the row is written before any Edge hears of it
submit     every create waits its turn, by priority and by fair share; `pump` serves the queue
refused    an Edge said no for certain: another one gets the row
started    an Edge said yes
abandon    nobody knows: the row is marked as to be stopped, the Edge clears it up, and it is *not* started elsewhere
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsec.cluster.clock import Clock
from dsec.cluster.errors import StoreUnavailable
from dsec.cluster.member import decode
from dsec.cluster.placement import FairQueue, Placement, Refusal, victims
from dsec.cluster.store import Budget, Edge, Row, Store
from dsec.errors import Capacity, DsecError

TRIES = 4
"""Edges that are asked for one create."""
SILENT = 3
"""Refreshes without a word after which another server's queue counts no more."""
REST = 30.0
"""Seconds without creates for an Edge that did not answer one."""


@dataclass(frozen=True, slots=True)
class Order:
    """A create as a client asks for it."""

    project: str
    budget: Budget = field(default_factory=Budget)
    image: str = "host"
    timeout: float = 300.0
    priority: int = 0
    run: str = ""
    key: str = ""
    digest: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)
    pin: str = ""
    """The only Edge that will do: it has the files of a snapshot, or the log of a trajectory."""


@dataclass(slots=True)
class Reservation:
    """A row that an Edge is to start; ``fresh`` is False when it stood before (a repeated or a resumed create)."""

    row: Row
    order: Order
    fresh: bool
    tried: set[str] = field(default_factory=set)


class Control:
    def __init__(
        self,
        store: Store,
        clock: Clock,
        rng: random.Random | None = None,
        servers: int = 1,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.store, self.edges = store, dict[str, Edge]()
        self.placement = Placement(rng or random.Random(), servers)
        self.live: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.queue: FairQueue[tuple[Order, Any]] = FairQueue()
        self._clock = clock
        self._new_id = new_id
        self._name = new_id()
        self._others: list[dict[str, dict[str, int]]] = []
        self._told: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, tuple[int, int]] = {}

    def refresh(self) -> None:
        """Reads the Edges' reports and the projects' counts; call it about once a second."""
        self.store.tell(self._name, self.queue.waiting())
        self._others = []
        for name, (seq, waiting) in self.store.heard().items():
            last, age = self._told.get(name, (-1, 0))
            self._told[name] = (seq, 0 if seq != last else age + 1)
            if name != self._name and self._told[name][1] < SILENT:
                self._others.append(waiting)
            elif name != self._name:  # else a server that starts would defer to the queues of all that ever died
                self.store.unhear(name, seq)
                del self._told[name]
        edges, projects, now = self.store.edges(), self.store.projects(), self._clock.monotonic()
        for edge in edges:
            if self._seen.get(edge.id) == (edge.epoch, edge.seq):
                continue
            self._seen[edge.id] = (edge.epoch, edge.seq)
            report = decode(edge)
            if not edge.up:
                self.placement.lost(edge.id)
            elif report:
                self.placement.report(report, now)
        self.edges = {edge.id: edge for edge in edges}
        self.live = {project.name: project.live for project in projects}
        self.weights = {project.name: project.weight for project in projects}

    def begin(self, order: Order) -> Reservation | Refusal:
        """Raises QuotaExceeded, Conflict, UnknownProject, StoreUnavailable."""
        now, id = self._clock.now(), self._new_id()
        if order.pin:
            edge = self.placement.pin(id, order.budget, order.pin, self._clock.monotonic())
        else:
            edge = self.placement.place(id, order.budget, order.image, self._clock.monotonic())
        if isinstance(edge, Refusal):
            return edge
        row = Row(
            id=id,
            project=order.project,
            run=order.run or id,
            edge=edge,
            epoch=self.edges[edge].epoch,
            budget=order.budget,
            priority=order.priority,
            created=now,
            deadline=now + order.timeout,
            spec=order.spec,
        )
        try:
            standing = self.store.create(row, order.key, order.digest)
        except BaseException:
            self.placement.settle(id, None)
            raise
        if standing.id != id:
            self.placement.settle(id, None)
            if standing.state == "stopping":  # of the same run: it must be gone before it may start again
                raise Capacity(f"{standing.id} of the same run is still being stopped", retry=1.0)
        elif order.project in self.live:
            self.live[order.project] += 1
        return Reservation(standing, order, standing.id == id, {standing.edge})

    def submit(self, order: Order, ticket: Any) -> Iterator[tuple[Any, Order, Reservation | DsecError]]:
        """Queues an order and serves the queue -> the answers that are ready, perhaps this one's among them. A ticket
        that is ``done()`` (its client went away) is dropped."""
        self.queue.push(order.project, order.priority, (order, ticket))
        return self.pump()

    def pump(self) -> Iterator[tuple[Any, Order, Reservation | DsecError]]:
        """Serves the queue until the next in turn does not fit. Those behind it wait although they might fit: else a
        large one would never get its turn. Another server's clients may be next in turn: then ours wait too."""
        while self.queue and self._our_turn():
            order, ticket = self.queue.pop(self.live, self.weights)
            if ticket.done():
                continue
            try:
                answer = self.begin(order)
            except StoreUnavailable:
                self.again(order, ticket)
                return
            except DsecError as error:
                yield ticket, order, error
                continue
            if isinstance(answer, Refusal):
                self.again(order, ticket)
                return
            yield ticket, order, answer

    def again(self, order: Order, ticket: Any) -> None:
        """Back to the head of the queue."""
        self.queue.push(order.project, order.priority, (order, ticket), front=True)

    def _our_turn(self) -> bool:
        """Is the next of our queue, by priority and by what its project holds for its weight, as near its turn as
        anybody's? One sandbox more or less is as near."""

        def next_of(waiting: Mapping[str, Mapping[str, int]]) -> tuple[int, float]:
            top = max(waiting, key=int)
            held = (self.live.get(name, 0) / self.weights.get(name, 1.0) for name in waiting[top])
            return -int(top), min(held)

        priority, held = next_of(self.queue.waiting())
        others = [next_of(waiting) for waiting in self._others if waiting]
        return all((priority, held - 1) <= other for other in others)

    def refused(self, reservation: Reservation, full: bool = True) -> Reservation | Refusal:
        """Call only when the Edge has said that it does not and will not run it; ``full``: for want of room. A Refusal
        means that the create has been taken back: it may wait again."""
        row, order, now = reservation.row, reservation.order, self._clock.monotonic()
        self.placement.settle(row.id, None)
        if full:
            self.placement.full(row.edge)
        edge: str | Refusal = Refusal(False, 1.0)
        if len(reservation.tried) < TRIES and not order.pin:
            edge = self.placement.place(row.id, order.budget, order.image, now, reservation.tried)
        if isinstance(edge, Refusal):
            if self.store.withdraw(row) and order.project in self.live:
                self.live[order.project] -= 1
            return edge
        try:
            moved = self.store.move(row, edge, self.edges[edge].epoch)
        except StoreUnavailable:
            self.placement.settle(row.id, None)
            raise
        if moved is None:
            self.placement.settle(row.id, None)
            raise Capacity(f"{row.id} was given up on")
        return Reservation(moved, order, True, reservation.tried | {edge})

    def started(self, reservation: Reservation, counted: int, warm: bool = False) -> None:
        """``warm``: it was taken from the Edge's stock."""
        self.placement.settle(reservation.row.id, counted)
        if warm:
            self.placement.refund(reservation.row.edge)

    def ended(self, row: Row) -> None:
        """Its Edge says that it is gone: its place and its share are free before the next report and count."""
        self.placement.ended(row.id, row.edge, row.budget)
        if self.live.get(row.project):
            self.live[row.project] -= 1

    def abandon(self, reservation: Reservation) -> None:
        """No answer: it may run, so it is told to stop and no other Edge gets it; the row ends when its own Edge has
        looked, or is lost."""
        self.placement.settle(reservation.row.id, None)
        self.placement.rest(reservation.row.edge, self._clock.monotonic(), REST)
        self.store.change(reservation.row.id, "stopping", "failed")

    def make_room(self, order: Order) -> list[Row]:
        """Less important sandboxes that were told to stop so that ``order`` fits; [] if their end would not help.
        Their Edges give them the notice, `preempt` in `dsec.cluster.node`."""
        if order.priority <= 0:
            return []
        below = self.store.below(order.priority)
        free = self.placement.free(row.edge for row in below)
        chosen = victims(below, order.budget, order.priority, free)
        return [row for row in chosen if self.store.change(row.id, "stopping", "preempted")]
