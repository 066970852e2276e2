"""The Edge's part in a trajectory: what its sandbox has of the files, and when they are captured.

    before a step      a snapshot, when the schedule (`snapshot_steps`, `snapshot_seconds`) calls for one
    between steps      the same by the clock: a program that waits for its model does not go unsaved
    preemption notice  no more steps; what runs may end; then a snapshot, of which nothing is missing

A capture counts only if no step began meanwhile: files of half a step belong to no number of steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dsec.edge.box import Box, recorded, unrecorded
from dsec.edge.commands import Answer, Unknown
from dsec.errors import (
    DsecError,
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    Preempted,
    SandboxFailed,
    StateLost,
    Timeout,
)
from dsec.types import SandboxInfo, Spec

KEPT = 2
"""Snapshots on a schedule that a branch keeps; those that somebody asked for stay until they are deleted."""

logger = logging.getLogger(__name__)


class TrajectoryOperations(ABC):
    """What an Edge does for boxes with a trajectory; the Edge gives the names below."""

    home: Path
    snapshots: Path
    boxes: dict[str, Box]
    log: Any
    tended: Any

    @abstractmethod
    async def make(self, spec: Spec, snapshot: str = "") -> Box: ...

    @abstractmethod
    async def capture(self, box: Box, name: str, **meta: Any) -> str: ...

    @abstractmethod
    async def replace_files(self, box: Box, snapshot: str) -> None: ...

    @abstractmethod
    async def op_resume(self, id: str) -> SandboxInfo: ...

    @abstractmethod
    def _box(self, id: str) -> Box: ...

    @abstractmethod
    def _task(self, work: Any) -> asyncio.Task[Any]: ...

    async def open_log(self) -> Any:
        if self.log is None:
            from dsec.trajectory import TrajectoryLog

            self.log = TrajectoryLog(self.home / "log")
            self.tended = self.tended or self._task(self.tend_log())
        return self.log

    async def _resume(self, spec: Spec) -> SandboxInfo:
        """The sandbox of a trajectory: new, the living one, one restored from its newest snapshot, or results only.
        `info.resumed` says which."""
        log = await self.open_log()
        same = [
            box
            for box in self.boxes.values()
            if (box.spec.trajectory, box.spec.branch) == (spec.trajectory, spec.branch)
        ]
        for box in same:  # one that is dying is no sandbox to go on in
            if box.watcher is not None and box.running is not None and box.running.agent.failed.done():
                await asyncio.wait([box.watcher])
        mine = [box for box in same if box.state in ("running", "paused")]
        digest = mine[0].image_digest if mine else await self._image_digest(spec)
        trajectory = await log.open(spec.trajectory, spec, spec.branch, image_digest=digest)
        steps, at = trajectory.steps, trajectory.steps
        if mine:
            box = mine[0]
            if box.state == "paused":
                await self.op_resume(box.id)
            if steps:
                trajectory.attach("alive", journal=lambda step: self._journal(box, step))
        elif not steps:
            box = await self.make(spec)
        elif restored := self._restorable(trajectory, digest):
            box, at = await self.make(spec, str(restored.marker)), restored.step
            trajectory.attach("behind", at)
        else:
            box, at = await self.make(spec), 0  # its files are not those of the log, so nothing new may run in it
            trajectory.attach("lost")
        box.trajectory, box.image_digest = trajectory, digest
        box.resumed = {"files": trajectory.files, "step": at, "steps": steps}
        box.save()
        self._sweep(trajectory)
        if box.saver is None and spec.snapshot_seconds > 0:
            box.saver = self._task(self._by_the_clock(box, spec.snapshot_seconds))
        return box.info()

    async def _image_digest(self, spec: Spec) -> str:
        """What a new sandbox would be made of; "" where nobody can tell cheaply (the host's own /usr, a folder)."""
        if spec.image.startswith("snapshot:"):
            return spec.image  # a snapshot never changes
        if spec.substrate == "function" or spec.image in ("host", "systemd") or spec.image.startswith("/"):
            return ""
        from dsec import images

        with contextlib.suppress(NotFound):
            return await images.digest(self.home, spec.image)
        if spec.substrate != "container":
            return ""
        await images.lowers(self.home, spec.image)  # built on first use
        return await images.digest(self.home, spec.image)

    def _restorable(self, trajectory: Any, digest: str) -> Any:
        """The newest snapshot that is here and lies on the image that a sandbox would be made of now."""
        for snapshot in reversed(trajectory.snapshots):
            with contextlib.suppress(OSError, ValueError):
                meta = json.loads((self.snapshots / str(snapshot.marker) / "meta.json").read_text())
                if meta.get("image_digest", digest) == digest:
                    return snapshot
        return None

    async def _journal(self, box: Box, step: int) -> Any:
        """How a step ended inside a sandbox that is alive, as the trajectory asks when it finds no END."""
        from dsec.trajectory import NOT_STARTED

        if box.trajectory is None or box.trajectory.kind(step) != "commands.run":
            return None  # only commands are in the agent's journal
        commands = [command for command in box.commands.values() if command.step == step + 1]
        if not commands:
            return NOT_STARTED
        try:
            return (await asyncio.shield(commands[-1].result)).as_dict()
        except Timeout as error:
            return recorded(error)

    async def _logged(
        self, box: Box, kind: str, args: dict[str, Any], act: Callable[[int], Awaitable[Answer]],
        idempotent: bool = False, on_unknown: Unknown = "fail",
    ) -> Answer:  # fmt: skip
        """The operation through the box's trajectory, if it has one."""
        trajectory = box.trajectory
        if trajectory is None:
            return await act(0)
        if box.preempted:
            raise Preempted(f"{box.id} is being preempted; its trajectory can be resumed")
        if trajectory.snapshot_due(box.spec.snapshot_steps, box.spec.snapshot_seconds, on_unknown):
            await self._save(box, must=on_unknown == "restore_then_retry")
        ticket = await trajectory.begin(kind, args, idempotent=idempotent, on_unknown=on_unknown)
        if hasattr(ticket, "result"):
            return unrecorded({**ticket.result, "replayed": True})
        try:
            if ticket.restore is not None:
                await self.replace_files(box, str(ticket.restore))
            result = await act(ticket.step + 1)
        except DsecError as error:
            if isinstance(error, SandboxFailed | StateLost | OutcomeUnknown):
                trajectory.lose(ticket)  # nobody will learn how it ended: the BEGIN stays without an END
                raise
            result = recorded(error)
        except BaseException:
            trajectory.lose(ticket)
            raise
        return unrecorded(await trajectory.end(ticket, result))

    # Snapshots

    async def _save(self, box: Box, must: bool = False) -> Answer:
        """A snapshot on schedule. One that fails is said in the log and in `info.resumed`, and costs no command unless
        that command `must` have it."""
        try:
            name = await self._snapshot_of(box, f"auto-{box.trajectory.stream:016x}-{secrets.token_hex(4)}")
            box.resumed = {key: value for key, value in (box.resumed or {}).items() if key != "snapshot_failed"}
            return {"snapshot": name}
        except (DsecError, OSError) as error:
            logger.warning("%s: no snapshot of %s: %s", box.id, box.spec.trajectory, error)
            box.resumed = {**(box.resumed or {}), "snapshot_failed": str(error)}
            with contextlib.suppress(DsecError):
                await box.trajectory.note(snapshot_failed=str(error))
            if must:
                raise
            return {}

    async def _snapshot_of(self, box: Box, name: str) -> str:
        """Captures the files and says so in the log; InvalidRequest (and no snapshot) if a step ran meanwhile."""
        trajectory = box.trajectory
        at = trajectory.quiet()
        await self.capture(box, name, image_digest=box.image_digest)
        try:
            await trajectory.snapshot(name, at)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, self.snapshots / name, True)
            raise
        self._sweep(trajectory)
        return name

    def _sweep(self, trajectory: Any) -> None:
        """Drops the branch's own old snapshots, and those that a crash left without a record."""
        kept = {str(snapshot.marker) for snapshot in trajectory.snapshots[-KEPT:]}
        if trajectory.children:
            kept |= {str(snapshot.marker) for snapshot in trajectory.snapshots}
        for folder in self.snapshots.glob(f"auto-{trajectory.stream:016x}-*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    async def _by_the_clock(self, box: Box, seconds: float) -> None:
        while box.state in ("running", "paused"):
            await asyncio.sleep(seconds)
            trajectory = box.trajectory
            if trajectory is not None and box.state == "running" and trajectory.snapshot_due(0, seconds):
                await self._save(box)

    async def op_log_snapshot(self, id: str) -> Answer:
        """Captures the files into the trajectory, so that a resume after the sandbox's death goes on from here."""
        box = self._with_trajectory(id)
        return {"snapshot": await self._snapshot_of(box, f"snap-{secrets.token_hex(8)}")}

    async def op_preempt(self, id: str, notice: float = 10.0) -> Answer:
        """The sandbox goes in `notice` seconds: begins no more steps, lets those that run end, keeps the files."""
        box = self._with_trajectory(id)
        box.preempted = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(notice * 0.7):
                await box.trajectory.settled()
        return await self._save(box, must=True)

    # Retention

    async def op_log_delete(self, trajectory: str) -> Answer:
        """Deletes a trajectory: its records, its outputs that no other names (with the next compaction), and the files
        that were kept for it. A program that asks for it again runs everything again."""
        from dsec.trajectory.retention import delete, sweep_snapshots

        branches = await delete(await self.open_log(), trajectory)
        sweep_snapshots(self.log, self.snapshots)
        return {"branches": branches}

    async def tend_log(self) -> None:
        """Keeps the log within the bounds that the environment gives, for as long as the Edge runs (upkeep.py)."""
        from dsec.trajectory.retention import sweep_snapshots
        from dsec.trajectory.upkeep import Bounds, tend

        bounds = Bounds.from_environment()
        while bounds.every:
            await asyncio.sleep(bounds.every)
            try:
                deleted, freed = await tend(await self.open_log(), bounds)
                if deleted or freed.segments:
                    sweep_snapshots(self.log, self.snapshots)
                    logger.info("log: %d trajectories deleted, %d bytes freed", len(deleted), freed.bytes)
            except (DsecError, OSError) as error:
                logger.warning("log: not tended: %s", error)

    async def op_log_compact(self, older_than: float | None = None) -> Answer:
        """Gives room back; with `older_than` (seconds) trajectories in which nothing was done for so long go first."""
        from dsec.trajectory.retention import compact, expire, sweep_snapshots

        log = await self.open_log()
        expired = await expire(log, older_than) if older_than is not None else []
        freed = await compact(log)
        sweep_snapshots(log, self.snapshots)
        return {"expired": expired, **freed._asdict()}

    def _with_trajectory(self, id: str) -> Box:
        box = self._box(id)
        if box.trajectory is None:
            raise InvalidRequest(f"sandbox {id} has no trajectory")
        return box
