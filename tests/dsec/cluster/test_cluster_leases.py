"""Leases, admission, the watcher and reconciliation on a clock that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dsec.cluster.clock import VirtualClock
from dsec.cluster.errors import StoreUnavailable
from dsec.cluster.leases import Lease, Terms
from dsec.cluster.member import Member
from dsec.cluster.node import Node
from dsec.cluster.players import FlakyDatabase
from dsec.cluster.store import Budget, Edge, Project, Row, Store
from dsec.cluster.watcher import Watcher
from dsec.edge.edge import Edge as HostEdge
from dsec.errors import Capacity, Fenced

TERMS = Terms()


class Small:
    """One Edge, one watcher, one clock."""

    def __init__(self) -> None:
        self.clock, self.database = VirtualClock(100.0), FlakyDatabase()
        self.store = Store(self.database)
        self.store.put_project(Project("p", max_live=100))
        self.member = self.edge()
        self.watcher = Watcher(self.store, self.clock, TERMS)

    def edge(self) -> Member:
        member = Member(self.store, self.clock, Edge("e", capacity=Budget(3, 1000)), TERMS)
        member.join()
        return member

    def row(self, id: str, **changes: Any) -> Row:
        values = {"budget": Budget(1, 100), "deadline": 1e9} | changes
        return self.store.create(Row(id, "p", id, "e", self.member.lease.epoch, **values))

    def pass_(self, seconds: float, beating: bool = True) -> list[str]:
        lost = []
        for _ in range(round(seconds)):
            self.clock.time += 1
            if beating and self.clock.time % TERMS.renew == 0:
                self.member.heartbeat()
            lost += self.watcher.tick().lost
        return lost

    def state(self, id: str) -> str:
        row = self.store.get("p", id)
        assert row
        return row.state


@pytest.fixture
def small() -> Small:
    return Small()


@pytest.mark.parametrize("terms", [(50, 90, 110, 120), (5, 110, 110, 120), (5, 90, 120, 120)])
def test_terms_that_could_run_something_twice_are_refused(terms: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="does not hold"):
        Terms(*terms)


def test_an_edge_is_fenced_before_anybody_gives_it_up(small: Small) -> None:
    small.member.admit(small.row("a"))
    assert small.pass_(TERMS.fence - 1, beating=False) == []
    small.member.lease.check()
    assert small.pass_(2, beating=False) == []
    with pytest.raises(Fenced):
        small.member.lease.check()
    assert small.member.heartbeat() == ["a"], "what must be destroyed now"
    assert small.pass_(TERMS.lost - TERMS.fence, beating=False) == ["a"]
    assert small.state("a") == "lost"


def test_time_counts_from_the_moment_a_renewal_was_sent(small: Small) -> None:
    class Slow(Store):
        def renew(self, *arguments: Any) -> bool:
            small.clock.time += 40
            return super().renew(*arguments)

    lease = Lease(Slow(small.database), small.clock, Edge("x"), TERMS)
    lease.acquire()
    lease.renew({})
    assert lease.left() == TERMS.fence - 40


def test_a_database_that_is_away_costs_no_lease_and_proves_no_loss(small: Small) -> None:
    small.member.admit(small.row("a"))
    small.pass_(10)
    small.database.away = True
    assert small.pass_(80) == []
    small.member.lease.check()
    small.database.away = False
    assert small.pass_(200) == [] and small.state("a") == "live"


def test_a_renewal_that_hangs_past_the_lease_and_fails_ends_everything(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database takes the call and dies with it 95 s later: what runs must end before the Edge joins anew, or it
    would run on, unknown to all, beside its successor."""
    small.member.admit(small.row("a"))

    def hang(*arguments: Any) -> bool:
        small.clock.time += TERMS.fence + 5
        raise StoreUnavailable("hung")

    monkeypatch.setattr(small.store, "renew", hang)
    assert small.member.heartbeat() == ["a"]
    with pytest.raises(Fenced):
        small.member.lease.check()


def test_a_lease_that_ends_right_after_its_heartbeat_ends_everything(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small.member.admit(small.row("a"))
    node = Node(HostEdge(tmp_path), small.store, small.member.lease.edge)
    node.member, destroy, heartbeat = small.member, node._destroy, small.member.heartbeat
    destroyed: dict[str, str] = {}

    def late(pressure: float) -> list[str]:
        doomed = heartbeat(pressure)
        small.clock.time += TERMS.fence + 5
        return doomed

    async def seen(ids: Mapping[str, str]) -> None:
        destroyed.update(ids)
        await destroy(ids)

    monkeypatch.setattr(small.member, "heartbeat", late)
    monkeypatch.setattr(node, "_destroy", seen)
    asyncio.run(node._beat())
    assert destroyed == {"a": "lost"} and not small.member.running
    small.member.lease.check()


def test_a_new_watcher_waits_before_it_judges(small: Small) -> None:
    small.member.admit(small.row("a"))
    small.pass_(TERMS.lost - 5, beating=False)
    small.watcher = Watcher(small.store, small.clock, TERMS)
    assert small.pass_(TERMS.lost - 5, beating=False) == []
    assert small.pass_(10, beating=False) == ["a"]


def test_a_second_edge_of_the_same_name_fences_the_first(small: Small) -> None:
    first = small.member
    first.admit(small.row("a"))
    small.member = small.edge()
    assert first.heartbeat() == ["a"] and small.state("a") == "lost"
    with pytest.raises(Fenced):
        first.admit(Row("b", "p", "b", "e", 1))
    with pytest.raises(Fenced, match="epoch 1"):
        small.member.admit(Row("b", "p", "b", "e", 1))


def test_admission_is_hard_and_repeatable(small: Small) -> None:
    rows = [small.row(name) for name in "abcd"]
    assert small.member.admit(rows[0]) == small.member.admit(rows[0])
    small.member.admit(rows[1])
    with pytest.raises(Capacity, match="1100 memory of 1000"):
        small.member.admit(small.row("big", budget=Budget(1, 900)))
    small.member.admit(rows[2])
    with pytest.raises(Capacity, match="4 slots of 3"):
        small.member.admit(rows[3])
    small.member.ended("a", "stopped")
    small.member.admit(rows[3])
    assert small.member.report().used == Budget(3, 300)
    small.member.rate.rate = 0.001
    small.member.ended("b", "stopped")
    with pytest.raises(Capacity, match="a second"):
        for name in "efghijklmnopqrstuvwxyz":
            small.member.admit(small.row(name))
            small.member.ended(name, "stopped")


def test_ends_are_kept_until_the_store_took_them(small: Small) -> None:
    small.member.admit(small.row("a"))
    small.member.ended("a", "stopped", "bye")
    small.database.away = True
    assert small.member.flush() == []
    small.database.away = False
    assert small.member.flush() == ["a"] and small.state("a") == "stopped" and small.member.flush() == []


def test_an_answer_that_was_lost_is_asked_for_again(small: Small) -> None:
    small.member.admit(small.row("a"))
    small.member.ended("a", "stopped")
    small.database.away, small.database.doubtful = True, 1
    assert small.member.flush() == [], "it happened, but nobody heard"
    small.database.away = False
    assert small.member.flush() == [] and small.state("a") == "stopped"
    assert small.store.projects()[0].live == 0


def test_reconcile_stops_sweeps_and_reports(small: Small) -> None:
    for name in ("wanted", "unwanted", "orphan"):
        small.member.admit(small.row(name))
    small.row("never")
    small.store.change("unwanted", "stopping", "preempted")
    small.store.finish([("orphan", "e", 1, "failed", "")], 1.0)
    assert small.member.reconcile() == {"unwanted": "preempted", "orphan": "orphan"}
    small.member.flush()
    assert small.state("never") == "live", "its start may be on the way"
    small.member.reconcile()
    small.member.flush()
    assert small.state("never") == "failed"
    with pytest.raises(Capacity, match="given up"):
        small.member.admit(Row("never", "p", "never", "e", 1))


def test_the_watcher_stops_what_an_edge_forgot_to_end(small: Small) -> None:
    small.member.admit(small.row("a", deadline=150.0))
    small.pass_(100)
    assert small.state("a") == "live"
    small.pass_(15)
    assert small.state("a") == "stopping" and small.member.reconcile() == {"a": "expired"}


def test_an_edge_process_that_restarts_keeps_its_sandboxes(small: Small) -> None:
    small.member.admit(small.row("a"))
    again = Member(small.store, small.clock, Edge("e", capacity=Budget(3)), TERMS)
    again.join(keep={"a": Budget(1, 100)})
    small.member = again
    assert small.pass_(300) == [] and small.state("a") == "live" and again.reconcile() == {}


def test_the_store_says_when_it_is_away(small: Small) -> None:
    small.database.away = True
    with pytest.raises(StoreUnavailable):
        small.store.projects()


class Jumping(VirtualClock):
    """Wall time that somebody sets; only `monotonic` is true."""

    off = 0.0

    def now(self) -> float:
        return self.time + self.off


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_costs_no_lease(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """A day back or on: nobody is fenced and nobody given up. (A deadline is wall time, and follows the clock.)"""
    clock = Jumping(100.0)
    monkeypatch.setattr(f"{__name__}.VirtualClock", lambda time: clock)
    small = Small()
    small.member.admit(small.row("a"))
    small.pass_(30)
    clock.off = jump
    assert small.pass_(60) == [] and small.member.heartbeat() == []
    assert small.state("a") == "live"
    assert len(small.pass_(TERMS.ttl, beating=False)) == 1, "and a silent one is still given up within the ttl"
