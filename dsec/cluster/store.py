"""What should run, and who may run it: the only state that API servers, watchers and Edges share.

One set of SQL statements for SQLite (one host) and PostgreSQL (several). Writes are few: a create, an end, and one
lease renewal per *Edge*, never one per sandbox. Every change of a row is a compare-and-set, so that any number of
stateless servers may work on it: a sandbox leaves the live states once, a lease is renewed only by the epoch that holds
it, and a project's count of live sandboxes is taken in the transaction that changes it.

The store trusts no clock: the watcher judges leases by its own (`dsec.cluster.watcher`); times here are for people.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from dsec.cluster.database import Database, Execute, open_database
from dsec.cluster.errors import Conflict, UnknownProject
from dsec.errors import QuotaExceeded

LIVE = ("live", "paused", "stopping")
ENDS = ("stopped", "expired", "failed", "preempted", "lost")
"""stopped: asked for; expired: its time was up; failed: never started or broke; preempted; lost: its host went away."""


@dataclass(frozen=True, slots=True)
class Budget:
    """An amount of what a host has: sandboxes, MiB of memory, thousandths of a core, processes."""

    slots: int = 1
    memory: int = 0
    cpu: int = 0
    pids: int = 0


@dataclass(frozen=True, slots=True)
class Edge:
    """One host as the store knows it. ``seq`` counts renewals within ``epoch``; ``report`` came with the last one."""

    id: str
    zone: str = ""
    address: str = ""
    capacity: Budget = field(default_factory=Budget)
    epoch: int = 0
    seq: int = 0
    up: bool = False
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One sandbox. ``run`` names what must never run twice at once (a trajectory and branch; the id if it has none)."""

    id: str
    project: str
    run: str
    edge: str
    epoch: int
    budget: Budget = field(default_factory=Budget)
    priority: int = 0
    state: str = "live"
    reason: str = ""
    created: float = 0.0
    deadline: float = 0.0
    ended: float | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. (dataclasses.asdict copies the specification part by part: a tenth of a millisecond.)"""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return plain | {"budget": asdict(self.budget), "spec": dict(self.spec)}


@dataclass(frozen=True, slots=True)
class Project:
    name: str
    weight: float = 1.0
    max_live: int = 1000
    live: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """An API key; only its digest is kept."""

    digest: str
    project: str
    name: str = ""
    admin: bool = False


SCHEMA = """
create table if not exists projects (name text primary key, weight double precision not null, max_live bigint not null,
  live bigint not null default 0);
create table if not exists keys (digest text primary key, project text not null, name text not null,
  admin int not null);
create table if not exists edges (id text primary key, zone text not null, address text not null,
  capacity text not null, epoch bigint not null, seq bigint not null, up int not null, report text not null);
create table if not exists sandboxes (id text primary key, project text not null, run text not null, edge text not null,
  epoch bigint not null, budget text not null, priority int not null, state text not null, reason text not null,
  created double precision not null, deadline double precision not null, ended double precision, spec text not null);
create table if not exists requests (project text not null, key text not null, digest text not null,
  sandbox text not null, created double precision not null, primary key (project, key));
create index if not exists requests_of on requests (project, sandbox);
create index if not exists requests_by_age on requests (created);
create table if not exists snapshots (id text primary key, project text not null, edge text not null);
create table if not exists secrets (name text primary key, value text not null);
create table if not exists servers (id text primary key, seq bigint not null, waiting text not null);
create unique index if not exists one_live_run on sandboxes (project, run) where ended is null;
create index if not exists live_of_edge on sandboxes (edge, epoch) where ended is null;
create index if not exists by_run on sandboxes (project, run, created);
create index if not exists by_project on sandboxes (project, created);
create index if not exists by_end on sandboxes (ended) where ended is not null;
create index if not exists live_by_deadline on sandboxes (deadline) where ended is null;
create index if not exists live_by_priority on sandboxes (priority, created desc) where state = 'live' and ended is null
"""


class Store:
    """Blocking calls, safe from any thread. Raises `StoreUnavailable` when the database does not answer; a write that
    raised may or may not have happened, and every write here may therefore be repeated."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.transaction() as run:
            for statement in SCHEMA.split(";"):
                run(statement)

    def close(self) -> None:
        self._database.close()

    # Projects and keys

    def put_project(self, project: Project) -> None:
        """Adds or changes a project; what is live stays counted."""
        with self._database.transaction(durable=True) as run:
            run(
                "insert into projects (name, weight, max_live) values (?, ?, ?) on conflict (name) do update set"
                " weight = excluded.weight, max_live = excluded.max_live",
                (project.name, project.weight, project.max_live),
            )

    def projects(self) -> list[Project]:
        with self._database.transaction() as run:
            return [Project(*row) for row in run("select name, weight, max_live, live from projects order by name")]

    def put_key(self, key: Key) -> None:
        with self._database.transaction(durable=True) as run:
            run("insert into keys values (?, ?, ?, ?)", (key.digest, key.project, key.name, int(key.admin)))

    def key(self, digest: str) -> Key | None:
        with self._database.transaction() as run:
            rows = run("select digest, project, name, admin from keys where digest = ?", (digest,))
            return Key(rows[0][0], rows[0][1], rows[0][2], bool(rows[0][3])) if rows else None

    def drop_key(self, digest: str) -> bool:
        with self._database.transaction(durable=True) as run:
            return bool(run("delete from keys where digest = ? returning digest", (digest,)))

    def secret(self, name: str) -> str:
        """A random text that all servers of this store share, made by whoever asks first."""
        with self._database.transaction(durable=True) as run:
            run("insert into secrets values (?, ?) on conflict do nothing", (name, secrets.token_hex(32)))
            return str(run("select value from secrets where name = ?", (name,))[0][0])

    # Leases: one per Edge

    def acquire(self, edge: Edge, keep: Iterable[str] = (), now: float = 0.0) -> int:
        """Gives ``edge`` a new epoch. Of its live sandboxes those in ``keep`` (they survived a restart of the Edge)
        move to the new epoch, the others end as lost."""
        with self._database.transaction(durable=True) as run:
            rows = run(
                "insert into edges values (?, ?, ?, ?, 1, 0, 1, '{}') on conflict (id) do update set epoch ="
                " edges.epoch + 1, seq = 0, up = 1, zone = excluded.zone, address = excluded.address,"
                " capacity = excluded.capacity, report = '{}' returning epoch",
                (edge.id, edge.zone, edge.address, _write(edge.capacity)),
            )
            epoch = int(rows[0][0])
            for id in keep:
                run("update sandboxes set epoch = ? where id = ? and edge = ? and ended is null", (epoch, id, edge.id))
            self._lose(run, edge.id, epoch, now)
        return epoch

    def renew(self, edge: str, epoch: int, report: Mapping[str, Any]) -> bool:
        """False: somebody else holds the lease or the watcher took it away, and the Edge must stop at once."""
        with self._database.transaction() as run:
            return bool(
                run(
                    "update edges set seq = seq + 1, report = ? where id = ? and epoch = ? and up = 1 returning seq",
                    (json.dumps(report), edge, epoch),
                )
            )

    def edges(self) -> list[Edge]:
        with self._database.transaction() as run:
            rows = run("select id, zone, address, capacity, epoch, seq, up, report from edges")
        return [
            Edge(id, zone, address, _read(capacity), epoch, seq, bool(up), json.loads(report))
            for id, zone, address, capacity, epoch, seq, up, report in rows
        ]

    def beats(self) -> list[tuple[str, int, int, bool]]:
        """(id, epoch, seq, up) of every Edge: what a watcher needs each second, without the reports."""
        with self._database.transaction() as run:
            return [(id, epoch, seq, bool(up)) for id, epoch, seq, up in run("select id, epoch, seq, up from edges")]

    def fence(self, edge: str, epoch: int, seq: int, now: float) -> list[str] | None:
        """Takes the lease away if nothing was renewed since ``seq`` -> the sandboxes lost with it, or None."""
        with self._database.transaction(durable=True) as run:
            if not run(
                "update edges set up = 0, epoch = epoch + 1 where id = ? and epoch = ? and seq = ? and up = 1"
                " returning epoch",
                (edge, epoch, seq),
            ):
                return None
            return self._lose(run, edge, epoch + 1, now)

    def sweep(self, now: float) -> list[str]:
        """Ends as lost what was placed on an epoch that was over when the row was written -> their ids."""
        stale = (
            "select distinct s.edge, e.epoch from (select distinct edge, epoch from sandboxes where ended is null) s"
            " join edges e on e.id = s.edge where s.epoch < e.epoch"
        )
        lost = []
        with self._database.transaction() as run:
            for edge, epoch in run(stale):
                lost += self._lose(run, edge, epoch, now)
        return lost

    def _lose(self, run: Execute, edge: str, epoch: int, now: float) -> list[str]:
        rows = run(
            "update sandboxes set state = 'lost', reason = 'host lost', ended = ? where edge = ? and epoch < ?"
            " and ended is null returning id, project",
            (now, edge, epoch),
        )
        self._release(run, [row[1] for row in rows])
        return [row[0] for row in rows]

    def _release(self, run: Execute, projects: Sequence[str]) -> None:
        for project in sorted(set(projects)):  # sorted: two transactions lock the rows in one order
            run("update projects set live = live - ? where name = ?", (projects.count(project), project))

    # Sandboxes

    def create(self, row: Row, key: str = "", digest: str = "") -> Row:
        """Writes ``row`` before any Edge hears of it. Returns the row that stands: the given one, the one that an
        earlier request with the same idempotency ``key`` made, or the live one of the same run.

        Raises:
            Conflict: ``key`` was used for another request (another ``digest``).
            QuotaExceeded: the project has ``max_live`` sandboxes.
            UnknownProject: there is no such project.
        """
        with self._database.transaction() as run:
            if key:
                run(
                    "insert into requests values (?, ?, ?, ?, ?) on conflict do nothing",
                    (row.project, key, digest, row.id, row.created),
                )
                first = run("select digest, sandbox from requests where project = ? and key = ?", (row.project, key))[0]
                if first[0] != digest:
                    raise Conflict(f"idempotency key {key!r} was used for a different request")
                if first[1] != row.id:
                    if found := self._rows(run, "id = ?", (first[1],)):
                        return found[0]
                    raise Conflict(f"idempotency key {key!r}: its sandbox {first[1]} has been purged")
            count = "update projects set live = live + 1 where name = ? and live < max_live returning live"
            if not run(count, (row.project,)):
                limit = run("select max_live from projects where name = ?", (row.project,))
                if not limit:
                    raise UnknownProject(row.project)
                if found := self._rows(run, "project = ? and run = ? and ended is null", (row.project, row.run)):
                    return found[0]
                raise QuotaExceeded(f"project {row.project!r} has its {limit[0][0]} live sandboxes")
            values = (
                *(row.id, row.project, row.run, row.edge, row.epoch, _write(row.budget), row.priority),
                *(row.state, row.reason, row.created, row.deadline, row.ended, json.dumps(dict(row.spec))),
            )
            insert = f"insert into sandboxes values ({', '.join('?' * 13)}) on conflict do nothing returning id"
            if run(insert, values):
                return row
            self._release(run, [row.project])
            same = "(id = ?) or (project = ? and run = ? and ended is null)"
            standing = self._rows(run, same, (row.id, row.project, row.run))[0]
            if key:
                where = (standing.id, row.project, key)
                run("update requests set sandbox = ? where project = ? and key = ?", where)
            return standing

    def move(self, row: Row, edge: str, epoch: int) -> Row | None:
        """Gives a sandbox that its Edge refused to another one. None: it ended meanwhile, or somebody else moved it."""
        with self._database.transaction() as run:
            moved = run(
                "update sandboxes set edge = ?, epoch = ? where id = ? and edge = ? and epoch = ? and state = 'live'"
                " and ended is null returning id",
                (edge, epoch, row.id, row.edge, row.epoch),
            )
        return replace(row, edge=edge, epoch=epoch) if moved else None

    def finish(self, ends: Iterable[tuple[str, str, int, str, str]], now: float) -> list[str]:
        """Ends sandboxes, each (id, edge, epoch, state, reason) -> the ids that this call ended. A row ends once, and
        only the Edge and epoch that own it may end it."""
        done, projects = [], []
        with self._database.transaction() as run:
            for id, edge, epoch, state, reason in sorted(ends):
                assert state in ENDS, state
                rows = run(
                    "update sandboxes set state = ?, reason = ?, ended = ? where id = ? and edge = ? and epoch = ?"
                    " and ended is null returning project",
                    (state, reason, now, id, edge, epoch),
                )
                if rows:
                    done.append(id)
                    projects.append(rows[0][0])
            self._release(run, projects)
        return done

    def withdraw(self, row: Row) -> bool:
        """Takes back a create that no Edge took, its idempotency key too: it has never been. False: it ended, or it
        moved, meanwhile."""
        with self._database.transaction() as run:
            gone = run(
                "delete from sandboxes where id = ? and edge = ? and epoch = ? and state = 'live' and ended is null"
                " returning project",
                (row.id, row.edge, row.epoch),
            )
            if gone:
                self._release(run, [row.project])
                run("delete from requests where project = ? and sandbox = ?", (row.project, row.id))
        return bool(gone)

    # What API servers tell each other: how many creates wait, by priority and project

    def tell(self, server: str, waiting: Mapping[str, Mapping[str, int]]) -> None:
        with self._database.transaction() as run:
            run(
                "insert into servers values (?, 1, ?) on conflict (id) do update set seq = servers.seq + 1,"
                " waiting = excluded.waiting",
                (server, json.dumps(waiting)),
            )

    def heard(self) -> dict[str, tuple[int, dict[str, dict[str, int]]]]:
        """Server -> (how often it told, what it told last). One that tells no more is gone."""
        with self._database.transaction() as run:
            return {id: (seq, json.loads(waiting)) for id, seq, waiting in run("select * from servers")}

    def unhear(self, server: str, seq: int) -> None:
        """Forgets a server that has told nothing since ``seq``; should it live after all, it tells again."""
        with self._database.transaction() as run:
            run("delete from servers where id = ? and seq = ?", (server, seq))

    # Where files lie that only one Edge has

    def put_snapshot(self, id: str, project: str, edge: str) -> None:
        with self._database.transaction(durable=True) as run:
            run("insert into snapshots values (?, ?, ?) on conflict do nothing", (id, project, edge))

    def snapshot(self, id: str, project: str) -> str | None:
        """The Edge that has it."""
        with self._database.transaction() as run:
            rows = run("select edge from snapshots where id = ? and project = ?", (id, project))
        return str(rows[0][0]) if rows else None

    def snapshots(self, project: str) -> list[str]:
        with self._database.transaction() as run:
            return [row[0] for row in run("select id from snapshots where project = ? order by id", (project,))]

    def drop_snapshot(self, id: str) -> None:
        with self._database.transaction() as run:
            run("delete from snapshots where id = ?", (id,))

    def last_of_run(self, project: str, run_: str) -> Row | None:
        """The youngest sandbox of a run, ended or not."""
        with self._database.transaction() as run:
            rows = self._rows(run, "project = ? and run = ? order by created desc limit 1", (project, run_))
        return rows[0] if rows else None

    def change(self, id: str, state: str = "", reason: str = "", deadline: float | None = None) -> bool:
        """Changes what a live sandbox should be. False: it has ended. `stopping` is final: only an end follows it."""
        assert not state or state in LIVE, state
        with self._database.transaction() as run:
            return bool(
                run(
                    "update sandboxes set state = case when state = 'stopping' or ? = '' then state else ? end,"
                    " reason = case when state = 'stopping' or ? = '' then reason else ? end,"
                    " deadline = coalesce(?, deadline) where id = ? and ended is null returning id",
                    (state, state, state, reason, deadline, id),
                )
            )

    def owned(self, edge: str, epoch: int) -> list[Row]:
        """The live sandboxes that this Edge should be running, without their specs."""
        with self._database.transaction() as run:
            return self._rows(run, "edge = ? and epoch = ? and ended is null", (edge, epoch), spec=False)

    def get(self, project: str | None, id: str) -> Row | None:
        """None also for another project's id: nobody learns that it exists. ``project`` None: whosesoever it is."""
        with self._database.transaction() as run:
            rows = self._rows(run, "id = ?", (id,))
        return rows[0] if rows and project in (None, rows[0].project) else None

    def sandboxes(self, project: str | None, live: bool = True, limit: int = 1000, after: float = -1.0) -> list[Row]:
        """Sandboxes by time of creation. ``project`` None: all of them, for an administrator."""
        where = "created > ?" + (" and ended is null" if live else "")
        parameters: tuple[Any, ...] = (after, limit)
        if project is not None:
            where, parameters = where + " and project = ?", (after, project, limit)
        with self._database.transaction() as run:
            return self._rows(run, where + " order by created limit ?", parameters)

    def below(self, priority: int, limit: int = 256) -> list[Row]:
        """Candidates for preemption: live sandboxes of lower priority, the least important and youngest first, without
        their specs."""
        where = "priority < ? and state = 'live' and ended is null order by priority, created desc limit ?"
        with self._database.transaction() as run:
            return self._rows(run, where, (priority, limit), spec=False)

    def overdue(self, before: float, limit: int = 1000) -> list[Row]:
        """Live sandboxes whose deadline passed before ``before`` and that nobody has told to stop."""
        where = "deadline < ? and state <> 'stopping' and ended is null limit ?"
        with self._database.transaction() as run:
            return self._rows(run, where, (before, limit))

    def purge(self, before: float) -> int:
        """Forgets sandboxes that ended, and idempotency keys that were made, before ``before``."""
        with self._database.transaction() as run:
            gone = run("delete from sandboxes where ended < ? returning id", (before,))
            run("delete from requests where created < ?", (before,))
        return len(gone)

    def counts(self) -> dict[tuple[str, str], int]:
        """How many sandboxes the table holds by (project, state)."""
        with self._database.transaction() as run:
            rows = run("select project, state, count(*) from sandboxes group by project, state")
        return {(project, state): count for project, state, count in rows}

    def _rows(self, run: Execute, where: str, parameters: tuple[Any, ...], spec: bool = True) -> list[Row]:
        rows = run(f"select {COLUMNS} from sandboxes where {where}", parameters)
        found = []
        for row in rows:
            values: list[Any] = [*row[:5], _read(row[5]), *row[6:12], json.loads(row[12]) if spec else {}]
            found.append(Row(*values))
        return found


COLUMNS = ", ".join(f.name for f in fields(Row))


@lru_cache(4096)
def _write(budget: Budget) -> str:
    return json.dumps(asdict(budget))


@lru_cache(4096)
def _read(text: str) -> Budget:
    return Budget(**json.loads(text))


def open_store(url: str) -> Store:
    """``sqlite:PATH`` (or ``sqlite::memory:``) or ``postgresql://...``."""
    return Store(open_database(url))
