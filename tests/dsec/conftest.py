"""An Edge per way of running it: as root, and as an ordinary user (which root becomes for the purpose)."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest

import dsec
from dsec import sandbox
from dsec.guest import build
from dsec.launch import cgroups

ORDINARY = 54321 + int("0" + os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"))
"""A user id that owns nothing: each of pytest's workers has its own, since the kernel counts by user."""
IS_ROOT = os.geteuid() == 0


PATIENCE = 60.0
"""Seconds that a test waits for what must happen: far more than a busy machine needs, so no figure of speed."""


def until(seen: Callable[[], Any]) -> Any:
    """Waits until something is true, and returns it."""
    end = time.monotonic() + PATIENCE
    while not (value := seen()):
        assert time.monotonic() < end, "never happened"
        time.sleep(0.02)
    return value


async def soon(seen: Callable[[], Any]) -> Any:
    """Waits on an event loop until something is true, and returns it; `seen` may be a coroutine function."""
    end = time.monotonic() + PATIENCE
    while True:
        value = seen()
        if value := (await value if inspect.isawaitable(value) else value):
            return value
        assert time.monotonic() < end, "never happened"
        await asyncio.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether a process is there and not only waited for by its parent. A killed one may be, for a while."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def reachable(folder: Path) -> None:
    """Lets every user get to a folder of pytest's, as sandboxes and servers that run as others must."""
    for each in (folder, *folder.parents):
        if each == Path(tempfile.gettempdir()):
            break
        each.chmod(0o755)


def need_containers() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    if not any(map(shutil.which, ("cc", "gcc"))):
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it still clears up


class Host:
    """A state folder with an Edge process of its own."""

    def __init__(self, who: str, folder: Path, programs: Path) -> None:
        self.who, self.home = who, folder / "home"
        self.uid = ORDINARY if who == "user" and IS_ROOT else os.geteuid()
        self.python, self.path = sys.executable, Path(dsec.__file__).parents[1]
        if self.uid != os.geteuid():  # our interpreter and sources may lie where only root can go
            self.python, self.path = "/usr/bin/python3", folder / "src"
            if not Path(self.python).exists():
                pytest.skip("an ordinary user needs an interpreter it can reach: apt-get install python3")
            shutil.copytree(Path(dsec.__file__).parent, self.path / "dsec")
            packages = Path(sysconfig.get_path("platlib"))
            for found in packages.glob("google_crc32c*"):  # what the log needs beside the standard library
                shutil.copytree(found, self.path / found.name)
        self.home.mkdir(mode=0o711)
        os.chown(self.home, self.uid, self.uid if self.uid != os.geteuid() else -1)
        shutil.copytree(programs / "cache", self.home / "cache")
        for path in (self.home / "cache", *(self.home / "cache").iterdir()):
            os.chown(path, self.uid, -1)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts its Edge and waits until it answers."""
        drop: dict[str, Any] = {}
        if self.uid != os.geteuid():
            drop = {"user": self.uid, "group": self.uid, "extra_groups": []}
        environment = {**os.environ, "PYTHONPATH": str(self.path), "HOME": str(self.home), "DSEC_HOME": str(self.home)}
        self.process = subprocess.Popen(
            [self.python, "-m", "dsec.edge.server", str(self.home)], env=environment, cwd="/", start_new_session=True,
            stderr=(self.home / "edge.log").open("ab"), **drop,
        )  # fmt: skip
        end = time.monotonic() + PATIENCE
        while not (self.home / "edge.sock").exists():
            assert time.monotonic() < end and self.process.poll() is None, (self.home / "edge.log").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9 of the Edge; its sandboxes know nothing of it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        (self.home / "edge.sock").unlink(missing_ok=True)

    def transport(self) -> Any:
        """A connection for the loop that runs."""
        return dsec.client.EmbeddedTransport(self.home)  # type: ignore[attr-defined]

    def create(self, **spec: Any) -> Any:
        """A synchronous sandbox on this host."""
        return self.sync("create", **spec)

    def sync(self, name: str, *args: Any, **keywords: Any) -> Any:
        """A class method of Sandbox, on this host."""
        before = os.environ.get("DSEC_HOME")
        os.environ["DSEC_HOME"] = str(self.home)
        try:
            return getattr(sandbox.Sandbox, name)(*args, **keywords)
        finally:
            if before is None:
                del os.environ["DSEC_HOME"]
            else:
                os.environ["DSEC_HOME"] = before

    def stop(self) -> None:
        """Ends its sandboxes and its Edge."""
        assert self.process is not None
        if self.process.poll() is None:

            async def over() -> None:
                transport = self.transport()
                await transport.call("shutdown", {"destroy": True})
                await transport.close()

            asyncio.run(over())
            self.process.wait(PATIENCE)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder in which the C programs are built."""
    folder = tmp_path_factory.mktemp("programs")
    build.agent(folder)
    build.program(Path(build.__file__).parents[1] / "launch" / "launch.c", folder / "cache")
    return folder


@pytest.fixture(scope="session")
def graves() -> None:
    """Ends and removes what the hosts and machines of killed test runs have left on this machine."""
    dead = {folder for folder in Path("/tmp").glob("dsec-*") if (owner := words(folder / "tests")) and not alive(owner)}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            named = [*(entry / "cmdline").read_bytes().split(b"\0"), os.fsencode(os.readlink(entry / "fd/1"))]
            if any(folder in Path(os.fsdecode(name)).parents for name in named for folder in dead):
                os.kill(int(entry.name), signal.SIGKILL)
    for path in next(iter(cgroups.detect().v1.values()), cgroups.detect().unified or Path("/nowhere")).glob("[0-9]*"):
        with contextlib.suppress(OSError):  # an Edge's own folder is nobody else's to judge, one of pytest's is
            *owner, of = os.getxattr(path, cgroups._OWNER).decode().split(" ", 2)
            if not alive(owner) and Path(of).is_relative_to(Path(tempfile.gettempdir(), f"pytest-of-{getuser()}")):
                cgroups.abandon(Path(of))
    for folder in dead:
        for each in (folder / "home/sandboxes").glob("*"):
            cgroups.abandon(each)
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{folder}/"):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def words(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def alive(owner: list[str]) -> bool:
    """Whether the process of that number and start is there."""
    return cgroups.started(int(owner[0])) == int(owner[1])


@pytest.fixture(scope="session")
def make_host(request: pytest.FixtureRequest, graves: None) -> Iterator[Callable[[str], Host]]:
    """make_host("root" | "user"): another host, ended with the session."""
    hosts: list[Host] = []
    folders: list[str] = []

    def make(who: str) -> Host:
        need_containers()
        if who == "root" and not IS_ROOT:
            pytest.skip("needs root: sudo script/test tests/dsec")
        folders.append(tempfile.mkdtemp(prefix="dsec-", dir="/tmp"))
        os.chmod(folders[-1], 0o755)
        Path(folders[-1], "tests").write_text(f"{os.getpid()} {cgroups.started(os.getpid())}")
        hosts.append(Host(who, Path(folders[-1]), request.getfixturevalue("programs")))
        return hosts[-1]

    yield make
    for host in hosts:
        host.stop()
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def hosts(make_host: Callable[[str], Host]) -> dict[str, Host]:
    return {}


@pytest.fixture(params=["root", "user"])
def host(request: pytest.FixtureRequest, hosts: dict[str, Host], make_host: Callable[[str], Host]) -> Host:
    """Both ways of running an Edge, shared by all tests."""
    if request.param not in hosts:
        hosts[request.param] = make_host(request.param)
    return hosts[request.param]


@pytest.fixture
def root_host(hosts: dict[str, Host], make_host: Callable[[str], Host]) -> Host:
    if "root" not in hosts:
        hosts["root"] = make_host("root")
    return hosts["root"]


@pytest.fixture
def box(host: Host) -> Iterator[Any]:
    """A container on each."""
    with host.create(timeout=120) as made:
        yield made
