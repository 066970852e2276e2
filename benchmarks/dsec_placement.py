"""Placement decisions per second of processor time: two choices with image affinity, 2,000 hosts, 300,000 live.

The peer in the same run is a plain scan for the least loaded host, what a scheduler without draws does.

    python benchmarks/dsec_placement.py
"""

from __future__ import annotations

import os
import random
import time

from dsec.cluster.placement import Placement, Refusal, Report
from dsec.cluster.store import Budget

HOSTS, SLOTS, LIVE, CHURN = 2000, 200, 300_000, 100_000


def placement() -> tuple[float, float]:
    rng = random.Random(0)
    view = Placement(rng)
    images = [f"i{n}" for n in range(500)]
    for n in range(HOSTS):
        held = frozenset(rng.sample(images, 8))
        view.report(Report(f"h{n}", Budget(SLOTS, 400_000, 0, 30_000), Budget(0), 0, 1e9, held), 0.0)
    budget, live = Budget(1, 512, 0, 32), []
    began = time.process_time()
    for n in range(LIVE):
        place = view.place(str(n), budget, images[n % 500], 1.0)
        assert not isinstance(place, Refusal)
        live.append(str(n))
    filled = time.process_time()
    for n in range(LIVE, LIVE + CHURN):
        view.settle(live[rng.randrange(LIVE)], None)
        view.place(str(n), budget, images[n % 500], 1.0)
    ended = time.process_time()
    return LIVE / (filled - began), CHURN / (ended - filled)


def scan(decisions: int = 2000) -> float:
    loads = [random.randrange(SLOTS) for _ in range(HOSTS)]
    began = time.process_time()
    for _ in range(decisions):
        best = min(range(HOSTS), key=loads.__getitem__)
        loads[best] += 1
    return decisions / (time.process_time() - began)


if __name__ == "__main__":
    print(f"load {os.getloadavg()[0]:.2f} before")
    fill, churn = placement()
    print(f"two choices: {fill:,.0f} decisions/s filling {LIVE:,}, {churn:,.0f}/s with as many ends (bar: 50,000)")
    print(f"least-loaded scan of {HOSTS:,} hosts: {scan():,.0f} decisions/s")
    print(f"load {os.getloadavg()[0]:.2f} after")
