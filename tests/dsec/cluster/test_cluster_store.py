"""The store's promises, on SQLite and on a real PostgreSQL server started for the test."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dsec.cluster.clock import VirtualClock
from dsec.cluster.control import SILENT, Control, Order
from dsec.cluster.database import Sqlite
from dsec.cluster.errors import Conflict, StoreUnavailable, UnknownProject
from dsec.cluster.store import Budget, Edge, Key, Project, Row, Store, open_store
from dsec.errors import QuotaExceeded
from tests.dsec.conftest import reachable


def server_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    if found:
        return found[-1].parent
    program = shutil.which("postgres")
    return Path(program).resolve().parent if program else None


class Server:
    """PostgreSQL in a folder of its own; as root it runs as another user, because it refuses root."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        self.user: dict[str, int] = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
        if self.user:
            os.chown(folder, 65534, 65534)
        self.run("initdb", "-D", str(folder / "data"), "-U", "dsec", "-A", "trust", "--no-sync")
        self.start()
        self.url = f"postgresql://dsec@/postgres?host={folder}"

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), *arguments]
        env = {**os.environ, "HOME": str(self.folder), "LC_ALL": "C"}
        subprocess.run(
            command, cwd=self.folder, env=env, check=True, stdout=subprocess.DEVNULL, timeout=60, **self.user
        )  # type: ignore[call-overload]

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync=off"  # no port to race for
        self.run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start"
        )

    def stop(self, how: str = "immediate") -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", how, "-w", "stop")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="install the extra: pip install 'dsv4[postgres]'")
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    folder = tmp_path_factory.mktemp("postgres", numbered=True)
    reachable(folder)  # for the server's user
    server = Server(folder, programs)
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        opened = open_store(f"sqlite:{tmp_path}/cluster.db")
    else:
        server = request.getfixturevalue("postgres")
        opened = open_store(server.url)
        with opened._database.transaction() as run:
            run("truncate projects, keys, edges, sandboxes, requests, servers")
    opened.put_project(Project("p", max_live=3))
    opened.acquire(Edge("e1", capacity=Budget(8)))
    yield opened
    opened.close()


def row(id: str, run: str = "", project: str = "p", edge: str = "e1", epoch: int = 1, **changes: object) -> Row:
    return Row(id, project, run or id, edge, epoch, Budget(1, 256, 500, 64), spec={"image": "host"}, **changes)  # type: ignore[arg-type]


def live(store: Store) -> int:
    return store.projects()[0].live


def test_a_row_comes_back_as_it_was_written(store: Store) -> None:
    written = row("a", priority=2, created=5.5, deadline=305.5)
    assert store.create(written) == written
    assert store.get("p", "a") == written
    assert store.get("q", "a") is None, "another project must not learn that the id exists"
    assert store.sandboxes("p") == store.sandboxes(None) == [written] and store.sandboxes("q") == []


def test_a_sandbox_ends_once_and_only_by_its_owner(store: Store) -> None:
    store.create(row("a"))
    assert store.finish([("a", "e2", 1, "stopped", "")], 1.0) == []
    assert store.finish([("a", "e1", 2, "stopped", "")], 1.0) == []
    assert store.finish([("a", "e1", 1, "stopped", "bye")], 1.0) == ["a"]
    assert store.finish([("a", "e1", 1, "failed", "")], 2.0) == []
    found = store.get("p", "a")
    assert found and (found.state, found.reason, found.ended) == ("stopped", "bye", 1.0)
    assert live(store) == 0


def test_the_same_key_gives_the_same_sandbox_and_another_request_is_refused(store: Store) -> None:
    first = store.create(row("a"), key="k", digest="1")
    assert store.create(row("b"), key="k", digest="1") == first
    assert live(store) == 1
    with pytest.raises(Conflict):
        store.create(row("c"), key="k", digest="2")
    store.put_project(Project("q"))
    assert store.create(row("d", project="q"), key="k", digest="2").id == "d", "keys belong to a project"


def test_a_run_lives_once(store: Store) -> None:
    store.create(row("a", run="r"))
    assert store.create(row("b", run="r"), key="k", digest="1").id == "a"
    assert live(store) == 1
    store.finish([("a", "e1", 1, "stopped", "")], 1.0)
    assert store.create(row("c", run="r")).id == "c"


def test_a_quota_is_hard_and_a_refused_create_leaves_nothing(store: Store) -> None:
    for id in "abc":
        store.create(row(id))
    with pytest.raises(QuotaExceeded, match="3 live"):
        store.create(row("d"), key="k", digest="1")
    store.finish([("a", "e1", 1, "stopped", "")], 1.0)
    assert store.create(row("e"), key="k", digest="2").id == "e", "the refused request must not have kept its key"
    with pytest.raises(UnknownProject):
        store.create(row("f", project="nobody"))


def test_a_race_for_the_last_places_of_a_quota(store: Store) -> None:
    def attempt(number: int) -> str:
        try:
            return store.create(row(f"s{number}")).id
        except QuotaExceeded:
            return ""

    with ThreadPoolExecutor(8) as pool:
        made = [id for id in pool.map(attempt, range(24)) if id]
    assert len(made) == live(store) == len(store.sandboxes("p")) == 3


def test_a_race_of_one_key_makes_one_sandbox(store: Store) -> None:
    barrier = threading.Barrier(8)

    def attempt(number: int) -> str:
        barrier.wait()
        return store.create(row(f"s{number}", run="r"), key="k", digest="1").id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(attempt, range(8)))) == 1
    assert live(store) == 1


def test_a_lease_is_renewed_by_its_epoch_only(store: Store) -> None:
    assert store.renew("e1", 1, {"seq": 1})
    assert store.acquire(Edge("e1")) == 2
    assert not store.renew("e1", 1, {})
    assert store.renew("e1", 2, {})


def test_fencing_needs_silence_and_loses_the_sandboxes(store: Store) -> None:
    store.create(row("a"))
    store.renew("e1", 1, {})
    assert store.fence("e1", 1, 0, 9.0) is None, "it renewed since"
    assert store.fence("e1", 1, 1, 9.0) == ["a"]
    assert store.fence("e1", 1, 1, 9.0) is None
    assert not store.renew("e1", 1, {}) and live(store) == 0
    found = store.get("p", "a")
    assert found and found.state == "lost"
    assert store.finish([("a", "e1", 1, "stopped", "")], 10.0) == [], "what a fenced Edge says comes too late"


def test_an_edge_that_restarts_keeps_what_survived(store: Store) -> None:
    store.create(row("a"))
    store.create(row("b"))
    assert store.acquire(Edge("e1"), keep=["a"], now=3.0) == 2
    assert [r.id for r in store.owned("e1", 2)] == ["a"] and live(store) == 1
    late = store.create(row("c", epoch=1))
    assert store.sweep(4.0) == [late.id], "written for an epoch that was over"
    assert [r.id for r in store.owned("e1", 2)] == ["a"] and live(store) == 1


def test_a_move_needs_the_row_as_it_was(store: Store) -> None:
    first = store.create(row("a"))
    moved = store.move(first, "e2", 4)
    assert moved == replace(first, edge="e2", epoch=4) == store.get("p", "a")
    assert store.move(first, "e3", 1) is None


def test_stopping_is_final(store: Store) -> None:
    store.create(row("a"))
    assert store.change("a", "paused") and store.change("a", deadline=77.0)
    assert store.change("a", "stopping", "expired") and store.change("a", "live", "no")
    found = store.get("p", "a")
    assert found and (found.state, found.reason, found.deadline) == ("stopping", "expired", 77.0)
    store.finish([("a", "e1", 1, "expired", "")], 1.0)
    assert not store.change("a", "live")


def test_lists_for_the_watcher(store: Store) -> None:
    store.create(row("a", deadline=10.0, created=1.0, priority=1))
    store.create(row("b", deadline=20.0, created=2.0))
    store.create(row("c", deadline=5.0, created=3.0))
    store.change("c", "stopping")
    assert [r.id for r in store.overdue(15.0)] == ["a"]
    assert [r.id for r in store.below(2)] == ["b", "a"]
    assert store.counts() == {("p", "live"): 2, ("p", "stopping"): 1}
    store.finish([("a", "e1", 1, "stopped", "")], 30.0)
    assert (store.purge(30.0), store.purge(31.0)) == (0, 1)
    assert store.get("p", "a") is None


def test_keys(store: Store) -> None:
    key = Key("d1", "p", "laptop", admin=True)
    store.put_key(key)
    assert store.key("d1") == key and store.key("d2") is None
    assert store.drop_key("d1") and not store.drop_key("d1") and store.key("d1") is None


def test_a_broken_write_leaves_nothing(store: Store) -> None:
    store.create(row("a"))
    with pytest.raises(AssertionError):
        store.finish([("a", "e1", 1, "stopped", ""), ("b", "e1", 1, "no such state", "")], 1.0)
    assert live(store) == 1


def test_postgres_killed_and_back(postgres: Server) -> None:
    """kill -9 of the server: calls say so, and the next one after its return works."""
    store = open_store(postgres.url)
    store.put_project(Project("after", max_live=5))
    postgres.stop("immediate")
    with pytest.raises(StoreUnavailable):
        store.projects()
    with pytest.raises(StoreUnavailable):
        store.projects()
    postgres.start()
    assert "after" in [project.name for project in store.projects()]
    store.close()


def test_sqlite_survives_its_process(tmp_path: Path) -> None:
    store = open_store(f"sqlite:{tmp_path}/s/cluster.db")
    store.put_project(Project("p"))
    store.create(row("a"))
    again = open_store(f"sqlite:{tmp_path}/s/cluster.db")
    assert [r.id for r in again.sandboxes("p")] == ["a"]
    with pytest.raises(ValueError, match="mysql"):
        open_store("mysql://x")


def test_a_locked_database_is_said_and_writes_nothing(tmp_path: Path) -> None:
    """Another process holds the lock (a backup, a debugger): calls raise StoreUnavailable and go on afterwards."""
    path = tmp_path / "cluster.db"
    store = open_store(f"sqlite:{path}")
    store.put_project(Project("p", max_live=5))
    store._database._connection.execute("pragma busy_timeout = 50")  # type: ignore[attr-defined]
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.create(row("a"))
    other.execute("rollback")
    assert store.sandboxes("p") == [] and live(store) == 0
    store.create(row("a"))
    assert live(store) == 1


GROWING = ("sandboxes", "requests")
"""Tables with a row for every create of the last hour."""


def test_no_common_statement_reads_a_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a create, an end, a refusal and each second's looks ask must be found by an index: 300,000 simulated
    sandboxes stood still on one DELETE that was not."""
    asked: dict[str, tuple[object, ...]] = {}
    plain = Sqlite._run

    def run(self: Sqlite, statement: str, parameters: tuple[object, ...] = ()) -> list[object]:
        asked[statement] = parameters
        return plain(self, statement, parameters)

    store = open_store(f"sqlite:{tmp_path}/cluster.db")
    store.put_project(Project("p"))
    store.acquire(Edge("e1", capacity=Budget(8)))
    monkeypatch.setattr(Sqlite, "_run", run)
    for id in "abc":
        store.create(row(id, run="r"), key=id, digest="1")
    store.withdraw(row("a"))
    moved = store.move(store.create(row("d")), "e2", 1)
    assert moved
    store.finish([("d", "e2", 1, "stopped", "")], 1.0)
    store.change("b", "stopping")
    store.sweep(1.0)
    store.fence("e1", 1, 0, 1.0)
    store.purge(1.0)
    store.owned("e1", 1)
    store.below(1)
    store.last_of_run("p", "r")
    store.sandboxes("p")
    store.overdue(1.0)
    for statement, parameters in asked.items():
        plan = [text for *_, text in store._database._connection.execute("explain query plan " + statement, parameters)]  # type: ignore[attr-defined]
        scans = [
            text for text in plan if text.startswith("SCAN") and text.split()[1] in GROWING and "INDEX" not in text
        ]
        assert not scans, f"{statement}: {scans}"
    assert any("delete from requests where project" in statement for statement in asked)


def test_a_server_that_starts_does_not_wait_for_those_that_died(store: Store) -> None:
    """Queues that dead servers left in the store count no more, and are not kept for every server to come."""
    clock = VirtualClock(5.0)
    for n in range(4):
        store.tell(f"dead{n}", {"9": {"p": 3}})
    servers = [Control(store, clock, servers=2, new_id=iter([f"server{n}", *"xyz"]).__next__) for n in range(2)]
    for _ in range(SILENT + 1):
        for server in servers:
            server.refresh()
    assert set(store.heard()) == {"server0", "server1"}, "the living stay, though one of them has just started"
    servers[0].submit(Order("p"), None)
    assert servers[0]._our_turn()
