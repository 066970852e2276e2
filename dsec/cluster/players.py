"""Who plays in the simulator: a database that fails over, hosts that die, clients that do not give up, API servers.

What they drive is real: `Member`, `Control` and `Store`.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from dsec.cluster.control import Control, Order, Reservation
from dsec.cluster.database import Execute, Sqlite
from dsec.cluster.errors import StoreUnavailable
from dsec.cluster.member import Member, end_state
from dsec.cluster.placement import Refusal, StartRate
from dsec.cluster.store import Budget, Edge, Row, Store
from dsec.errors import Capacity, DsecError, Fenced

if TYPE_CHECKING:
    from dsec.cluster.simulator import World


CRASH = 120.0
"""Mean seconds that an API server lives, whatever the number of its clients."""


class FlakyDatabase(Sqlite):
    """SQLite in memory that can be away; ``doubtful`` commits then still happen, with their answer lost.

    Its transactions are savepoints of one that never ends: a commit of an in-memory database walks its whole page table
    (pages beyond its lock page are dropped), 0.1 ms of 0.2 for a create at 250,000 rows."""

    def __init__(self) -> None:
        super().__init__(":memory:")
        self.away, self.doubtful = False, 0
        self._connection.execute("begin")

    @contextmanager
    def transaction(self, durable: bool = False) -> Iterator[Execute]:
        if self.away and self.doubtful <= 0:
            raise StoreUnavailable("failing over")
        self._connection.execute("savepoint one")
        try:
            yield self._run
        except BaseException:
            self._connection.execute("rollback to one")
            self._connection.execute("release one")
            raise
        self._connection.execute("release one")
        if self.away:
            self.doubtful -= 1
            raise StoreUnavailable("the answer was lost")

    def look(self) -> sqlite3.Cursor:
        """Reads past what is played: for those who explain."""
        return self._connection.cursor()


class Host:
    """A host that can die, stall, be cut off or be slow, with the real `Member` on it."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.name, self.zone = world, f"h{number}", number % 5
        self.alive = self.connected = True
        self.stalled, self.slow, self.boots = False, 0.0, 0
        self.member: Member
        self.boot()

    def boot(self) -> None:
        scene, self.boots = self.world.scene, self.boots + 1
        capacity = Budget(self.world.slots, 512 * self.world.slots, 0, 100 * self.world.slots)
        edge = Edge(self.name, f"z{self.zone}", capacity=capacity)
        rate = StartRate(self.world.clock.monotonic(), rate=50.0)
        self.member = Member(Reach(self.world.store, self), self.world.clock, edge, scene.terms, rate)  # type: ignore[arg-type]
        self.member.images |= {f"i{n}" for n in self.world.rng.sample(range(50), 8)}
        self.alive, boot = True, self.boots
        self.world.after(self.world.rng.random() * 2, self.join, boot)
        self.world.after(self.world.rng.random() * scene.terms.renew, self.beat, boot)
        self.world.after(self.world.rng.random() * 30, self.look, boot)

    def join(self, boot: int) -> None:
        if boot == self.boots and self.alive:
            try:
                self.member.join()
            except StoreUnavailable:
                self.world.after(1.0, self.join, boot)

    def wake(self) -> None:
        """The host goes on after a stall. The worst order: first a program ends, then the lease is looked at."""
        self.stalled = False
        if not self.alive:  # it lost power meanwhile
            return
        for id in list(self.member.running)[:5]:
            self.over(id, self.boots)
        for id in self.member.heartbeat() if self.member.lease.epoch else ():
            self.destroy(id, "lost", "fenced")

    def die(self) -> None:
        """Power off: whatever ran here runs no more."""
        self.alive = False
        self.boots += 1
        for id in list(self.member.running):
            self.world.gone(id, self)

    def beat(self, boot: int) -> None:
        if boot != self.boots or not self.alive:
            return
        self.world.after(self.world.scene.terms.renew, self.beat, boot)
        if self.stalled:
            return
        member, joined = self.member, self.member.lease.epoch > 0
        self.flush()
        doomed = member.heartbeat() if joined else []
        for id in doomed:
            self.destroy(id, "lost", "fenced")
        if joined and member.lease.left() <= 0:
            self.join(boot)

    def flush(self) -> None:
        if self.member.lease.epoch:
            self.member.flush()

    def look(self, boot: int) -> None:
        if boot != self.boots or not self.alive:
            return
        self.world.after(30.0, self.look, boot)
        if not self.stalled and self.member.lease.epoch:
            for id, reason in self.member.reconcile().items():
                self.destroy(id, end_state(reason), reason)

    def start(self, row: Row, answer: Callable[[int | DsecError], None]) -> None:
        """A start message has arrived."""
        if not self.alive:
            return
        if self.stalled:  # it lies in the socket until the host goes on
            self.world.after(5.0, self.start, row, answer)
            return
        fresh = row.id not in self.member.running
        try:
            counted = self.member.admit(row)
        except (Capacity, Fenced) as error:
            self.world.send(answer, error, host=self)
            return
        if fresh:
            cold = row.spec["image"] not in self.member.images
            self.member.images.add(row.spec["image"])
            self.member.rate.record(0.02 + 0.3 * cold * self.world.rng.random())
            self.world.runs(row, self)
            life, left = self.world.rng.expovariate(1 / row.spec["life"]), row.deadline - self.world.clock.time
            if life < left:
                self.world.after(life, self.over, row.id, self.boots)
            else:
                self.world.after(max(0.0, left), self.destroy, row.id, "expired", "deadline")
        self.world.send(answer, counted, host=self)

    def over(self, id: str, boot: int) -> None:
        """The program has done its work; its result counts only if the lease is held."""
        if boot != self.boots or id not in self.member.running:
            return
        if self.stalled:
            self.world.after(5.0, self.over, id, boot)
            return
        try:
            self.member.lease.check()
        except Fenced:
            return
        self.world.result(id, self)
        self.destroy(id, "stopped", "done")

    def destroy(self, id: str, state: str, reason: str) -> None:
        if self.alive and id in self.member.running:
            if self.stalled:
                self.world.after(5.0, self.destroy, id, state, reason)
                return
            self.member.ended(id, state, reason)
            self.world.gone(id, self)

    def stop(self, id: str) -> None:
        """An API server's kill, sent straight to the Edge."""
        if self.alive and not self.stalled and not self.member.refuse(id):
            self.destroy(id, "stopped", "killed")


class Reach:
    """The store as one host reaches it: not at all while it is cut off."""

    def __init__(self, store: Store, host: Host) -> None:
        self._store, self._host = store, host

    def __getattr__(self, name: str) -> Any:
        if not self._host.connected:
            raise StoreUnavailable("cut off")
        return getattr(self._store, name)


class Task:
    """One client's wish: one run, done once."""

    def __init__(self, world: World, number: int, project: str, priority: int = 0) -> None:
        self.world, self.number, self.project, self.priority = world, number, project, priority
        hot = "hot" in world.scene.faults and world.rng.random() < 0.5
        self.image = "i7" if hot else f"i{world.rng.randrange(50)}"
        self.attempt = self.tries = self.refused = 0
        self.began = world.clock.time
        self.answered = self.finished = False
        self.story: list[tuple[float, str]] = []
        """What went wrong since it began to wait, and when."""

    def note(self, what: str) -> None:
        self.story.append((round(self.world.clock.time - 1000.0, 1), what))

    def done(self) -> bool:
        """The queue asks whether anybody still waits."""
        return self.answered or self.world.closed

    def order(self) -> Order:
        scene, key = self.world.scene, f"t{self.number}-{self.attempt}"
        spec = {"image": self.image, "life": scene.life, "task": self.number, "key": key}
        return Order(
            self.project,
            Budget(1, 256 + 64 * (self.number % 4), 0, 32),
            self.image,
            timeout=6 * scene.life,
            priority=self.priority,
            run=f"run-{self.number}",
            key=key,
            digest="d",
            spec=spec,
        )

    def ask(self) -> None:
        """Asks some API server; a client that hears nothing asks another one with the same key."""
        if self.finished or self.world.closed:
            return
        self.answered = False
        self.tries += 1
        self.world.asked += 1
        self.world.after(45.0, self.silence, self.tries)
        self.world.send(self.world.rng.choice(self.world.servers).create, self)

    def silence(self, tries: int) -> None:
        if tries == self.tries and not self.answered:
            self.answered = True  # whoever has it queued drops it
            self.world.silent += 1
            self.note("no answer in 45 s")
            self.ask()

    def told(self, id: str | None, error: DsecError | Refusal | None = None) -> None:
        if self.answered:
            return
        self.answered = True
        if id is None:
            self.world.rejected += 1
            self.note(str(error))
            self.world.refusals[type(error).__name__] += 1
            self.attempt += 1
            self.refused += 1
            pause = min(45.0, 5.0 * 2.0 ** min(self.refused - 1, 5))
            self.world.after(pause * (0.7 + 0.6 * self.world.rng.random()), self.ask)
        else:
            self.refused = 0
            self.world.started(self)
            self.story.clear()
            if id in self.world.rows:
                self.world.holders[id] = self
            else:
                self.again()

    def cut_off(self, id: str) -> None:
        """The sandbox does not answer. Whether it still runs, nobody here can tell: resume the run."""
        if self.world.holders.pop(id, None) and not self.finished:
            self.again()

    def again(self) -> None:
        """The sandbox is gone without having done its work: resume the run in a new one."""
        self.attempt += 1
        self.began = self.world.clock.time
        self.world.after(2 + 3 * self.world.rng.random(), self.ask)


class ApiServer:
    """One stateless server around the real `Control`."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number, self.dying = world, number, False
        self.fresh()
        if "servers" in world.scene.faults:
            world.after(world.rng.expovariate(1 / CRASH), self.doom)
        world.after(world.rng.random(), self.refresh)
        world.after(world.rng.random(), self.pump)

    def fresh(self) -> None:
        rng = random.Random(self.world.rng.random())
        name = lambda: f"{rng.getrandbits(128):032x}"  # noqa: E731
        self.control = Control(self.world.store, self.world.clock, rng, self.world.scene.servers, name)
        self.boots = getattr(self, "boots", 0) + 1

    def doom(self) -> None:
        self.dying = True

    def crash(self) -> None:
        """Forgets all, its queue and what it was about to send included."""
        self.dying = False
        self.fresh()
        self.world.after(self.world.rng.expovariate(1 / CRASH), self.doom)

    def refresh(self) -> None:
        self.world.after(5.0 if "stale" in self.world.scene.faults else 1.0, self.refresh)
        with suppress(StoreUnavailable):
            self.control.refresh()

    def create(self, task: Task) -> None:
        order, clock, known = task.order(), time.perf_counter(), len(self.control.queue)
        answers = list(self.control.submit(order, task))
        self.world.deciding += time.perf_counter() - clock
        self.world.decisions += 1
        self.take(answers)
        if len(self.control.queue) > known:
            self.world.queued += 1
            if order.priority:
                self.urge(order)

    def urge(self, order: Order) -> None:
        """Gives the notice to the Edges of those who must make room."""
        try:
            rows = self.control.make_room(order)
        except StoreUnavailable:
            return
        for row in rows:
            self.world.preempted += 1
            host = self.world.hosts[row.edge]
            self.world.after(self.world.notice, host.destroy, row.id, "preempted", "preempted")

    def pump(self) -> None:
        self.world.after(0.5, self.pump)
        self.take(self.control.pump())

    def take(self, answers: Iterable[tuple[Task, Order, Reservation | DsecError]]) -> None:
        for task, _, answer in answers:
            if isinstance(answer, DsecError):
                self.world.send(task.told, None, answer)
            else:
                self.dispatch(answer, task)

    def dispatch(self, reservation: Reservation, task: Task) -> None:
        row = reservation.row
        if row.ended is not None:
            self.world.send(task.told, None, Capacity("that create has failed"))
            return
        host, boots, heard = self.world.hosts[row.edge], self.boots, [False]

        def answer(got: int | DsecError) -> None:
            if heard[0] or boots != self.boots:
                return
            heard[0] = True
            if isinstance(got, int):
                self.control.started(reservation, got)
                self.world.send(task.told, row.id)
                return
            self.world.moved += 1
            try:
                other = self.control.refused(reservation, bool(got.fields.get("full")))
            except DsecError as error:
                self.world.send(task.told, None, error)
                return
            if isinstance(other, Refusal):
                self.control.again(reservation.order, task)
            else:
                self.dispatch(other, task)

        def silence() -> None:
            if not heard[0] and boots == self.boots:
                heard[0] = True
                self.world.abandoned += 1
                with suppress(StoreUnavailable):
                    self.control.abandon(reservation)
                self.world.send(host.stop, row.id, host=host)
                self.world.send(task.told, None, Capacity("the Edge did not answer"))

        if self.dying:
            self.crash()
            return
        self.world.send(host.start, row, answer, slow=host.slow, host=host)
        self.world.after(10.0, silence)
