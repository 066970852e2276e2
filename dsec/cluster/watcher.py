"""Makes what is and what should be agree. Soft state only: a watcher that starts anew waits, and knows.

The `Watcher` looks at leases and deadlines of the whole cluster; any number of them may run, since all it does is
compare-and-set. `reconcile` looks at one Edge, and runs there: the Edge knows what runs, the store what should.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dsec.cluster.clock import Clock
from dsec.cluster.errors import StoreUnavailable
from dsec.cluster.leases import Terms
from dsec.cluster.store import Row, Store


@dataclass(slots=True)
class _Seen:
    epoch: int
    seq: int
    silent: float = 0.0


@dataclass(frozen=True, slots=True)
class Findings:
    """What one look changed."""

    edges: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    overdue: list[str] = field(default_factory=list)


class Watcher:
    """Call `tick` every second or so."""

    def __init__(self, store: Store, clock: Clock, terms: Terms, grace: float = 60.0, keep: float = 3600.0) -> None:
        """``grace``: seconds past its deadline that an Edge has for ending a sandbox by itself; ``keep``: seconds that
        an ended sandbox stays in the store."""
        self._store, self._clock, self._terms, self._grace, self._keep = store, clock, terms, grace, keep
        self._seen: dict[str, _Seen] = {}
        self._last: float | None = None
        self._swept = clock.monotonic()

    def tick(self) -> Findings:
        """One look. A store that does not answer stops the watch: silence counts only while we could have heard."""
        found = Findings()
        try:
            beats = self._store.beats()
            now = self._clock.monotonic()
            passed = 0.0 if self._last is None else now - self._last
            self._last = now
            for edge, epoch, seq, up in beats:
                seen = self._seen.get(edge)
                if seen is None or seen.seq != seq or seen.epoch != epoch:
                    self._seen[edge] = _Seen(epoch, seq)
                elif up:
                    seen.silent += passed
                    if seen.silent >= self._terms.lost:
                        ids = self._store.fence(edge, epoch, seq, self._clock.now())
                        if ids is not None:
                            found.edges.append(edge)
                            found.lost.extend(ids)
            for row in self._store.overdue(self._clock.now() - self._grace):
                if self._store.change(row.id, "stopping", "expired"):
                    found.overdue.append(row.id)
            if now - self._swept >= 30:
                self._swept = now
                found.lost.extend(self._store.sweep(self._clock.now()))
                self._store.purge(self._clock.now() - self._keep)
        except StoreUnavailable:
            self._last = None
        return found


@dataclass(frozen=True, slots=True)
class Repair:
    """What an Edge must do: end what nobody wants, and report what is not there."""

    stop: dict[str, str]
    """id -> reason: wanted no more."""
    orphans: list[str]
    """Running, but the store does not know them as this Edge's: destroy, nothing to report."""
    missing: list[str]
    """The Edge's by the store, never started or vanished: they end as failed."""


def reconcile(
    rows: Collection[Row], running: Collection[str], known: Collection[str], waited: Mapping[str, int]
) -> Repair:
    """Compares an Edge's live rows with what it runs.

    ``known``: ids whose end the Edge has seen and will report. ``waited``: for how many looks a row that does not run
    has been seen; a row is written before its Edge hears of it, so the first look proves nothing. ``rows`` must have
    been read *after* ``running``: the row of whatever runs was there before it.
    """
    ours = {row.id: row for row in rows}
    return Repair(
        stop={row.id: row.reason or "stopped" for row in rows if row.state == "stopping" and row.id in running},
        orphans=sorted(id for id in running if id not in ours),
        missing=[id for id in ours if id not in running and id not in known and waited.get(id, 0) >= 1],
    )
