"""A handle on one branch: the program asks for each operation, the log says whether it has happened already.

    begin(...)  ->  Replay(result)   it ended before: nothing runs
                ->  Live(step, key)  run it, then end(ticket, result); the caller's answer is what `end` returns

Cached results and the sandbox's files are different things. A resume always has the results; `files` says what it has
of the files, and only the Edge can know (`attach`):

    "alive"   they are as the last recorded step left them: new commands run
    "behind"  a snapshot of them was restored: recorded idempotent steps run again, their results are compared
    "lost"    there are none: results replay, a new command raises StateLost
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsec.errors import Diverged, Fenced, InvalidRequest, OutcomeUnknown, StateLost
from dsec.trajectory import key as keys
from dsec.trajectory.failpoint import crash
from dsec.trajectory.log import Branch, Entry, Snapshot, TrajectoryLog
from dsec.trajectory.segment import Place

Files = Literal["alive", "behind", "lost"]
Unknown = Literal["retry", "fail", "restore_then_retry"]
NOT_STARTED = object()
"""What a journal answers when it is certain that the step was never begun inside the sandbox."""

VOLATILE = ("duration", "replayed")
"""Fields of a result that differ between two runs of the same command."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The operation ended before; `result` is what its caller got."""

    step: int
    key: str
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Live:
    """The operation is to run now. `attempt` counts from 1.

    `restore`: the marker of a snapshot to roll back to first. `rerun`: its result is known, it runs only to bring the
    files back (`end` returns the known result).
    """

    step: int
    key: str
    attempt: int = 1
    restore: Any = None
    rerun: bool = False


class Trajectory:
    """One program's way through a branch. Steps are numbered by the order of `begin`; several may run at once."""

    def __init__(
        self, log: TrajectoryLog, branch: Branch, epoch: int, identity: dict[str, Any], image: str, on_divergence: str
    ) -> None:
        self.log, self.epoch, self.identity, self.image = log, epoch, identity, image
        self.on_divergence = on_divergence
        self.cursor = 0
        self.files: Files = "lost" if branch.entries else "alive"
        self.nondeterministic: list[int] = []
        """Steps that ran again and gave something else."""
        self._spec_digest = keys.digest(keys.encode(identity))
        self._reached = 0  # while the files are behind: how many steps they contain
        self._reexecute = False
        self._rerunning: asyncio.Future[None] | None = None
        self._journal: Callable[[int], Awaitable[Any]] | None = None
        self._snapshot = (branch.snapshots[-1].step if branch.snapshots else 0, time.monotonic())
        self._branch = branch

    @property
    def trajectory(self) -> str:
        return self._branch.trajectory

    @property
    def branch(self) -> str:
        return self._branch.name

    @property
    def steps(self) -> int:
        """Recorded steps, whether ended or not."""
        return len(self._branch.entries)

    def kind(self, step: int) -> str:
        """What was asked at a recorded step."""
        return self._branch.entries[step].kind

    @property
    def unfinished(self) -> list[int]:
        """Steps that were begun, whose end nobody recorded, and that this process is not running."""
        entries = self._branch.entries
        return [i for i, e in enumerate(entries) if not (e.ended or e.aborted or e.running)]

    @property
    def snapshots(self) -> list[Snapshot]:
        """From the oldest to the newest."""
        return self._branch.snapshots

    @property
    def newest_snapshot(self) -> Snapshot | None:
        return self._branch.snapshots[-1] if self._branch.snapshots else None

    @property
    def children(self) -> list[tuple[str, int]]:
        """(branch, step) of those forked from it."""
        return self._branch.children

    @property
    def stream(self) -> int:
        """The branch's number in the log."""
        return self._branch.stream

    async def settled(self) -> None:
        """Returns when none of its steps runs."""
        while running := [entry.running for entry in self._branch.entries if entry.running]:
            await asyncio.wait(running)

    async def note(self, **fields: Any) -> None:
        """A remark in the log, for people."""
        await self.log.append(self._held(), "NOTE", step=self.steps, **fields)

    def attach(
        self,
        files: Files,
        step: int = 0,
        *,
        journal: Callable[[int], Awaitable[Any]] | None = None,
        reexecute: bool = False,
    ) -> None:
        """The Edge says what there is of the sandbox's files.

        "alive": the sandbox that ran the recorded steps is at hand; `journal(step)` asks its agent how a step ended
        and answers a result (dict), NOT_STARTED, or None (it cannot tell); it waits while the step still runs.
        "behind": they contain exactly the first `step` steps; with `reexecute` (rebuild="reexecute", start from 0)
        steps not declared idempotent run again too.
        """
        if not 0 <= step <= self.steps:
            raise InvalidRequest(f"files at step {step} of {self.steps}")
        self.files, self._journal, self._reexecute = files, journal, reexecute
        self._reach(step)

    async def begin(
        self, kind: str, args: Mapping[str, Any], idempotent: bool = False, on_unknown: Unknown = "fail"
    ) -> Replay | Live:
        """The next operation of the program. Not idempotent: its BEGIN is durable when this returns Live.

        Raises Diverged (something else was recorded at this step), OutcomeUnknown (it was begun and nobody knows how
        it ended; `on_unknown` says what to do instead), StateLost, Fenced, LogFull, LogFailed. After any of them the
        program is still at the same step.
        """
        branch = self._owned()
        step, self.cursor = self.cursor, self.cursor + 1  # taken at once: several may be asked for before one is known
        try:
            if step > len(branch.entries):
                raise InvalidRequest(f"step {step} was asked for while step {len(branch.entries)} could not be begun")
            plain = keys.canonical(self.log.redact(dict(args)) if self.log.redact else args, self.log.secret)
            key = self._key(branch, step, kind, plain)
            entry = branch.entries[step] if step < len(branch.entries) else None
            if entry and entry.key == key and entry.ended and not entry.running and self.files != "behind":
                return self._replay(entry, step)
            return await self._begin(branch, step, key, kind, plain, idempotent, on_unknown)
        except BaseException:
            if self.cursor == step + 1:
                self.cursor = step
            raise

    async def _begin(
        self, branch: Branch, step: int, key: str, kind: str, plain: Any, idempotent: bool, on_unknown: Unknown
    ) -> Replay | Live:
        """All that is not a plain replay."""
        if step < len(branch.entries) and branch.entries[step].key != key:
            branch = await self._diverge(step, kind, plain)
            key = self._key(branch, step, kind, plain)
        entry = branch.entries[step] if step < len(branch.entries) else None
        if entry is None:
            if self.files == "lost":
                raise StateLost(f"step {step} is new, and the sandbox's files are gone", step=step)
            return await self._start(branch, step, key, kind, plain, idempotent)
        if entry.running:
            await asyncio.wait([entry.running])
            self._owned()
        if entry.ended:
            return await self._known(entry, step)
        return await self._unknown(branch, entry, step, plain, on_unknown)

    async def end(self, ticket: Live, result: Mapping[str, Any]) -> dict[str, Any]:
        """Records the result; when this returns, a resume will give it again. Returns what to hand to the caller.

        `result` maps names to JSON values, text or bytes. A step that ran again returns what it returned the first
        time. After LogFull it may be called again. A newer handle in this process does not fence a running step.
        """
        branch = self._held()
        entry = branch.entries[ticket.step]
        crash("log.before_end")
        if ticket.rerun:
            assert entry.ended
            known = self.log.decode_result(*self.log.read(entry.ended))
            found = keys.first_difference(self._comparable(known), self._comparable(result))
            if found:
                self.nondeterministic.append(ticket.step)
                await self.log.append(branch, "NOTE", step=ticket.step, nondeterministic=found[0])
            self._reach(ticket.step + 1)
            return known
        try:
            fields, payload = await self.log.encode_result(result)
            record = {"step": ticket.step, "key": ticket.key, "time": time.time(), **fields}
            future = self.log.append(branch, "END", payload, lambda answer: _ended(branch, entry, answer), **record)
        except BaseException:
            _stop(branch, entry)
            raise
        if self.log.durability != "async":
            await future
        crash("log.before_reply")
        return dict(result)

    async def abort(self, ticket: Live, why: str) -> None:
        """Records that the operation did not happen (it could not be started): a resume runs it."""
        branch = self._held()
        entry = branch.entries[ticket.step]
        if ticket.rerun:
            self.files = "lost"
            self._reach(ticket.step)
            return
        await self.log.append(branch, "ABORT", step=ticket.step, why=why)
        entry.aborted = True
        _stop(branch, entry)

    def lose(self, ticket: Live) -> None:
        """Says that nobody will learn how the operation ended (its sandbox is gone): its outcome is unknown."""
        entry = self._branch.entries[ticket.step]
        if ticket.rerun:
            self.files = "lost"
            self._reach(ticket.step)
        _stop(self._branch, entry)

    def snapshot_due(self, every_steps: int = 0, every_seconds: float = 0.0, on_unknown: Unknown = "fail") -> bool:
        """Asked before a command: True when the schedule (0: never) or the wish to roll back calls for a snapshot."""
        steps, (step, when) = self.steps, self._snapshot
        if self.files != "alive" or self._branch.running or self.cursor < steps:
            return False
        if on_unknown == "restore_then_retry":
            return not any(snapshot.step == steps for snapshot in self._branch.snapshots[-1:])
        by_steps = every_steps > 0 and steps - step >= every_steps
        return steps > step and (by_steps or 0 < every_seconds <= time.monotonic() - when)

    def quiet(self) -> int:
        """How many steps the files contain, if exactly that can be said now; InvalidRequest otherwise. Asked before a
        capture, and again by `snapshot`: what is captured while a step runs is the state after no step."""
        branch = self._owned()
        if branch.running or self.files != "alive" or self.unfinished:
            raise InvalidRequest(f"no snapshot of {branch.name!r}: files {self.files}, {branch.running} steps running")
        return len(branch.entries)

    async def snapshot(self, marker: Any, at: int | None = None) -> Snapshot:
        """Records that `marker` (JSON) names the files as they are after all recorded steps; it is durable already.
        `at`: what `quiet` said before they were captured."""
        now = self.quiet()
        if at is not None and at != now:
            raise InvalidRequest(f"no snapshot of {self.branch!r}: {now - at} steps ran while it was captured")
        branch, taken = self._branch, Snapshot(now, marker)
        await self.log.append(branch, "SNAP", step=taken.step, marker=marker)
        branch.snapshots.append(taken)
        self._snapshot = (taken.step, time.monotonic())
        return taken

    async def fork(self, at: int | None = None, branch: str | None = None) -> Trajectory:
        """A new branch that shares the first `at` steps (default: up to here); its files are the Edge's to attach."""
        parent = self._owned()
        at = self.cursor if at is None else at
        if not 0 <= at <= len(parent.entries) or any(not entry.ended for entry in parent.entries[:at]):
            raise InvalidRequest(f"cannot fork at step {at}: {self.steps} steps, unfinished {self.unfinished}")
        number = len(parent.children) + 1
        while self.log.find(parent.trajectory, name := branch or f"{parent.name}.{number}"):
            if branch:
                raise InvalidRequest(f"{parent.trajectory!r} already has a branch {branch!r}")
            number += 1
        child = Branch(parent.trajectory, name, self.identity, self.image, parent.seeds, (parent.name, at))
        child.entries = parent.entries[:at]
        child.snapshots = [snapshot for snapshot in parent.snapshots if snapshot.step <= at]
        epoch = self.log.take_epoch(child.stream, None, 0)
        handle = await self.log.adopt(child, epoch, self.identity, self.image, self.on_divergence)
        crash("log.forked")
        await self.log.append(parent, "FORK", step=at, child=name)
        parent.children.append((name, at))
        handle.cursor = at
        return handle

    async def close(self) -> None:
        """Records that no more will come, and forgets the branch (the log keeps it)."""
        branch = self._owned()
        await self.log.append(branch, "CLOSE")
        branch.closed = True
        self.release()

    def release(self) -> None:
        """Forgets the branch in this process; the next open reads it from the log. Steps still running are lost."""
        if self.log.branches.get(self._branch.stream) is self._branch:
            del self.log.branches[self._branch.stream]
        for entry in self._branch.entries:
            _stop(self._branch, entry)

    # Underneath

    def _held(self) -> Branch:
        """The branch, if this process still writes it."""
        branch = self._branch
        if self.log.branches.get(branch.stream) is not branch:
            raise Fenced(f"{branch.trajectory}/{branch.name} was opened anew", epoch=self.epoch)
        return branch

    def _owned(self) -> Branch:
        """The branch, if this handle is the newest on it."""
        branch = self._held()
        if branch.epoch != self.epoch:
            text = f"{branch.trajectory}/{branch.name}: this handle has epoch {self.epoch}, a newer one was opened"
            raise Fenced(text, epoch=self.epoch, newest=branch.epoch)
        if branch.broken:
            raise branch.broken
        return branch

    def _key(self, branch: Branch, step: int, kind: str, plain: Any) -> str:
        owner = branch.entries[step].owner if step < len(branch.entries) else branch.name
        previous = branch.entries[step - 1].key if step else keys.ROOT
        return keys.operation_key(branch.trajectory, owner, step, kind, plain, self._spec_digest, self.image, previous)

    async def _start(self, branch: Branch, step: int, key: str, kind: str, plain: Any, idempotent: bool) -> Live:
        attempt = branch.entries[step].attempt + 1 if step < len(branch.entries) else 1
        entry = Entry(key, kind, branch.name, idempotent, attempt=attempt)
        entry.running = asyncio.get_running_loop().create_future()
        branch.entries[step : step + 1] = [entry]
        branch.running += 1
        crash("log.before_begin")
        fields = {"step": step, "key": key, "kind": kind, "args": plain, "idempotent": idempotent, "attempt": attempt}
        future = self.log.append(
            branch, "BEGIN", b"", lambda answer: _begun(branch, entry, answer), time=time.time(), **fields
        )
        try:
            if not idempotent and self.log.durability == "begin+end":
                await future
        except asyncio.CancelledError:  # the caller went away: nothing will run
            self.log.append(branch, "ABORT", step=step, why="cancelled").add_done_callback(_heard)
            entry.aborted = True
            _stop(branch, entry)
            raise
        except Exception:
            _stop(branch, entry)
            if attempt == 1 and branch.entries[-1] is entry:  # nothing was built on it: as if it had not been asked
                branch.entries.pop()
                branch.broken = None
            raise
        crash("log.begun")
        return Live(step, key, attempt)

    async def _known(self, entry: Entry, step: int) -> Replay | Live:
        while self._rerunning and step > self._reached:
            await asyncio.wait([self._rerunning])
        if self.files == "behind" and step >= self._reached:
            if step == self._reached and (entry.idempotent or self._reexecute):
                self._rerunning = asyncio.get_running_loop().create_future()
                return Live(step, entry.key, entry.attempt, rerun=True)
            self.files = "lost"
        return self._replay(entry, step)

    def _replay(self, entry: Entry, step: int) -> Replay:
        assert entry.ended
        return Replay(step, entry.key, self.log.decode_result(*self.log.read(entry.ended)))

    async def _unknown(self, branch: Branch, entry: Entry, step: int, plain: Any, policy: Unknown) -> Replay | Live:
        """BEGIN without END: ask the sandbox's own journal, then the caller's policy."""
        answer = NOT_STARTED if entry.aborted else None
        if answer is None and self.files == "alive" and self._journal:
            answer = await self._journal(step)
            self._owned()
        if isinstance(answer, Mapping):
            crash("log.journal")
            return Replay(step, entry.key, await self.end(Live(step, entry.key, entry.attempt), answer))
        marker = next((snapshot.marker for snapshot in reversed(branch.snapshots) if snapshot.step == step), None)
        rolled_back = self.files == "behind" and self._reached == step
        can_roll_back = rolled_back or (marker is not None and self.files == "alive")
        retry = policy == "retry" or entry.idempotent or (policy == "restore_then_retry" and can_roll_back)
        if answer is None and not retry:
            raise OutcomeUnknown(f"step {step} ({entry.kind}) was begun and nobody saw its end", step=step)
        if self.files == "lost" or (self.files == "behind" and not rolled_back):
            raise StateLost(f"step {step} has no result, and the sandbox's files are gone", step=step)
        live = await self._start(branch, step, entry.key, entry.kind, plain, entry.idempotent)
        restore = marker if answer is None and policy == "restore_then_retry" and not rolled_back else None
        return Live(live.step, live.key, live.attempt, restore)

    async def _diverge(self, step: int, kind: str, plain: Any) -> Branch:
        """The program asked for something else than is recorded: raise, or go on in a branch, or cut the record off."""
        branch = self._branch
        recorded = branch.entries[step]
        assert recorded.begun
        old = self.log.read(recorded.begun)[0]
        expected = {"spec": branch.identity, "image": branch.image, "kind": old["kind"], "args": old["args"]}
        got = {"spec": self.identity, "image": self.image, "kind": kind, "args": plain}
        differences = (keys.first_difference(expected[name], got[name], name) for name in expected)
        found = next(filter(None, differences), ("previous", "", ""))
        if self.on_divergence == "raise":
            text = f"step {step}: {found[0]} was {found[1]!r}, is {found[2]!r}"
            raise Diverged(text, step=step, expected=found[1], got=found[2], field=found[0])
        here = self.files == "behind" and self._reached == step
        if self.on_divergence == "truncate":
            if branch.running:
                raise InvalidRequest(f"cannot cut {branch.name!r} at step {step}: {branch.running} steps are running")
            await self.log.append(branch, "CUT", step=step)
            del branch.entries[step:]
            branch.snapshots = [snapshot for snapshot in branch.snapshots if snapshot.step <= step]
        else:
            await self._enter_branch(step, kind, plain)
            branch = self._branch
        self.files = "alive" if here else "lost"
        return branch

    async def _enter_branch(self, step: int, kind: str, plain: Any) -> None:
        """Moves this handle to the branch that an earlier divergence at this step made, or to a new one."""
        for name, at in self._branch.children:
            child = self.log.find(self._branch.trajectory, name) if at == step else None
            if child and len(child.entries) > step and child.entries[step].key == self._key(child, step, kind, plain):
                wanted = Branch(child.trajectory, name, self.identity, self.image)
                handle = await self.log.resume(wanted, None, self.on_divergence)
                break
        else:
            handle = await self.fork(step)
        self._branch, self.epoch = handle._branch, handle.epoch

    def _comparable(self, result: Mapping[str, Any]) -> Any:
        stable = {name: value for name, value in result.items() if name not in VOLATILE}
        return keys.canonical(self.log.normalise(stable), self.log.secret)

    def _reach(self, step: int) -> None:
        """The files contain `step` steps; once they contain all that are recorded, they are alive."""
        self._reached = step
        if self.files == "behind" and step == self.steps:
            self.files = "alive"
        if self._rerunning:
            self._rerunning.set_result(None)
            self._rerunning = None


def _stop(branch: Branch, entry: Entry) -> None:
    if entry.running:
        branch.running -= 1
        entry.running.set_result(None)
        entry.running = None


def _begun(branch: Branch, entry: Entry, answer: Place | Exception) -> None:
    if isinstance(answer, Exception):
        branch.broken = answer
    else:
        entry.begun = answer


def _ended(branch: Branch, entry: Entry, answer: Place | Exception) -> None:
    if not isinstance(answer, Exception):
        entry.ended = answer
    _stop(branch, entry)


def _heard(done: asyncio.Future[Place]) -> None:
    done.exception()
