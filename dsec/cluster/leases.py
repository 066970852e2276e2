"""One lease per Edge, and the word of an Edge that keeps it.

The Edge measures with its own clock from the moment it *sent* a renewal; the watcher with its own from the moment it
*saw* one; neither trusts the other's clock nor the database's. Since `fence` < `lost`, an Edge that cannot renew has
destroyed its sandboxes before anybody may start them elsewhere. Every write carries the lease's epoch, so what an Edge
still says after that is refused. (3FS's services do the same with T/2 and T.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsec.cluster.clock import Clock
from dsec.cluster.errors import StoreUnavailable
from dsec.cluster.store import Edge, Store
from dsec.errors import Fenced


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds. With these a database may be away for 80 s and costs no sandbox, and all of a lost host is settled
    within ``ttl``."""

    renew: float = 5.0
    """Between renewals."""
    fence: float = 90.0
    """Without a renewal for so long, the Edge destroys its sandboxes."""
    lost: float = 110.0
    """Without seeing a renewal for so long, the watcher gives the Edge up."""
    ttl: float = 120.0
    """Within this all sandboxes of a lost host have ended in the store."""

    def __post_init__(self) -> None:
        if not 0 < 2 * self.renew <= self.fence < self.lost < self.ttl:
            raise ValueError(f"2 * renew <= fence < lost < ttl does not hold: {self}")


class Lease:
    """The Edge's side."""

    def __init__(self, store: Store, clock: Clock, edge: Edge, terms: Terms) -> None:
        self.edge, self.terms = edge, terms
        self._store, self._clock = store, clock
        self._until = float("-inf")

    @property
    def epoch(self) -> int:
        return self.edge.epoch

    def acquire(self, keep: Iterable[str] = ()) -> int:
        """A new epoch. ``keep``: sandboxes that survived this Edge's restart within the old lease."""
        sent = self._clock.monotonic()
        self.edge = replace(self.edge, epoch=self._store.acquire(self.edge, keep, self._clock.now()))
        self._until = sent + self.terms.fence
        return self.edge.epoch

    def renew(self, report: Mapping[str, Any]) -> None:
        """Raises Fenced if the lease was taken away or has run out. A store that does not answer costs nothing yet."""
        self.check()
        sent = self._clock.monotonic()
        try:
            held = self._store.renew(self.edge.id, self.edge.epoch, report)
        except StoreUnavailable:
            self.check()  # the call may have hung until the lease was over
            return
        if not held:
            self._until = float("-inf")
        self.check()
        self._until = sent + self.terms.fence

    def left(self) -> float:
        """Seconds until the Edge must have destroyed its sandboxes."""
        return self._until - self._clock.monotonic()

    def check(self) -> None:
        """Raises Fenced unless the lease is held: called before every start and before every result is handed out."""
        if self.left() <= 0:
            raise Fenced(f"{self.edge.id} has lost its lease of epoch {self.edge.epoch}")
