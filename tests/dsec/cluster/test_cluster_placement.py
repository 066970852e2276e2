"""Placement, start rate, fair queue and victims, each by itself."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dsec.cluster import placement as module
from dsec.cluster.placement import Bag, FairQueue, Placement, Refusal, Report, StartRate, victims
from dsec.cluster.store import Budget, Row


def cluster(hosts: int, slots: int = 100, images: dict[int, str] | None = None, rate: float = 1e9) -> Placement:
    view = Placement(random.Random(0))
    for number in range(hosts):
        held = frozenset({images[number]} if images and number in images else ())
        view.report(Report(f"h{number}", Budget(slots, 1000, 0, 0), Budget(0), 0, rate, held), 0.0)
    return view


def fullest(choices: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "DRAWS", choices)
    view = cluster(500)
    loads = Counter(view.place(str(n), Budget(1), "?", 1.0) for n in range(25_000))
    return max(loads.values())


def test_two_choices_even_the_load_and_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fullest(2, monkeypatch) <= 54  # of 50 on average
    assert fullest(1, monkeypatch) > 60


def test_an_image_draws_sandboxes_until_its_hosts_are_fuller() -> None:
    view = cluster(50, images={0: "warm", 1: "warm"})
    chosen = [str(view.place(str(n), Budget(1), "warm", 1.0)) for n in range(300)]
    assert set(chosen[:40]) == {"h0", "h1"}
    assert 40 < sum(name in ("h0", "h1") for name in chosen) < 70 and len(set(chosen)) > 40, "a hot image spreads"


@pytest.mark.parametrize("budget", [Budget(1), Budget(1, 600), Budget(0, 1001)])
def test_no_budget_is_ever_passed(budget: Budget) -> None:
    view = cluster(3, slots=2)
    placed = Counter(
        str(place) for n in range(20) if not isinstance(place := view.place(str(n), budget, "", 1.0), Refusal)
    )
    fits = 0 if budget.memory > 1000 else 1 if budget.memory else 2
    assert sorted(placed.values()) == [fits] * (3 if fits else 0)
    refusal = view.place("x", budget, "", 1.0)
    assert isinstance(refusal, Refusal) and refusal.full


def test_placements_count_until_a_report_counts_them() -> None:
    view = cluster(1, slots=2)
    report = Report("h0", Budget(2, 1000), Budget(0), 1, 1e9)
    assert view.place("a", Budget(1), "", 1.0) == view.place("b", Budget(1), "", 1.0) == "h0"
    view.report(report, 2.0)  # written before it had heard of either
    assert isinstance(view.place("c", Budget(1), "", 2.0), Refusal)
    view.settle("a", 2)
    view.settle("b", None)
    assert view.booked() == ["a"]
    assert view.place("c", Budget(1), "", 2.0) == "h0"
    view.settle("c", 2)
    view.report(Report("h0", Budget(2, 1000), Budget(1), 2, 1e9), 3.0)
    assert view.booked() == [] and view.free()["h0"].slots == 1


def test_a_lost_host_gets_nothing_until_it_reports() -> None:
    view = cluster(2)
    view.place("a", Budget(1), "", 1.0)
    view.lost("h0")
    assert {view.place(str(n), Budget(1), "", 1.0) for n in range(20)} == {"h1"}
    view.lost("h1")
    refusal = view.place("b", Budget(1), "", 1.0)
    assert isinstance(refusal, Refusal) and refusal.full and len(view) == 0
    view.report(Report("h0", Budget(2), Budget(0), 0, 1e9), 2.0)
    assert view.place("b", Budget(1), "", 2.0) == "h0"


def test_start_rate_says_when_to_come_back() -> None:
    view = cluster(2, rate=2.0)
    placed = [view.place(str(n), Budget(1), "", 1.0) for n in range(6)]
    assert sum(not isinstance(place, Refusal) for place in placed) == 4  # two hosts, one second's burst each
    refusal = placed[-1]
    assert isinstance(refusal, Refusal) and not refusal.full and refusal.retry == pytest.approx(0.5)
    assert not isinstance(view.place("later", Budget(1), "", 1.5), Refusal)


def test_silence_is_answered_with_rest() -> None:
    view = cluster(2)
    view.rest("h0", 1.0, 30.0)
    assert {view.place(f"a{n}", Budget(1), "", 2.0) for n in range(20)} == {"h1"}
    assert "h0" in {view.place(f"b{n}", Budget(1), "", 32.0) for n in range(20)}


def test_servers_share_the_start_rate_of_a_host() -> None:
    view = Placement(random.Random(0), servers=4)
    view.report(Report("h0", Budget(100), Budget(0), 0, rate=8.0), 0.0)
    assert sum(view.place(str(n), Budget(1), "", 10.0) == "h0" for n in range(20)) == 2


def test_rate_falls_when_starts_are_slow_and_rises_while_wanted() -> None:
    rate = StartRate(0.0, rate=10.0)
    assert sum(rate.take(0.0) for _ in range(20)) == 10
    assert rate.adjust() == 11.0, "somebody was refused and starts are quick"
    for _ in range(20):
        rate.record(2.0)
    assert rate.adjust() == pytest.approx(22 / 3)
    assert rate.adjust() == pytest.approx(22 / 3), "nobody wants more"
    assert rate.adjust(pressure=0.9) < 5.5
    for _ in range(50):
        rate.adjust(pressure=0.9)
    assert rate.rate == 4.0


def test_queue_serves_priority_then_share_then_age() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(4):
        queue.push("many", 0, f"many{n}")
    queue.push("few", 0, "few0")
    queue.push("many", 5, "urgent")
    live = {"many": 8.0, "few": 9.0}
    assert queue.pop(live, {"few": 2.0}) == "urgent"
    assert queue.pop(live, {"few": 2.0}) == "few0", "9 of weight 2 is less than 8 of weight 1"
    assert [queue.pop(live, {}) for _ in range(4)] == ["many0", "many1", "many2", "many3"]
    with pytest.raises(IndexError):
        queue.pop(live, {})


def test_bag_against_a_set() -> None:
    rng, bag, plain = random.Random(1), Bag[int](), set[int]()
    for _ in range(3000):
        item = rng.randrange(40)
        if rng.random() < 0.5:
            bag.add(item)
            plain.add(item)
        else:
            bag.discard(item)
            plain.discard(item)
        assert len(bag) == len(plain) and set(bag.from_(rng.random())) == plain
        assert not plain or bag.any(rng.random()) in plain


def test_victims_are_the_least_important_the_fewest_and_the_youngest() -> None:
    def row(id: str, edge: str, priority: int, created: float, memory: int = 100) -> Row:
        return Row(id, "p", id, edge, 1, Budget(1, memory), priority, created=created)

    rows = [row("old", "a", 0, 1), row("young", "b", 0, 9), row("high", "c", 5, 5), row("big", "d", 1, 5, 900)]
    none = Budget(0, 0, 2**62, 2**62)
    free = dict.fromkeys("abcd", none)
    assert [r.id for r in victims(rows, Budget(1, 100), 3, free)] == ["young"]
    assert [r.id for r in victims(rows, Budget(1, 500), 3, free)] == ["big"]
    assert victims(rows, Budget(1, 100), 0, free) == [] == victims(rows, Budget(2, 5000), 9, free)
    assert [r.id for r in victims(rows, Budget(1, 150), 3, free | {"a": Budget(0, 50, 2**62, 2**62)})] == ["old"]


def test_what_comes_from_stock_costs_no_start() -> None:
    view = cluster(1, rate=2.0)
    for n in range(50):
        assert view.place(str(n), Budget(1), "?", 1.0) == "h0"
        view.settle(str(n), None)
        view.refund("h0")
    for n in range(2):  # the second's own two starts are still there
        assert view.place(f"cold{n}", Budget(1), "?", 1.0) == "h0"
    assert isinstance(view.place("cold2", Budget(1), "?", 1.0), Refusal)


def test_what_ended_makes_room_before_the_next_report() -> None:
    view = cluster(1, slots=2)
    for n in range(2):
        assert view.place(str(n), Budget(1), "?", 1.0) == "h0"
    view.settle("0", 7)
    assert view.place("2", Budget(1), "?", 1.0) == Refusal(True, 1.0)
    view.ended("0", "h0", Budget(1))
    assert view.place("2", Budget(1), "?", 1.0) == "h0"
    view.report(Report("h0", Budget(2, 1000, 0, 0), Budget(2), 8, 1e9), 2.0)  # "1" and "2" are in it, "2" also booked
    view.settle("1", 8)
    view.settle("2", 8)
    view.ended("1", "h0", Budget(1))
    assert view.place("3", Budget(1), "?", 2.0) == "h0"
    assert view.place("4", Budget(1), "?", 2.0) == Refusal(True, 1.0)
