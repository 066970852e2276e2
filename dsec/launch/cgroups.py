"""One cgroup per sandbox, joined before anything of the sandbox runs: limits, freezing, killing, counting.

Three hosts exist: v2 alone; v1, with or without an empty v2 tree beside it ("hybrid": the v2 half is left alone, since
joining it waits for a grace period of the whole kernel and joining v1's `tasks` does not); and none that we may write
to (an ordinary user without delegation): no memory or CPU limit then, and PID 1's death ends the sandbox.
A cgroup's name is the number of the sandbox's id range, so making it also claims that range for the whole host.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from dsec.types import Stats

FIRST_ID, RANGE = 131072, 65536
"""Host ids of sandbox number n are FIRST_ID + n * RANGE and the RANGE - 1 after it."""
SLOTS = 30000
_PARENT = "dsec"
_V1 = ("memory", "cpu", "cpuacct", "pids", "freezer")
_OWNER = "trusted.dsec"
"""Extended attribute of a cgroup: pid and start of the process that frees it, and its sandbox's folder, if any."""


@dataclass(frozen=True)
class Hierarchy:
    """Where our cgroups live: below `unified` (v2), or below one folder per controller (v1)."""

    unified: Path | None
    v1: dict[str, Path]

    @property
    def limits(self) -> bool:
        """Whether memory and processes are really limited."""
        return "memory" in self.v1 or (self.unified is not None and not self.v1)


def detect(root: Path = Path("/sys/fs/cgroup")) -> Hierarchy:
    """What this process may use; empty when it may not make cgroups."""
    if (root / "cgroup.controllers").exists():
        parent = root if os.geteuid() == 0 else root / _own().lstrip("/")
        return Hierarchy(_prepare(parent), {})
    v1 = {name: folder for name in _V1 if (folder := _prepare(root / name)) is not None}
    return Hierarchy(None, v1 if {"memory", "pids", "freezer"} <= v1.keys() else {})


def _own() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:]
    return "/"


def _prepare(parent: Path) -> Path | None:
    """Our folder below `parent`, with the controllers handed down; None when that is not allowed."""
    folder = parent / _PARENT
    try:
        folder.mkdir(exist_ok=True)
        if (parent / "cgroup.controllers").exists():
            have = (parent / "cgroup.controllers").read_text().split()
            wanted = " ".join(f"+{name}" for name in ("memory", "cpu", "pids") if name in have)
            for each in (parent, folder):
                if wanted:
                    (each / "cgroup.subtree_control").write_text(wanted)
        if (
            folder / "cpu.shares"
        ).exists():  # as many shares as one process per core, not one for all sandboxes together
            (folder / "cpu.shares").write_text(str(1024 * (os.cpu_count() or 1)))
        return folder if os.access(folder, os.W_OK) else None
    except OSError:
        return None


class Cgroup:
    """A sandbox's cgroup in every hierarchy that has one."""

    def __init__(self, where: Hierarchy, slot: int) -> None:
        self.slot = slot
        self.where = where
        self.folders = [
            folder / str(slot) for folder in [*where.v1.values(), *([where.unified] if where.unified else [])]
        ]

    @classmethod
    def claim(cls, where: Hierarchy) -> Cgroup:
        """A new one with a number nobody on this host has."""
        while True:  # ends: there are many more numbers than processes
            group = cls(where, random.randrange(SLOTS))
            made: list[Path] = []
            try:
                for folder in group.folders:
                    folder.mkdir()
                    made.append(folder)
                group.own()
                return group
            except FileExistsError:
                for folder in made:
                    folder.rmdir()

    @property
    def base(self) -> int:
        """The first host id of its range."""
        return FIRST_ID + self.slot * RANGE

    def note(self, folder: Path) -> None:
        """Leaves its number in a sandbox's folder, before anything joins it: see `abandon`."""
        (folder / "slot").write_text(str(self.slot))
        self.own(folder)

    def own(self, folder: Path | None = None) -> None:
        """Says in the cgroup itself that this process frees it, and for which folder: see `sweep`."""
        me = os.getpid()
        for path in self.folders[:1]:
            with contextlib.suppress(OSError):  # an ordinary user may not: those are never swept
                os.setxattr(path, _OWNER, f"{me} {started(me)} {folder.absolute() if folder else ''}".encode())

    def limit(self, cpu: float, memory: int, pids: int) -> None:
        """Cores, MiB (swap none) and processes."""
        bytes_, quota = memory << 20, int(cpu * 100_000)
        v1 = {name: folder / str(self.slot) for name, folder in self.where.v1.items()}
        if v1:
            names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
            if 0 < _read(v1["memory"] / names[1]) < bytes_:  # neither may ever be above the second
                names.reverse()
            for name, value in [*((name, bytes_) for name in names), ("memory.swappiness", 0)]:
                if name == "memory.limit_in_bytes" or (v1["memory"] / name).exists():  # swap may not be accounted for
                    _write(v1["memory"] / name, value)
            _write(v1["pids"] / "pids.max", pids)
            if "cpu" in v1:
                _write(v1["cpu"] / "cpu.cfs_quota_us", max(quota, 1000))
        elif self.where.unified:
            folder = self.where.unified / str(self.slot)
            settings: tuple[tuple[str, object], ...] = (
                ("memory.max", bytes_),
                ("memory.swap.max", 0),
                ("memory.oom.group", 1),
                ("pids.max", pids),
                ("cpu.max", f"{max(quota, 1000)} 100000"),
            )
            for name, setting in settings:
                if (folder / name).exists() or name in ("memory.max", "pids.max"):
                    _write(folder / name, setting)

    @property
    def joins(self) -> list[Path]:
        """The files that a process writes "0" to in order to become a member."""
        return [folder / ("tasks" if self.where.v1 else "cgroup.procs") for folder in self.folders]

    def freeze(self, on: bool) -> None:
        """Stops or continues everything in it; returns when all have. Raises TimeoutError after 5 s."""
        if self.where.v1:
            target = state = self.where.v1["freezer"] / str(self.slot) / "freezer.state"
            ask, answer = ("FROZEN", "FROZEN") if on else ("THAWED", "THAWED")
        else:
            assert self.where.unified is not None
            target = self.where.unified / str(self.slot) / "cgroup.freeze"
            state, ask, answer = target.with_name("cgroup.events"), str(int(on)), f"frozen {int(on)}"
        _write(target, ask)
        end = time.monotonic() + 5
        while answer not in state.read_text():
            if time.monotonic() > end:
                raise TimeoutError(f"{target} did not reach {answer!r} within 5 s")
            time.sleep(0.001)

    def kill(self) -> None:
        """SIGKILL to everything in it. PID 1 takes its whole namespace along, forks in flight included."""
        if self.where.unified is not None and (target := self.where.unified / str(self.slot) / "cgroup.kill").exists():
            _write(target, 1)
            return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.where.v1:  # the frozen die when they thaw
            _write(self.where.v1["freezer"] / str(self.slot) / "freezer.state", "THAWED")

    def pids(self) -> list[int]:
        """Live members."""
        try:
            return [int(pid) for pid in (self.folders[0] / "cgroup.procs").read_text().split()]
        except (FileNotFoundError, IndexError, OSError):
            return []

    def stats(self) -> Stats:
        """What it uses; zero where the host does not count."""
        v1 = {name: folder / str(self.slot) for name, folder in self.where.v1.items()}
        if v1:
            return Stats(
                cpu_seconds=_read(v1.get("cpuacct", Path()) / "cpuacct.usage") / 1e9,
                memory_bytes=_read(v1["memory"] / "memory.usage_in_bytes"),
                memory_peak_bytes=_read(v1["memory"] / "memory.max_usage_in_bytes"),
                pids=_read(v1["pids"] / "pids.current"),
                oom_kills=_read(v1["memory"] / "memory.oom_control", "oom_kill"),
            )
        if self.where.unified is None:
            return Stats()
        folder = self.where.unified / str(self.slot)
        return Stats(
            cpu_seconds=_read(folder / "cpu.stat", "usage_usec") / 1e6,
            memory_bytes=_read(folder / "memory.current"),
            memory_peak_bytes=_read(folder / "memory.peak"),
            pids=_read(folder / "pids.current"),
            oom_kills=_read(folder / "memory.events", "oom_kill"),
        )

    def free(self, folder: Path) -> bool:
        """Removes it, and before that its number from `folder`: whoever finds one there may kill what has that number.
        What lives in it still is killed again, since what was being forked was on no list; False until it is dead."""
        with contextlib.suppress(FileNotFoundError):
            (folder / "slot").unlink()
        if self.remove():
            return True
        with contextlib.suppress(FileNotFoundError):
            self.note(folder)
        self.kill()
        return False

    def remove(self) -> bool:
        """Removes it; False while something still dies in it."""
        for folder in self.folders:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True


def abandon(folder: Path) -> None:
    """Ends and removes what an Edge left in `folder` when it died, and nobody can adopt. Waits up to a second for its
    processes to go."""
    with contextlib.suppress(OSError, ValueError):
        group = Cgroup(detect(), int((folder / "slot").read_text()))
        group.kill()
        end = time.monotonic() + 1
        while not group.free(folder) and time.monotonic() < end:
            time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(where: Hierarchy) -> int:
    """Removes cgroups whose process has died and whose number stands in no sandbox's folder, where the next Edge of
    that folder would find it -> how many. What lives in them nobody will ever ask for again: it is killed, and a
    cgroup in which something still dies is left to the next sweep."""
    parents = [*where.v1.values(), *([where.unified] if where.unified else [])]
    removed = 0
    for path in parents[0].iterdir() if parents else ():
        with contextlib.suppress(OSError):  # no cgroup, or not one of which it is known
            pid, begun, folder = os.getxattr(path, _OWNER).decode().split(" ", 2)
            group = Cgroup(where, int(path.name))
            noted = Path(folder, "slot")
            if started(int(pid)) == int(begun) or (folder and noted.exists() and noted.read_text() == path.name):
                continue
            if any((each / "cgroup.procs").read_text() for each in group.folders):
                group.kill()
            removed += group.remove()
    return removed


def started(pid: int) -> int:
    """When a process began, in ticks since boot: with its number this names it for ever. 0: no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _write(path: Path, value: object) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def _read(path: Path, key: str = "") -> int:
    try:
        text = path.read_text()
    except OSError:
        return 0
    if key:
        found = [line.split()[1] for line in text.splitlines() if line.split()[:1] == [key]]
        return int(found[0]) if found else 0
    return int(text) if text.strip().isdigit() else 0
