"""Sandboxes kept ready, so that a create is a claim. What differs per claim (environment, user, metadata, deadline)
is applied when commands run, so it never forces a cold start."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from dsec.errors import DsecError, InvalidRequest
from dsec.types import Spec

if TYPE_CHECKING:
    from dsec.edge.box import Box
    from dsec.edge.edge import Edge

READY = {"dsec": "ready"}
"""The metadata of what is in stock."""
SAME = ("substrate", "runtime", "image", "cpu", "memory", "disk", "pids", "network")
FOREVER = 10 * 365 * 86400.0
PAUSE = 0.03
"""Seconds before a stock that is more than half full is filled up: the claimed sandbox's first command goes first."""


class Pool:
    """Stock of ready sandboxes by kind (the fields named in SAME)."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._wanted: dict[tuple[object, ...], tuple[Spec, int]] = {}
        self._ready: dict[tuple[object, ...], deque[Box]] = {}
        self._filling: dict[tuple[object, ...], asyncio.Task[None]] = {}

    @staticmethod
    def _kind(spec: Spec) -> tuple[object, ...]:
        return tuple(getattr(spec, name) for name in SAME)

    async def resize(self, spec: Spec, size: int) -> int:
        """Keeps `size` of this kind ready (0 ends it); returns the number that are, once they are."""
        if not 0 <= size <= self._edge.max_live:
            raise InvalidRequest(f"a pool holds 0 to {self._edge.max_live}, not {size!r}")
        kind = self._kind(spec)
        plain = Spec(**{name: getattr(spec, name) for name in SAME}, timeout=FOREVER, metadata=READY)
        self._wanted[kind] = (plain, size)
        ready = self._ready.setdefault(kind, deque())
        self._fill(kind)
        await self._filling[kind]
        while len(ready) > size:  # also what was being made when the size changed
            await self._edge.op_kill(ready.pop().id)
        return len(ready)

    def claim(self, spec: Spec) -> Box | None:
        """A ready one that becomes the caller's, or None. Its place is filled in the background."""
        kind = self._kind(spec)
        ready = self._ready.get(kind)
        while ready and ready[0].isolation >= spec.isolation_min:
            box = ready.popleft()
            if box.state == "running":
                box.spec, box.created, box.deadline = spec, time.time(), time.time() + spec.timeout
                self._edge._arm(box)
                box.save()
                self._fill(kind)
                return box
        if ready is not None:
            self._fill(kind)
        return None

    @staticmethod
    def stocked(spec: Spec) -> bool:
        """Whether this is what a sandbox in stock was made with (its Edge may have died since)."""
        return spec.timeout == FOREVER and spec.metadata == READY

    def has(self, spec: Spec) -> bool:
        """Whether a claim would be served from stock."""
        ready = self._ready.get(self._kind(spec), ())
        return any(box.state == "running" and box.isolation >= spec.isolation_min for box in ready)

    def _fill(self, kind: tuple[object, ...]) -> None:
        if kind not in self._filling or self._filling[kind].done():
            self._filling[kind] = asyncio.ensure_future(self._work(kind))

    async def _work(self, kind: tuple[object, ...]) -> None:
        while True:
            spec, size = self._wanted[kind]
            ready = self._ready[kind]
            missing = size - len(ready)
            if missing <= 0:
                return
            if 2 * missing < size:
                await asyncio.sleep(PAUSE)
            made = await asyncio.gather(*(self._one(spec) for _ in range(min(missing, 4))), return_exceptions=True)
            for box in made:
                if isinstance(box, DsecError):
                    return  # the next claim tries again, and is told why when it must make its own
                if isinstance(box, BaseException):
                    raise box
                ready.append(box)

    async def _one(self, spec: Spec) -> Box:
        box = await self._edge.make(spec)
        await box.alive().agent.ping(30)
        return box

    async def close(self) -> None:
        """Ends the stock; nobody owns those sandboxes."""
        for task in self._filling.values():
            task.cancel()
        for ready in self._ready.values():
            for box in ready:
                await self._edge.op_kill(box.id)
        self._ready.clear()
