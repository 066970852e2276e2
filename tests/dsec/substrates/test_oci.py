"""The container's own tests and rules again, with runc, crun and gVisor's runsc in bubblewrap's place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec.edge.box import Box
from dsec.errors import InvalidRequest, NotFound, SandboxFailed, SubstrateUnavailable, Timeout
from dsec.launch import cgroups
from dsec.substrates import oci
from tests.dsec.conftest import Host, until
from tests.dsec.launch.test_rules import (  # noqa: F401 - collected here as well
    test_commands_have_no_privilege_and_no_way_to_one,
    test_no_descriptor_of_the_host_leaks,
    test_nothing_inside_is_root_outside,
    test_number_one_core_pattern_cannot_be_written,
    test_the_filter_refuses_each_call_of_its_list,
)
from tests.dsec.network.test_network import (  # noqa: F401
    SOCKS,
    listed,
    other,
    python,
    test_only_what_is_listed_is_reached,
    test_ports_are_forwarded_where_the_policy_allows,
)
from tests.dsec.substrates.test_container import (  # noqa: F401
    test_a_sandbox_ends_on_time_with_all_it_started,
    test_commands_and_files,
    test_fork_bombs_stop_at_the_limit,
    test_images_from_a_folder,
    test_links_inside_never_reach_the_hosts_files,
    test_memory_bombs_end_inside,
    test_no_network,
    test_output_floods_are_cut_in_the_middle,
    test_pause_snapshot_and_fork,
    test_streaming_background_and_terminal,
    test_the_disk_is_capped_in_bytes_and_files,
    test_timeouts_kill_and_say_so,
)

OTHERWISE = {
    "test_commands_have_no_privilege_and_no_way_to_one": "its /proc/self/status has no ambient set",
    "test_nothing_inside_is_root_outside": "its processes are not the host's; the runtime's own are looked at below",
    "test_a_sandbox_ends_on_time_with_all_it_started": "its processes are not processes of the host",
    "test_fork_bombs_stop_at_the_limit": "a bomb takes its kernel along, see below",
    "test_memory_bombs_end_inside": "a bomb takes its kernel along, see below",
    "test_no_network": "it says 'no route' for 'unreachable', see below",
    "test_only_what_is_listed_is_reached": "it says 'no route' for 'unreachable', see below",
    "test_pause_snapshot_and_fork": "gVisor of 2022 refuses the flags of coreutils 9's stat, see below",
    "test_streaming_background_and_terminal": "gVisor of 2022 has no terminals here, which it declares",
    "test_the_disk_is_capped_in_bytes_and_files": "its /tmp is its own memory; and stat",
}
"""Tests that gVisor meets in another way than a shared kernel does."""


class Through:
    """A host whose sandboxes are made by one runtime."""

    def __init__(self, host: Host, runtime: str) -> None:
        self._host, self.runtime = host, runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def create(self, **spec: Any) -> Any:
        return self._host.create(runtime=self.runtime, **spec)


@pytest.fixture(params=oci.RUNTIMES)
def host(request: pytest.FixtureRequest, root_host: Host) -> Through:
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param}: apt-get install {request.param}")
    if request.param == "runsc" and request.function.__name__ in OTHERWISE:
        pytest.skip(OTHERWISE[request.function.__name__])
    return Through(root_host, request.param)


@pytest.fixture
def box(host: Through) -> Iterator[Any]:
    with host.create(timeout=120) as made:
        yield made


def test_its_level_is_its_own(host: Through, box: Any) -> None:
    level = oci.RUNTIMES[host.runtime].isolation
    assert box.get_info().isolation == level == box.get_info().capabilities["isolation"]
    kernel = box.commands.run("cat /proc/version").stdout
    assert (kernel == Path("/proc/version").read_text()) == (level == 2), "level 3 is another kernel"
    with pytest.raises(SubstrateUnavailable, match=f"level {level} here"):
        host.create(isolation_min=level + 1)


@pytest.fixture
def gvisor(root_host: Host) -> Through:
    if shutil.which("runsc") is None:
        pytest.skip("no runsc: apt-get install runsc")
    return Through(root_host, "runsc")


def test_gvisor_has_no_way_out_but_the_listed_one(gvisor: Through, listed: Any, other: Any) -> None:  # noqa: F811
    with gvisor.create(network=[f"127.0.0.1:{listed.port}"], timeout=60) as box:
        came = other.came
        for address in ("8.8.8.8/53", "169.254.169.254/80", f"127.0.0.1/{other.port}"):
            script = f"exec 3<>/dev/tcp/{address} && echo THROUGH"
            assert "THROUGH" not in box.commands.run(["/bin/bash", "-c", script], check=False, timeout=20).stdout
        assert python(box, SOCKS, "127.0.0.1", listed.port).startswith("code 0\n/socks")
        assert python(box, SOCKS, "127.0.0.1", other.port) == "code 2\n"
        assert other.came == came


@pytest.mark.parametrize(
    "bomb", ["for i in $(seq 600); do sleep 60 & done; wait", "head -c 900000000 /dev/zero | tail"]
)
def test_bombs_in_gvisor_end_with_it(gvisor: Through, bomb: str) -> None:
    with gvisor.create(memory=64, pids=40, disk=16, timeout=60) as box:
        group = cgroups.Cgroup(cgroups.detect(), _slot(gvisor, box))
        try:
            result = box.commands.run(bomb, check=False, timeout=5)
            assert result.exit_code or result.stderr
        except (SandboxFailed, Timeout, InvalidRequest, NotFound):
            pass
        stats = group.stats()
        assert stats.pids <= 40 + oci.RUNTIMES["runsc"].pids
        # One MiB of room: the kernel lets a task that is being ended, and charges it may not refuse, pass by pages.
        assert stats.memory_peak_bytes <= (64 + oci.RUNTIMES["runsc"].memory + 1) << 20
        box.kill()
        until(lambda: not group.pids())


def test_snapshots_of_gvisor_have_what_was_written(gvisor: Through) -> None:
    with gvisor.create(timeout=60) as box:
        box.commands.run("echo one > /root/file; rm -rf /srv")
        forks = box.fork(2)
        assert [fork.files.read("file") for fork in forks] == ["one\n"] * 2 and not forks[0].files.exists("/srv")
        assert forks[0].get_info().isolation == 3 and not forks[0].get_info().capabilities["tty"]
        box.pause()
        box.resume()
        assert box.commands.run("cat file").stdout == "one\n"
        for fork in forks:
            fork.kill()


def _slot(host: Through, box: Any) -> int:
    return int(Box.saved(host.home / "sandboxes" / box.id)["running"]["slot"])


def test_it_outlives_its_edge(make_host: Callable[[str], Host]) -> None:
    host = make_host("root")
    names = [name for name in oci.RUNTIMES if shutil.which(name)]
    boxes = {name: host.create(runtime=name, timeout=120) for name in names}
    left = {name: box.commands.run("sleep 1; echo done", background=True) for name, box in boxes.items()}
    host.kill()
    host.start()
    for name, box in boxes.items():
        again = host.sync("connect", box.id)
        assert again.commands.connect(left[name].id).wait().stdout == "done\n", name
        assert again.commands.run("echo on").stdout == "on\n"
        again.kill()


def test_the_runtime_itself_is_root_of_nothing(root_host: Host) -> None:
    for name in oci.RUNTIMES:
        if shutil.which(name) is None:
            continue
        with root_host.create(runtime=name) as box:
            box.commands.run("true")
            group = cgroups.Cgroup(cgroups.detect(), _slot(Through(root_host, name), box))
            assert len(group.pids()) >= 2
            for pid in group.pids():
                status = Path(f"/proc/{pid}/status").read_text()
                ids = {int(id) for id in status.split("Uid:")[1].split("\n")[0].split()}
                assert all(group.base <= id < group.base + cgroups.RANGE for id in ids), (name, pid, ids)


def test_what_is_not_there_is_refused_with_the_remedy(root_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="runc, crun, runsc"):
        root_host.create(runtime="dockerd")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SubstrateUnavailable, match="not installed") as caught:
        oci.find("crun", True)
    assert caught.value.fields["fix"] == "apt-get install crun"
    with pytest.raises(SubstrateUnavailable, match="runs as root"):
        oci.find("runsc", False)
