"""The Kubernetes manifest as data, the Ray launcher against a real local Ray, and `dsec cluster`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsec.cluster.cli import app
from dsec.cluster.ray import nodes
from dsec.cluster.store import open_store

MANIFEST = Path(__file__).parents[3] / "dsec" / "cluster" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}


def test_the_manifest_is_whole(objects: dict[str, dict[str, Any]]) -> None:
    assert set(objects) == {"DaemonSet", "Deployment", "Service", "NetworkPolicy"}
    for kind, each in objects.items():
        assert each["metadata"]["namespace"] == "dsec" and each["apiVersion"] and each["metadata"]["name"], kind
    for kind in ("DaemonSet", "Deployment"):
        spec = objects[kind]["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False, "a sandbox that got out must not find the cluster's key"
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        named = {port["name"] for port in container["ports"]}
        probe = container["readinessProbe"]
        assert (probe.get("tcpSocket") or probe["httpGet"])["port"] in named
        for variable in container["env"]:
            assert len({"value", "valueFrom"} & set(variable)) == 1
    api = objects["Deployment"]["spec"]["template"]
    assert objects["Service"]["spec"]["selector"] == api["metadata"]["labels"]
    security = api["spec"]["containers"][0]["securityContext"]
    assert (
        security["runAsNonRoot"]
        and not security["allowPrivilegeEscalation"]
        and security["capabilities"] == {"drop": ["ALL"]}
    )
    policy = objects["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == objects["DaemonSet"]["spec"]["selector"]["matchLabels"]
    assert policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"] == api["metadata"]["labels"]


def test_the_manifests_commands_parse(objects: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    from dsec.api.cli import app as api
    from dsec.cluster import node

    edge = objects["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]["command"][2]
    source = Path(node.__file__).read_text()
    for word in edge.split():
        assert not word.startswith("--") or f'"{word}"' in source, word
    command = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]["command"][2]
    known = CliRunner().invoke(api, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for word in command.split():
        assert not word.startswith("--") or word in known, word


def test_ray_nodes_with_slots_are_chosen_or_else_all() -> None:
    def node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"NodeID": name * 8, "NodeManagerHostname": name, "Alive": alive, "Resources": resources}

    assert nodes([node("a"), node("b", alive=False)]) == [("a" * 8, "a", 0)]
    assert nodes([node("a"), node("b", dsec_slots=40.0)]) == [("b" * 8, "b", 40)]


@pytest.mark.slow
def test_one_edge_per_node_of_a_real_ray(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is missing: pip install 'dsv4[ray]'")
    from dsec.cluster.ray import NAMESPACE, down, up

    tmp_path.chmod(0o711)
    ray.init(num_cpus=1, resources={"dsec_slots": 30}, namespace=NAMESPACE, include_dashboard=False)
    try:
        store = f"sqlite:{tmp_path}/cluster.db"
        first = up(store, home=str(tmp_path / "home"))
        assert len(first) == 1
        opened, end = open_store(store), time.monotonic() + 120
        while not (edges := [edge for edge in opened.edges() if edge.up]):
            assert time.monotonic() < end, (tmp_path / "home" / "node.log").read_text()
            time.sleep(0.2)
        assert edges[0].capacity.slots == 30
        assert up(store, home=str(tmp_path / "home")) == first, "asked again, nothing new is started"
        assert down() == 1
        assert not ray.util.list_named_actors(all_namespaces=True)
    finally:
        ray.shutdown()


def test_simulate_prints_a_table_and_fails_on_violations(monkeypatch: pytest.MonkeyPatch) -> None:
    line = [
        "simulate",
        "--live",
        "40",
        "--hosts",
        "5",
        "--minutes",
        "3",
        "--life",
        "60",
        "--faults",
        "hosts,lossy",
        "--json",
    ]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["violations"] == {}
    assert "ETA" in result.stderr
    assert CliRunner().invoke(app, ["simulate", "--faults", "locusts"]).exit_code == 2
    from dsec.cluster.store import Store

    monkeypatch.setattr(Store, "_release", lambda self, run, projects: None)
    assert CliRunner().invoke(app, line).exit_code == 1
