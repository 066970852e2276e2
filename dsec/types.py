"""What crosses the sandbox API: frozen records, JSON in both directions (`as_dict`, and the constructor back).

Units: seconds, MiB, cores. Times of day are seconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, Self

from dsec.errors import InvalidRequest
from dsec.network.policy import words

SUBSTRATES = ("function", "container", "microvm", "vm")
ISOLATION = {
    0: "none: one process, trusted code only",
    1: "a process of its own: crashes and resource limits, not a boundary",
    2: "namespaces and seccomp on the shared kernel",
    3: "a kernel of its own in software (gVisor, emulated machine)",
    4: "a kernel of its own behind hardware virtualisation",
}
"""What each isolation level promises. A level is declared, never lowered without being asked."""


class Record:
    """Shared by the records below."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data of its own (dataclasses.asdict takes five times as long; every answer is a record)."""
        return {name: _copied(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The record, unknown keys refused with the nearest known name."""
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in data:
            if key not in known:
                import difflib

                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InvalidRequest(f"{cls.__name__} has no field {key!r}{hint}")
        return cls(**data)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Spec(Record):
    """What a sandbox is to be. The same spec means the same thing on every host."""

    substrate: Literal["function", "container", "microvm", "vm"] = "container"
    runtime: str = ""
    """The engine behind the substrate, "" for its default: runc, crun or runsc (gVisor) behind a container."""
    image: str = "host"
    """"host", "debian", "python", a name given to `dsec image build`, or the absolute path of a root folder."""
    timeout: float = 300.0
    """Seconds until the sandbox is destroyed, counted from creation or from the last set_timeout."""
    cpu: float = 1.0
    memory: int = 1024
    """MiB, of everything the sandbox keeps in memory, its files on a memory disk included; swap is off."""
    disk: int = 512
    """MiB the sandbox may write."""
    pids: int = 256
    network: str | tuple[str, ...] = "none"
    """"none", or what it may reach and which of its ports may be: words of dsec/network/policy.py ("example.org:443",
    "10.1.0.0/16", "in:8000"), or {"allow_out": [...], "deny_out": [...], "allow_in": [ports]}, kept as words."""
    allow_internet_access: bool | None = None
    """True adds every public address to `network`; None afterwards."""
    env: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    """Whom commands run as unless they say otherwise; root inside is nobody outside."""
    isolation_min: int = 0
    """Refuse a substrate whose isolation level is lower (see ISOLATION)."""
    trajectory: str | None = None
    branch: str = "main"
    snapshot_steps: int = 0
    """With a trajectory: capture its files every so many steps (0: never)."""
    snapshot_seconds: float = 0.0
    """The same by time, when something was done since."""
    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        if self.substrate not in SUBSTRATES:
            raise InvalidRequest(f"substrate {self.substrate!r} is none of {', '.join(SUBSTRATES)}")
        for name in ("timeout", "cpu", "memory", "disk", "pids"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**40:
                raise InvalidRequest(f"{name} must be a positive number, not {value!r}")
        object.__setattr__(self, "network", words(self.network, self.allow_internet_access))
        object.__setattr__(self, "allow_internet_access", None)
        for name in ("env", "metadata"):
            for key, value in getattr(self, name).items():
                if not isinstance(key, str) or not isinstance(value, str) or "\0" in key + value or "=" in key:
                    raise InvalidRequest(f"{name} must map strings to strings, not {key!r}: {value!r}")
        if not (0 <= self.snapshot_steps < 2**31 and 0 <= self.snapshot_seconds < 2**31):
            raise InvalidRequest(f"no schedule: {self.snapshot_steps!r} steps, {self.snapshot_seconds!r} seconds")
        if self.substrate == "function" and (self.snapshot_steps or self.snapshot_seconds):
            raise InvalidRequest("a function sandbox has no files to capture on a schedule")
        if not 0 <= self.isolation_min <= 4:
            raise InvalidRequest(f"isolation_min is 0 to 4, not {self.isolation_min!r}")

    def stated(self) -> dict[str, Any]:
        """What differs from the defaults: a field that a later version adds changes neither the digests of older logs
        nor what an older Edge is asked."""
        usual = Spec().as_dict()
        return {key: value for key, value in self.as_dict().items() if value != usual[key]}

    def but(self, **changes: Any) -> Spec:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class CommandResult(Record):
    """How a command ended. Output is UTF-8 with bad bytes replaced; a long one keeps its head and its tail."""

    stdout: str = ""
    stderr: str = ""
    exit_code: int = 0
    """128 + n when signal n ended it."""
    truncated: bool = False
    """Output passed its cap; the middle is missing."""
    duration: float = 0.0
    """Seconds."""
    replayed: bool = False
    """From the trajectory log: nothing ran."""


@dataclass(frozen=True)
class Capabilities(Record):
    """What a substrate can do, declared before it is asked."""

    isolation: int
    """A key of ISOLATION."""
    fork_memory: bool = False
    """fork() copies running processes, not only files."""
    persistent_fs: bool = True
    """Files stay from one command to the next."""
    network: bool = False
    snapshots: bool = True
    """Can be captured, at once, on schedule and before a preemption: its files, with fork_memory its memory too."""
    tty: bool = True
    limits: str = "cgroup"
    """How limits are enforced: "cgroup" (the whole sandbox), "rlimit" (each process), "machine" (a VM's own size)."""


@dataclass(frozen=True)
class SandboxInfo(Record):
    """A sandbox as its Edge sees it."""

    id: str
    substrate: str
    image: str
    state: Literal["creating", "running", "paused", "failed", "dead"]
    isolation: int
    capabilities: dict[str, Any]
    created: float
    deadline: float
    host: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    trajectory: str | None = None
    reason: str = ""
    """Why it failed or died, in one line."""
    resumed: dict[str, Any] | None = None
    """Of a trajectory: {"files", "step", "steps"}. Results of all `steps` are there; of the files those after `step`:
    files "alive" (all), "behind" (a snapshot: later idempotent steps run again) or "lost". "snapshot_failed": why the
    last one on schedule is missing."""

    @property
    def sandbox_id(self) -> str:
        return self.id

    @property
    def template_id(self) -> str:
        """E2B's word for the image."""
        return self.image

    @property
    def started_at(self) -> datetime:
        return datetime.fromtimestamp(self.created, UTC)

    @property
    def end_at(self) -> datetime:
        return datetime.fromtimestamp(min(self.deadline, 4e9), UTC)


def page(found: list[SandboxInfo], limit: int | None, token: str | None) -> dict[str, Any]:
    """Some of the sandboxes, oldest first: at most `limit`, those after `token`, which says where a page ended."""
    found = sorted(found, key=lambda each: (each.created, each.id))
    if token is not None:
        when, _, name = str(token).partition(":")
        try:
            end = float(when), name
        except ValueError:
            raise InvalidRequest(f"{token!r:.100} is no token of an earlier page") from None
        found = [each for each in found if (each.created, each.id) > end]
    if limit is not None and not (isinstance(limit, int) and limit > 0):
        raise InvalidRequest(f"limit is a positive number, not {limit!r}")
    rest, found = found[limit:] if limit else [], found[:limit] if limit else found
    last = f"{found[-1].created!r}:{found[-1].id}" if rest else None
    return {"sandboxes": [each.as_dict() for each in found], "next_token": last}


@dataclass(frozen=True)
class CommandInfo(Record):
    """A command of a sandbox: one that runs, or a finished one whose result is still kept."""

    id: int
    command: str
    started: float
    step: int = 0
    exit_code: int | None = None
    """None while it runs."""

    @property
    def pid(self) -> int:
        """E2B's word for `id`: it names the command to us, and is no process id."""
        return self.id

    @property
    def cmd(self) -> str:
        return self.command

    def __getitem__(self, name: str) -> Any:
        return self.as_dict()[name]


@dataclass(frozen=True)
class SnapshotInfo(Record):
    """A snapshot: `Sandbox.create(template=snapshot_id)` starts from it."""

    snapshot_id: str


@dataclass(frozen=True)
class SandboxQuery:
    """Which sandboxes `list` is to find: those with these entries of metadata, in one of these states."""

    metadata: dict[str, str] | None = None
    state: list[str] | None = None


@dataclass(frozen=True)
class PtySize:
    """A terminal's size."""

    rows: int
    cols: int


@dataclass(frozen=True)
class WriteInfo(Record):
    """What was written."""

    name: str
    path: str
    type: str = "file"


@dataclass(frozen=True)
class FilesystemEvent(Record):
    """What happened to a file below a watched folder."""

    name: str
    """Relative to the folder."""
    type: Literal["create", "remove", "rename", "write", "chmod"]
    """A file moved away is "rename", one moved here "create"."""


@dataclass(frozen=True)
class EntryInfo(Record):
    """A file inside a sandbox."""

    name: str
    path: str
    type: Literal["file", "dir", "link", "other"]
    size: int
    mode: int
    mtime: float
    uid: int = 0
    gid: int = 0

    @property
    def permissions(self) -> str:
        """ "rwxr-xr-x"."""
        return "".join(letter if self.mode >> (8 - n) & 1 else "-" for n, letter in enumerate("rwxrwxrwx"))


@dataclass(frozen=True)
class Stats(Record):
    """What a sandbox uses now."""

    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    pids: int = 0
    disk_bytes: int = 0
    oom_kills: int = 0
