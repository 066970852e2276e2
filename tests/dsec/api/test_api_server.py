"""The API server over real HTTP, with real Edges and sandboxes behind it."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import Cluster

from dsec.cluster.placement import StartRate
from dsec.types import Spec
from tests.dsec.conftest import until

SPEC = {"substrate": "container", "timeout": 120, "memory": 128, "pids": 32}


def create(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    answer = client.post("/v1/sandboxes", json=SPEC | changes)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def execute(client: httpx.Client, id: str, command: str, **more: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/sandboxes/{id}/exec", json={"command": command, **more})
    assert answer.status_code == 200, answer.text
    return dict(json.loads(answer.text.splitlines()[-1]))


def kill_all(client: httpx.Client) -> None:
    for each in client.get("/v1/sandboxes").json()["sandboxes"]:
        client.delete(f"/v1/sandboxes/{each['id']}")


def test_a_sandbox_from_create_to_kill(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red:
        made = create(red, metadata={"job": "7"})
        assert made["state"] == "running" and made["host"] in ("one", "two") and made["metadata"] == {"job": "7"}
        id = made["id"]
        assert execute(red, id, "echo out; echo err >&2; exit 3")["result"]["exit_code"] == 3
        events = [
            json.loads(line)
            for line in red.post(f"/v1/sandboxes/{id}/exec", json={"command": "echo a"}).text.splitlines()
        ]
        assert {"stdout": "a\n"} in events and events[-1]["result"]["stdout"] == "a\n"
        assert red.put(f"/v1/sandboxes/{id}/files", params={"path": "/tmp/x"}, content=b"\0\xff").json() == {"size": 2}
        assert red.get(f"/v1/sandboxes/{id}/files", params={"path": "/tmp/x"}).content == b"\0\xff"
        assert red.get(f"/v1/sandboxes/{id}").json()["id"] == id
        assert [each["id"] for each in red.get("/v1/sandboxes").json()["sandboxes"]] == [id]
        later = red.post(f"/v1/sandboxes/{id}/timeout", json={"timeout": 500}).json()
        row = cluster.store.get("red", id)
        assert row and row.deadline == later["deadline"] > time.time() + 400
        assert red.delete(f"/v1/sandboxes/{id}").json() == {"killed": True}
        gone = red.get(f"/v1/sandboxes/{id}")
        assert gone.status_code == 404 and gone.json()["error"] == "NotFound"
        row = cluster.store.get("red", id)
        assert row and row.state == "stopped"


def test_pause_stops_the_clock_and_resume_starts_it(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red:
        id = create(red)["id"]
        assert red.post(f"/v1/sandboxes/{id}/pause").json()["state"] == "paused"
        row = cluster.store.get("red", id)
        assert row and row.state == "paused" and row.deadline > time.time() + 1e6
        assert red.post(f"/v1/sandboxes/{id}/resume").json()["state"] == "running"
        row = cluster.store.get("red", id)
        assert row and row.state == "live" and row.deadline < time.time() + 121
        assert execute(red, id, "true")["result"]["exit_code"] == 0
        kill_all(red)


def test_forks_have_the_files_and_ids_of_their_own(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red:
        made = create(red)
        execute(red, made["id"], "echo before > /tmp/f")
        forks = red.post(f"/v1/sandboxes/{made['id']}/fork", json={"count": 2}).json()["forks"]
        ids = [fork["info"]["id"] for fork in forks]
        assert len({*ids, made["id"]}) == 3 and all(fork["info"]["host"] == made["host"] for fork in forks)
        for id in ids:
            assert execute(red, id, "cat /tmp/f")["result"]["stdout"] == "before\n"
        kill_all(red)


def test_a_snapshot_is_its_projects_own(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red, cluster.client(cluster.blue) as blue:
        made = create(red)
        execute(red, made["id"], "echo kept > /root/f")
        name = red.post(f"/v1/sandboxes/{made['id']}/snapshot").json()["snapshot"]
        again = create(red, image=f"snapshot:{name}")
        assert (
            again["host"] == made["host"] and execute(red, again["id"], "cat /root/f")["result"]["stdout"] == "kept\n"
        )
        assert blue.post("/v1/sandboxes", json=SPEC | {"image": f"snapshot:{name}"}).status_code == 404
        kill_all(red)


def test_another_projects_ids_do_not_exist(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red, cluster.client(cluster.blue) as blue:
        id = create(red)["id"]
        unknown = "f" * 32
        for method, path, body in [
            ("GET", "/v1/sandboxes/{}", None),
            ("DELETE", "/v1/sandboxes/{}", None),
            ("POST", "/v1/sandboxes/{}/exec", {"command": "id"}),
            ("GET", "/v1/sandboxes/{}/files?path=/etc/passwd", None),
            ("PUT", "/v1/sandboxes/{}/files?path=/tmp/a", None),
            ("POST", "/v1/sandboxes/{}/pause", {}),
            ("POST", "/v1/sandboxes/{}/fork", {}),
            ("POST", "/v1/sandboxes/{}/commands.list", {}),
        ]:
            answers = [blue.request(method, path.format(each), json=body) for each in (id, unknown)]
            assert [answer.status_code for answer in answers] == [404, 404], path
            assert answers[0].text.replace(id, unknown) == answers[1].text, "the two must look the same"
        assert blue.get("/v1/sandboxes").json() == {"sandboxes": []}
        assert execute(red, id, "true")["result"]["exit_code"] == 0
        edge_id = next(box.id for node in cluster.nodes for box in node.edge.boxes.values() if box.state == "running")
        assert edge_id != id and red.get(f"/v1/sandboxes/{edge_id}").status_code == 404
        kill_all(red)


@pytest.mark.parametrize(
    "op", ["status", "pool", "shutdown", "cluster.start", "cluster.stop", "delete_snapshot", "_run"]
)
def test_the_edges_own_operations_are_not_for_tenants(cluster: Cluster, op: str) -> None:
    with cluster.client(cluster.red) as red:
        id = create(red)["id"]
        assert red.post(f"/v1/sandboxes/{id}/{op}", json={}).status_code == 404
        kill_all(red)


@pytest.mark.parametrize("key", ["", "dsec_wrong", "x" * 5000])
def test_without_a_key_nothing(cluster: Cluster, key: str) -> None:
    with cluster.client(key) as nobody:
        for path in ("/v1/sandboxes", "/v1/fleet", "/v1/projects"):
            assert nobody.get(path).status_code == 403


def test_keys_are_hashed_and_administration_needs_an_admins(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red, cluster.client(cluster.admin) as admin:
        for path in ("/v1/fleet", "/v1/projects"):
            assert red.get(path).status_code == 403 and admin.get(path).status_code == 200
        assert admin.put("/v1/projects/green", params={"weight": 2, "max_live": 1}).status_code == 200
        assert admin.put("/v1/projects/green", params={"weight": -2}).status_code == 400
        key = admin.post("/v1/projects/green/keys").json()["key"]
        with cluster.store._database.transaction() as run:
            assert key not in str(run("select * from keys"))
        with cluster.client(key) as green:
            assert green.get("/v1/sandboxes").json() == {"sandboxes": []}
        assert admin.post("/v1/projects/nobody/keys").status_code == 404


def test_a_quota_holds_under_a_race(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: red.post("/v1/sandboxes", json=SPEC), range(12)))
        assert sorted(answer.status_code for answer in answers) == [201] * 6 + [429] * 6
        assert {a.json()["error"] for a in answers if a.status_code == 429} == {"QuotaExceeded"}
        kill_all(red)
        create(red)
        kill_all(red)


def test_an_idempotency_key_makes_one_sandbox(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red, cluster.client(cluster.blue) as blue, ThreadPoolExecutor(6) as pool:
        head = {"idempotency-key": "k1"}
        ids = set(pool.map(lambda _: red.post("/v1/sandboxes", json=SPEC, headers=head).json()["id"], range(6)))
        assert len(ids) == 1
        other = red.post("/v1/sandboxes", json=SPEC | {"memory": 256}, headers=head)
        assert other.status_code == 409 and other.json()["error"] == "Conflict"
        assert blue.post("/v1/sandboxes", json=SPEC, headers=head).json()["id"] not in ids
        kill_all(red)
        kill_all(blue)


def test_no_room_is_said_in_time_and_waiting_gets_a_place(cluster: Cluster) -> None:
    with cluster.client(cluster.blue) as blue, ThreadPoolExecutor(1) as pool:
        big = {"memory": 60_000}
        first, second = create(blue, **big), create(blue, **big)
        answer = blue.post("/v1/sandboxes", params={"wait": 0.3}, json=SPEC | big)
        assert answer.status_code == 503 and answer.json()["error"] == "Capacity"
        waiting = pool.submit(create, blue, **big)
        time.sleep(0.3)
        assert not waiting.done()
        blue.delete(f"/v1/sandboxes/{first['id']}")
        assert waiting.result(60)["id"] not in (first["id"], second["id"])
        kill_all(blue)


def test_mistakes_are_named(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red:
        for body, word in [({"memroy": 5}, "memory"), ({"substrate": "tree"}, "tree"), ({"timeout": -1}, "timeout")]:
            answer = red.post("/v1/sandboxes", json=body)
            assert answer.status_code == 400 and word in answer.json()["message"], answer.text
        assert red.post("/v1/sandboxes", json=SPEC | {"image": "/etc"}).status_code == 403
        assert red.post("/v1/ops/create", content=b"junk").status_code == 400
        id = create(red)["id"]
        assert red.post(f"/v1/sandboxes/{id}/files.list", json={}).status_code == 400
        assert red.post(f"/v1/sandboxes/{id}/files.write", json={"path": "/tmp/a", "data": "!"}).status_code == 400
        assert red.get(f"/v1/sandboxes/{id}/files", params={"path": "/nowhere"}).status_code == 404
        kill_all(red)


def test_a_sandbox_that_ends_by_itself_says_how(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red:
        id = create(red, timeout=1)["id"]
        until(lambda: (row := cluster.store.get("red", id)) is None or row.ended is not None)
        row = cluster.store.get("red", id)
        assert row and row.state == "expired"
        assert red.get(f"/v1/sandboxes/{id}").status_code == 404


def test_a_trajectory_is_deleted_by_its_project_only(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red, cluster.client(cluster.blue) as blue:
        for replayed in (False, True, False):
            id = create(red, trajectory="deleted/1")["id"]
            answer = execute(red, id, "echo 7")
            assert (answer["result"]["stdout"], answer["result"]["replayed"]) == ("7\n", replayed), answer
            busy = red.delete("/v1/trajectories/deleted/1")
            assert busy.status_code == 400 and "open" in busy.json()["message"]
            kill_all(red)
            if replayed:
                assert blue.delete("/v1/trajectories/deleted/1").status_code == 404, "not another project's"
                assert red.delete("/v1/trajectories/deleted/1").json() == {"branches": ["main"]}
        assert red.delete("/v1/trajectories/deleted/2").status_code == 404


def test_an_urgent_create_ends_a_less_important_one(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsec.api.service.NOTICE", 0.5)
    with cluster.client(cluster.blue) as blue, cluster.client(cluster.admin) as admin:
        full = [create(blue, memory=60_000)["id"] for _ in range(2)]
        urgent = {"params": {"priority": 5}, "json": SPEC | {"memory": 60_000}}
        assert blue.post("/v1/sandboxes", **urgent).status_code == 403, "not everybody may end others"
        made = admin.post("/v1/sandboxes", **urgent)
        assert made.status_code == 201, made.text
        rows = [cluster.store.get("blue", id) for id in full]
        assert sorted(row.state for row in rows if row) == ["live", "preempted"]
        lost = next(row.id for row in rows if row and row.state == "preempted")
        # a server believes for two seconds what it knows of a sandbox
        gone = until(lambda: (answer := blue.get(f"/v1/sandboxes/{lost}")).status_code != 200 and answer)
        assert gone.status_code == 410 and gone.json()["error"] == "Preempted"
        kill_all(blue)
        kill_all(admin)


def test_stock_is_handed_out_however_slowly_a_host_starts(cluster: Cluster) -> None:
    """A claim starts nothing: with no start left for minutes it is answered at once, and a cold create is not."""
    spec = Spec.from_dict(SPEC | {"memory": 96})
    for node in cluster.nodes:
        cluster.run(node.edge.pool.resize(spec, 3))
        node.member.rate = StartRate(time.monotonic(), 1e-6, low=1e-6, high=1e-6)
    try:
        with cluster.client(cluster.blue) as blue:
            made = [create(blue, memory=96) for _ in range(4)]
            assert {execute(blue, each["id"], "echo a")["result"]["stdout"] for each in made} == {"a\n"}
            cold = blue.post("/v1/sandboxes", params={"wait": 1}, json=SPEC | {"memory": 97})
            assert cold.json()["error"] == "Capacity"
            kill_all(blue)
    finally:
        for node in cluster.nodes:
            node.member.rate = StartRate(time.monotonic())
            cluster.run(node.edge.pool.resize(spec, 0))


def test_prometheus_reads_it(cluster: Cluster) -> None:
    with cluster.client(cluster.red) as red, cluster.client(cluster.admin) as admin:
        create(red)
        assert red.get("/metrics").status_code == 403
        text = admin.get("/metrics").text
        kill_all(red)
    for line in text.splitlines():
        if not line.startswith("#"):
            assert float(line.rpartition(" ")[2]) >= 0
    assert 'dsec_sandboxes{project="red",state="live"} 1' in text
    assert 'dsec_edge_up{edge="one"} 1' in text and 'dsec_start_seconds{quantile="0.99"}' in text


def test_health_and_page(cluster: Cluster) -> None:
    with cluster.client("") as nobody:
        assert nobody.get("/health").json() == {"ok": True}
        page = nobody.get("/")
        assert page.status_code == 200 and "DSec" in page.text
        assert not re.search(
            r"(src|href)=|url\(|@import|//[a-z.]+/", page.text.replace("http://www.w3.org/2000/svg", "")
        )
