"""The simulator finds nothing wrong in the control plane, and finds each rule that is broken on purpose."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from dsec.cluster import control, database, leases, member, placement, store, watcher
from dsec.cluster.simulator import FAULTS, Scene, World, simulate

SMALL = Scene(live=80, hosts=8, minutes=8, life=80)
BUSY = Scene(live=500, hosts=8, minutes=8, life=60)
"""Creates enough for what needs two rare things at once."""


def p99(world: World) -> float:
    waits = sorted(wait for priority, wait in world.waits if not priority)
    return waits[int(0.99 * len(waits))]


def test_all_faults_at_once() -> None:
    world = simulate(Scene(live=300, hosts=20, life=120))
    assert not world.violations, world.violations
    for state in ("stopped", "failed", "preempted", "lost"):
        assert world.ended[state] > 5, f"the scene must produce some that ended as {state}: {world.ended}"
    assert world.moved and world.abandoned and world.silent and world.queued, "the scene must exercise every path"
    assert sum(world.ended.values()) == world.rows_made
    assert world.recovery and max(world.recovery) < world.scene.terms.ttl


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone(fault: str) -> None:
    world = simulate(replace(SMALL, faults=(fault,)))
    assert not world.violations, world.violations
    if fault in ("stale", "hot"):
        assert not world.rejected and p99(world) < 5, "room enough: nobody is turned away"
    if fault in ("hosts", "slow", "lossy", "servers"):
        assert world.rejected < 0.2 * world.asked, f"{world.rejected} of {world.asked}"
    if fault == "failover":
        assert world.ended.get("lost", 0) == 0, "60 s without a database cost no sandbox"
    if fault == "preempt":
        urgent = [wait for priority, wait in world.waits if priority]
        assert world.ended.get("preempted", 0) > 3, world.ended and max(urgent) < 30


def test_without_faults_nobody_waits_and_load_is_even() -> None:
    loads: list[float] = []

    def watch(world: World) -> None:
        used = [len(host.member.running) for host in world.hosts.values()]
        if 200 < world.clock.time - 1000 < 500:
            loads.append(max(used) / mean(used))

    world = simulate(replace(SMALL, live=400, faults=()), watch)
    assert not world.violations and not world.rejected and world.moved < 0.01 * world.asked
    assert set(world.ended) <= {"stopped", "expired"}
    assert mean(loads) < 1.25, loads


def test_a_flood_does_not_take_another_projects_share() -> None:
    """Twice as much is wanted as fits, the surplus all by red; green (a quarter) and blue (half) get their shares."""
    world = simulate(replace(SMALL, faults=(), slots=10, greedy=2.0))
    assert not world.violations
    shares = world.shares[len(world.shares) // 3 :]
    for name, fair in (("green", 0.25), ("blue", 0.5)):
        assert mean(share[name] for share in shares) == pytest.approx(fair, abs=0.06), name
    assert 0.15 < mean(share["red"] for share in shares) < 0.31, "what is left, less what a stale report hides"
    assert world.queued > 100


def test_a_standby_that_forgot_costs_no_leak() -> None:
    """Without synchronous replication a run may be twice for as long as an orphan lives, and nothing worse happens."""
    world = simulate(replace(SMALL, faults=("amnesia",)))
    assert set(world.violations) <= {"double run", "two owners, one acknowledged"}, world.violations


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hundred_thousand() -> None:
    world = simulate(Scene(live=300_000, hosts=2000, minutes=12, life=1000))
    assert not world.violations, world.violations
    assert world.peak >= 300_000


def test_a_violation_says_what_explains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind names itself when it happens, with the sandbox, its row, its host and its lease."""
    told: list[str] = []
    monkeypatch.setattr(leases.Lease, "check", without_lease_check)
    world = simulate(replace(SMALL, faults=("zone", "stall")), tell=told.append)
    assert world.violations and told == world.notes
    assert {note.split(": ")[1] for note in told} >= {"double run"}, world.violations
    double = next(note for note in told if ": double run: " in note)
    assert "run=run-" in double and "lease_left" in double and "'epoch " in double


# Broken on purpose

SQL = re.sub(r'"\s+"', "", Path(store.__file__).read_text())
"""The store's source with its SQL strings joined."""


def patch(where: Any, name: str, replacement: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(where, name, replacement)


def rewrite(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Changes every SQL statement that has ``old`` in it."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = database.Sqlite._run
        assert old in SQL, "the rule has been rewritten: rewrite its breakage"

        def run(self: database.Sqlite, statement: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
            return plain(self, statement.replace(old, new), parameters)

        monkeypatch.setattr(database.Sqlite, "_run", run)

    return apply


def reconcile_without(field: str) -> Callable[[pytest.MonkeyPatch], None]:
    plain = watcher.reconcile

    def broken(*arguments: Any) -> watcher.Repair:
        return replace(plain(*arguments), **{field: type(getattr(plain(*arguments), field))()})

    return patch(member, "reconcile", broken)


def move_when_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Edge that does not answer is taken for one that refused."""
    monkeypatch.setattr(control.Control, "abandon", lambda self, reservation: self.refused(reservation))


def hasty_watcher(self: watcher.Watcher, *arguments: Any, **named: Any) -> None:
    PLAIN_WATCHER(self, *arguments, **named)
    self._terms = replace(self._terms, fence=20.0, lost=40.0)


def without_lease_check(self: leases.Lease) -> None:
    pass


def first_come(self: placement.FairQueue[Any], live: Any, weight: Any) -> Any:
    projects = self._waiting[max(p for p, projects in self._waiting.items() if projects)]
    name = max(projects, key=lambda name: len(projects[name]))
    item = projects[name].popleft()
    if not projects[name]:
        del projects[name]
    self._count -= 1
    return item


def forgetful_admit(self: member.Member, row: store.Row) -> int:
    self._refused.clear()
    return PLAIN_ADMIT(self, row)


PLAIN_ADMIT = member.Member.admit
PLAIN_WATCHER = watcher.Watcher.__init__

BROKEN: dict[str, tuple[tuple[str, ...], Callable[[pytest.MonkeyPatch], None]]] = {
    "an edge that lost its lease goes on": (("zone", "stall"), patch(leases.Lease, "check", without_lease_check)),
    "the watcher is quicker than the fence": (("zone", "stall"), patch(watcher.Watcher, "__init__", hasty_watcher)),
    "a silent edge counts as one that refused": (("slow",), move_when_in_doubt),
    "a run may live twice": (
        ("zone",),
        rewrite(
            "create unique index if not exists one_live_run on sandboxes (project, run)",
            "create index one_live_run on sandboxes (project)",
        ),
    ),
    "an end may follow an end": (
        ("hosts", "zone", "stall"),
        rewrite(
            " where id = ? and edge = ? and epoch = ? and ended is null returning project",
            " where id = ? and edge = ? and epoch >= ? - 9 returning project",
        ),
    ),
    "orphans stay": (("amnesia",), reconcile_without("orphans")),
    "rows that nobody runs stay": (("lossy", "servers"), reconcile_without("missing")),
    "what must stop goes on": (("lossy", "slow"), reconcile_without("stop")),
    "a row given up may start late": (("slow",), patch(member.Member, "admit", forgetful_admit)),
    "rows of an old epoch stay": (
        ("restart", "lossy"),
        patch(store.Store, "sweep", lambda self, now: []),
    ),
    "hosts are lost without their sandboxes": (
        ("hosts",),
        patch(store.Store, "_lose", lambda self, run, edge, epoch, now: []),
    ),
    "no host is ever lost": (("hosts",), patch(store.Store, "fence", lambda self, *arguments: None)),
    "a key is looked at once": (
        ("lossy", "servers"),
        rewrite(
            "insert into requests values (?, ?, ?, ?, ?) on conflict do nothing",
            "insert or replace into requests values (?, ?, ?, ?, ?)",
        ),
    ),
    "the live count is not given back": (("hosts",), patch(store.Store, "_release", lambda self, run, projects: None)),
    "an edge takes more than fits": (("preempt",), patch(member.Member, "_over", lambda self, budget: "")),
    "a host's books are not cleared": (
        ("hosts",),
        patch(member.Member, "_count", lambda self, budget, sign: setattr(self, "_used", budget)),
    ),
    "placements are never settled": (("hosts",), patch(placement.Placement, "settle", lambda self, id, counted: None)),
}


def test_an_unfair_queue_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.FairQueue, "pop", first_come)
    with pytest.raises(AssertionError):
        test_a_flood_does_not_take_another_projects_share()


def test_a_black_hole_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a rest for those who do not answer, the empty silent host is everybody's first choice."""
    calm = simulate(replace(SMALL, faults=("slow",)))
    monkeypatch.setattr(placement.Placement, "rest", lambda self, edge, now, seconds: None)
    assert simulate(replace(SMALL, faults=("slow",))).abandoned > 2 * calm.abandoned


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults, breakage = BROKEN[name]
    scene = replace(BUSY if name == "rows of an old epoch stay" else SMALL, faults=faults)
    breakage(monkeypatch)
    for seed in range(4):
        if simulate(replace(scene, seed=seed)).violations:
            return
    pytest.fail("the simulator saw nothing")
