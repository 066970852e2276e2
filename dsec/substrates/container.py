"""Containers: bubblewrap over a capped overlay, the guest agent as PID 1, and nothing of the host's root inside.

The order of the walls is in dsec/launch/launch.c; what bubblewrap adds is in `_walls`. As root every sandbox has
ids and a cgroup of its own; as an ordinary user id 0 inside is that user, and limits are rlimits and the size
of the memory disk (Capabilities.limits says which). Layers, top first: ours (the agent), a snapshot's, the image's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsec.errors import Capacity, DsecError, ImageError, InvalidRequest, NotFound, SandboxFailed, SubstrateUnavailable
from dsec.guest import build
from dsec.guest.protocol import Agent
from dsec.launch import cgroups, seccomp, selftest
from dsec.launch.cgroups import Cgroup, started
from dsec.substrates import oci
from dsec.substrates.base import Probe
from dsec.substrates.begun import Begun
from dsec.substrates.oci import Runtime
from dsec.substrates.process import Watched
from dsec.types import Capabilities, Spec, Stats

MASKED = (
    "acpi asound kcore keys key-users kmsg latency_stats sched_debug scsi sysrq-trigger timer_list timer_stats".split()
)
AGENT_CAPS = "CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_KILL CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER".split()
"""The agent's, over the sandbox's own ids only; the commands it runs have none."""
HOST_FILES = [
    f"/etc/{name}" for name in "alternatives ld.so.cache ld.so.conf ld.so.conf.d localtime mime.types".split()
] + ["/etc/ssl/certs/ca-certificates.crt"]
"""What the host image takes from the host's /etc: what its programs need to start, nothing that says whose it is."""
STANDBY = 2  # launchers that wait for sandboxes to come
STANDBY_SECONDS = 0.05  # after a start until the next one is begun
OVERHEAD = 2  # processes: bubblewrap's monitor and the agent
BWRAP = Runtime(memory=0, pids=OVERHEAD)
FIX = "apt-get install bubblewrap"


class ContainerSubstrate:
    """See base.Substrate."""

    name = "container"
    runtimes = tuple(oci.RUNTIMES)

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = os.geteuid() == 0
        self.groups = cgroups.detect()
        limits = "cgroup" if self.groups.limits else "rlimit"
        self.capabilities = Capabilities(isolation=2, fork_memory=False, network=True, limits=limits)
        self._prepared: asyncio.Future[None] | None = None
        self._standby: deque[Begun] = deque()
        self._given: dict[Path, Begun] = {}
        self._next: asyncio.TimerHandle | None = None
        self._trusted: dict[str, asyncio.Future[None]] = {}
        self._reaper: asyncio.Task[None] | None = None
        self._dead: asyncio.Queue[tuple[Cgroup | None, Path]] = asyncio.Queue()

    def isolation(self, spec: Spec) -> int:
        """What the runtime that `spec` names gives."""
        return oci.RUNTIMES[spec.runtime].isolation if spec.runtime in oci.RUNTIMES else self.capabilities.isolation

    async def probe(self, runtime: str = "") -> Probe:
        import tempfile

        start = time.perf_counter()
        running: Container | None = None
        (self.home / "tmp").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.home / "tmp") as scratch:
            try:
                async with asyncio.timeout(60):
                    running = await self.create("probe", Spec(runtime=runtime), Path(scratch))
                    done = await running.agent.exec(["true"], lambda kind, data: None, env=ENV).done
                seconds = time.perf_counter() - start
                how = f"{runtime or 'bubblewrap'}, limits by {self.capabilities.limits}"
                return Probe(done.code == 0, how, "", seconds)
            except SubstrateUnavailable as error:
                return Probe(False, error.reason, error.fix)
            except (DsecError, TimeoutError) as error:
                return Probe(False, str(error) or "no answer within 60 s", FIX)
            finally:
                if running is not None:
                    await running.destroy()

    async def create(self, id: str, spec: Spec, folder: Path, snapshot: Path | None = None) -> Container:
        begun = self._given.pop(folder, None)
        try:
            await self._prepare()
            runtime = await self._runtime(spec.runtime, id)
            lowers, mounts = await self._image(spec.image)
            if snapshot is not None:  # hard links: the snapshot may be deleted while we live
                await asyncio.to_thread(_run, ["cp", "-al", snapshot / "layers", folder / "layers"])
                lowers[1:1] = sorted((folder / "layers").iterdir(), reverse=True)
            disk = ["--size", str(spec.disk << 20)]
            if self.root and spec.disk * 2 > spec.memory:
                disk = ["--loop", str(await asyncio.to_thread(_disk_image, folder, spec.disk))]
            if begun is None:
                begun = Begun.begin(folder, self.groups, self.root)
            begun.limit(spec.cpu, spec.memory + runtime.memory, int(spec.pids) + runtime.pids)
            arguments = self._arguments(folder, spec, disk, lowers, mounts)
            pid = begun.go(arguments) or self._spawn(begun, arguments)
            agent = await Agent.connect(folder / "agent.sock", serial=runtime.serial)
        except BaseException:
            if begun is not None:
                if begun.group is not None:
                    begun.group.kill()
                self._bury(begun.group, folder)
            raise
        finally:
            if begun is not None:
                begun.close()
            self._soon()
        return Container(self, pid, begun.group, folder, agent, self._capabilities(runtime))

    def standby(self) -> Path | None:
        """A folder whose launcher waits already, for a sandbox that is named like it; None when there is none."""
        if not self._standby:
            return None
        begun = self._standby.popleft()
        self._given[begun.folder] = begun
        return begun.folder

    def _soon(self) -> None:
        """Begins the next ones, not at once: what has just started wants the processor more."""
        if self._next is None and self._prepared is not None and (self.home / "sandboxes").is_dir():
            self._next = asyncio.get_running_loop().call_later(STANDBY_SECONDS, self._begin)

    def _begin(self) -> None:
        self._next = None
        if len(self._standby) >= STANDBY:
            return
        folder = self.home / "sandboxes" / f"sb-{secrets.token_hex(8)}"
        with contextlib.suppress(OSError, Capacity):  # a host without room: the next create says so
            folder.mkdir(mode=0o700)
            begun = Begun.begin(folder, self.groups, self.root)
            self._standby.append(begun)  # good for a start even if its launcher cannot be started now
            usual = Spec()
            begun.limit(usual.cpu, usual.memory + BWRAP.memory, usual.pids + BWRAP.pids)
            (folder / "disk").mkdir(mode=0o700)
            (folder / "state.jsonl").touch(0o600)  # to make a file takes longer than to write it, see Box.save
            control, end = socket.socketpair()
            with end:
                try:
                    begun.wait(self._spawn(begun, ["--wait", "5"], end.fileno()), control)
                except BaseException:
                    control.close()
                    raise
            self._soon()

    def _capabilities(self, runtime: Runtime) -> Capabilities:
        return replace(self.capabilities, isolation=runtime.isolation, tty=runtime.tty)

    async def _runtime(self, name: str, id: str) -> Runtime:
        """What is behind `name`, tested from inside before its first use."""
        if not name:
            return BWRAP
        if name not in oci.RUNTIMES:
            raise InvalidRequest(f"a container's runtime is one of {', '.join(oci.RUNTIMES)}, not {name!r}")
        oci.find(name, self.root)
        if id != "selftest":
            if name not in self._trusted:
                self._trusted[name] = asyncio.ensure_future(self.self_test(name))
            try:
                await asyncio.shield(self._trusted[name])
            except BaseException:
                if self._trusted[name].done():
                    del self._trusted[name]
                raise
        return oci.RUNTIMES[name]

    def _arguments(self, folder: Path, spec: Spec, disk: list[str], lowers: list[Path], mounts: list[str]) -> list[str]:
        """The launcher's, but for those that are known before there is a specification."""
        argv = ["--root", str(folder), *disk]
        if not self.groups.limits:
            argv += ["--pids", str(int(spec.pids) + OVERHEAD), "--memory", str(spec.memory << 20)]
        argv += [part for lower in lowers for part in ("--lower", str(lower))]
        if spec.runtime:
            masked = [f"/proc/{name}" for name in MASKED if Path("/proc", name).exists()]
            return argv + oci.command(spec.runtime, self.root, folder, mounts, masked, AGENT_CAPS)
        argv += ["--", self.bwrap, *self._walls, "--dev-bind", "/sys", "/", *self._inside, *mounts]
        return [*argv, "--", "/.dsec/agent", "--listen", "3", "--drop", "--wall", "/"]

    def _spawn(self, begun: Begun, arguments: list[str], control: int = -1) -> int:
        """A launcher; with `control`, one that waits for the rest of its arguments there."""
        log = os.open(begun.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        wait = [(os.POSIX_SPAWN_DUP2, control, 5)] if control >= 0 else []
        try:
            return os.posix_spawn(
                self.launcher,
                [str(self.launcher), "--keep", str(4 + len(wait)), *begun.first, *arguments],
                {"HOME": "/root"},
                file_actions=[
                    *wait,
                    (os.POSIX_SPAWN_DUP2, begun.listener.fileno(), 3),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 4, str(self.filter), os.O_RDONLY, 0),
                ],
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
            )
        except BlockingIOError as error:
            raise Capacity(f"this host can start no more processes: {error}") from None
        finally:
            os.close(log)

    async def adopt(self, id: str, spec: Spec, folder: Path, state: dict[str, Any]) -> Container:
        pid = int(state["pid"])
        if started(pid) != state["started"]:
            raise NotFound(f"sandbox {id} ended while no Edge was running")
        await self._prepare()
        group = Cgroup(self.groups, state["slot"]) if state["slot"] is not None else None
        if group is not None:
            group.own(folder)
        runtime = oci.RUNTIMES[spec.runtime] if spec.runtime else BWRAP
        agent = await Agent.connect(folder / "agent.sock", serial=runtime.serial)
        return Container(self, pid, group, folder, agent, self._capabilities(runtime))

    async def self_test(self, runtime: str = "") -> None:
        """Raises SubstrateUnavailable unless every canary write from inside fails; see launch/selftest.py."""
        folder = self.home / "tmp" / f"selftest-{secrets.token_hex(6)}"
        await asyncio.to_thread(folder.mkdir, 0o700, True, True)
        with selftest.canary(self.home) as canary:
            running = await self.create("selftest", Spec(runtime=runtime), folder)
            try:
                await selftest.check(running.agent, canary, self.root, running.capabilities.isolation > 2)
            finally:
                await running.destroy()

    async def close(self) -> None:
        """Waits until what was destroyed is cleaned away, and what was begun for nobody."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        for begun in [*self._standby, *self._given.values()]:
            begun.close()
            self._bury(begun.group, begun.folder)
        self._standby.clear()
        self._given.clear()
        if self._reaper is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._dead.join(), 5)
            self._reaper.cancel()

    # preparation, once

    async def _prepare(self) -> None:
        if self._prepared is None:
            self._prepared = asyncio.ensure_future(asyncio.to_thread(self._setup))
        try:
            await asyncio.shield(self._prepared)
        except BaseException:
            if self._prepared.done():
                self._prepared = None  # what was missing may be installed by the next try
            raise

    def _setup(self) -> None:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SubstrateUnavailable("there is no bubblewrap", reason="bwrap is not installed", fix=FIX)
        self.bwrap = bwrap
        cache = self.home / "cache"
        cache.mkdir(exist_ok=True, mode=0o755)
        self.launcher = build.program(Path(__file__).parents[1] / "launch" / "launch.c", cache)
        agent = build.agent(self.home)
        self.filter = cache / "seccomp.bpf"
        _replace(self.filter, seccomp.program())
        relay = build.program(Path(build.__file__).with_name("relay.c"), cache)
        parts = f"{agent.name} {relay.name} {self.filter.read_bytes()!r}"
        self.layer = cache / f"layer-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
        if not self.layer.exists():
            scratch = self.layer.with_suffix(f".{os.getpid()}")
            for name in ("proc", "dev", ".dsec"):
                (scratch / name).mkdir(parents=True)
            shutil.copy(agent, scratch / ".dsec" / "agent")
            shutil.copy(relay, scratch / ".dsec" / "relay")
            shutil.copy(self.filter, scratch / ".dsec" / "seccomp.bpf")
            _settle(scratch, self.layer)
        self._host_layer, self._host_mounts = _host_image(cache)
        self._walls = "--unshare-pid --unshare-cgroup-try --as-pid-1 --seccomp 4 --cap-drop ALL".split()
        self._walls += [part for cap in AGENT_CAPS for part in ("--cap-add", cap)]
        self._inside = ["--proc", "/proc"] if self.root else ["--dev", "/dev", "--proc", "/proc"]
        # Every mount costs a start some time. Ids inside are never the host's root, so what only root may open needs
        # none; /proc/sys does, since owners of namespaces may write parts of it.
        self._inside += ["--ro-bind", "/proc/sys", "/proc/sys"]
        for path in (Path("/proc", name) for name in MASKED):
            if path.exists() and path.stat().st_mode & 0o006:
                hide = ["--size", "4096", "--tmpfs"] if path.is_dir() else ["--ro-bind", "/dev/null"]
                self._inside += [*hide, str(path)]
        if not self.groups.limits:
            self._inside += ["--size", str(64 << 20), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]

    async def _image(self, image: str) -> tuple[list[Path], list[str]]:
        """The lowers, top first, and what is bound over them."""
        if image == "host":
            return [self.layer, self._host_layer], self._host_mounts
        if image.startswith("/"):
            if not Path(image).is_dir():
                raise ImageError(f"no root folder at {image}")
            return [self.layer, Path(image)], []
        try:
            from dsec.images import lowers
        except ImportError:
            raise ImageError(f'no image {image!r}: "host" or the absolute path of a root folder') from None
        return [self.layer, *await lowers(self.home, image)], []

    # the reaper: cleaning is off every request's path

    def _bury(self, group: Cgroup | None, folder: Path) -> None:
        self._dead.put_nowait((group, folder))
        if self._reaper is None or self._reaper.done():
            self._reaper = asyncio.ensure_future(self._reap())

    async def _reap(self) -> None:
        while True:
            batch = [await self._dead.get()]
            while not self._dead.empty():
                batch.append(self._dead.get_nowait())
            left = await asyncio.to_thread(_clean, batch)
            if left:
                await asyncio.sleep(0.02)
            for item in left:
                self._dead.put_nowait(item)
            for _ in batch:
                self._dead.task_done()


ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


class Container:
    """See base.Running."""

    def __init__(
        self,
        of: ContainerSubstrate,
        pid: int,
        group: Cgroup | None,
        folder: Path,
        agent: Agent,
        capabilities: Capabilities,
    ) -> None:
        self.agent, self.capabilities = agent, capabilities
        self.users = of.root
        """Whether commands may run as others than root: only root of the host can map more than one id."""
        self._of, self._pid, self._group, self._folder = of, pid, group, folder
        self._process = Watched(pid, self._reason)
        self._started, self._end = self._process.started, self._process.end
        self._gone = False

    def _reason(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self._folder / "log").read_text(errors="replace")[-500:].strip().splitlines()
            if lines:
                return lines[-1]
        stats = self._group.stats() if self._group is not None else Stats()
        return "out of memory" if stats.oom_kills else "its first process ended"

    def state(self) -> dict[str, Any]:
        slot = self._group.slot if self._group is not None else None
        return {"pid": self._pid, "started": self._started, "slot": slot}

    async def died(self) -> str:
        return await asyncio.shield(self._end)

    async def freeze(self) -> None:
        if self._group is not None and self._group.folders:
            await asyncio.to_thread(self._group.freeze, True)
        else:
            self.agent.signal_all(signal.SIGSTOP)
            await self.agent.ping()

    async def thaw(self) -> None:
        if self._group is not None and self._group.folders:
            await asyncio.to_thread(self._group.freeze, False)
        else:
            self.agent.signal_all(signal.SIGCONT)

    async def stats(self) -> Stats:
        stats = self._group.stats() if self._group is not None else Stats()
        used = 0
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._disk())
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        return Stats(**{**stats.as_dict(), "disk_bytes": used})

    def _disk(self) -> Path:
        """The writable layer's file system, seen through the monitor's mount namespace."""
        return Path(f"/proc/{self._pid}/root{self._folder}/disk")

    async def snapshot(self, target: Path) -> None:
        if self._end.done():
            raise SandboxFailed(f"it is dead: {self._end.result()}")
        await self.freeze()
        try:
            await asyncio.to_thread(self._copy, target)
        finally:
            await self.thaw()

    def _copy(self, target: Path) -> None:
        scratch = target.with_name(target.name + ".part")
        shutil.rmtree(scratch, ignore_errors=True)
        layers = scratch / "layers"
        layers.mkdir(parents=True)
        older = sorted((self._folder / "layers").iterdir()) if (self._folder / "layers").exists() else []
        for layer in older:
            _run(["cp", "-al", layer, layers / layer.name])
        newest = layers / f"{len(older):04}"
        _run(["cp", "-a", "--reflink=auto", self._disk() / "upper", newest])
        if self._group is not None and self._of.root:
            _shift(newest, -self._group.base)
        _settle(scratch, target)

    async def destroy(self) -> None:
        if self._gone:
            return
        self._gone = True
        self.agent.close()
        if not self._end.done():
            if self._group is not None and self._group.folders:
                self._group.kill()
            else:
                _kill_inside(self._pid)
            if not await self._process.ended(5):
                self._process.signal(signal.SIGKILL)
        self._of._bury(self._group, self._folder)


def _kill_inside(monitor: int) -> None:
    """Kills PID 1 of the sandbox behind bubblewrap's monitor, and with it everything in its namespace.

    Stopped first: one that is just about to start that PID 1 does not get that far (fork fails on a pending signal).
    """
    try:
        os.kill(monitor, signal.SIGSTOP)
        children = [int(pid) for pid in Path(f"/proc/{monitor}/task/{monitor}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for pid in [*children, monitor]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _clean(batch: list[tuple[Cgroup | None, Path]]) -> list[tuple[Cgroup | None, Path]]:
    left: list[tuple[Cgroup | None, Path]] = []
    for group, folder in batch:
        if group is not None and not group.free(folder):
            left.append((group, folder))
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return left


def _run(command: list[Any]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SandboxFailed(f"{command[0]} failed: {done.stderr.strip()[:300]}")


def _replace(path: Path, data: bytes) -> None:
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def _settle(scratch: Path, target: Path) -> None:
    """Makes a finished folder visible under its name; somebody else may have been quicker with the same one."""
    try:
        os.rename(scratch, target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(scratch)


def _shift(folder: Path, by: int) -> None:
    """Moves every owner in a tree by a constant, links not followed (the tree is ours and frozen)."""
    for root, dirs, files in os.walk(folder):
        for name in [*dirs, *files]:
            path = os.path.join(root, name)
            entry = os.lstat(path)
            os.lchown(path, max(entry.st_uid + by, 0), max(entry.st_gid + by, 0))
            if not os.path.islink(path):
                os.chmod(path, entry.st_mode & 0o7777)  # chown clears setuid, which belongs to the image
    os.chown(folder, 0, 0)


def _disk_image(folder: Path, size: int) -> Path:
    """A sparse ext4 image of `size` MiB; no journal, since a sandbox's disk does not outlive a crash of the host."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(size << 20)
    _run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", image])
    return image


def _host_image(cache: Path) -> tuple[Path, list[str]]:
    """A root folder around the host's own /usr: the folder, and bubblewrap's arguments that bind the rest."""
    mounts = ["--ro-bind", "/usr", "/usr"]
    links = {}
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            links[name] = os.readlink(path)
        elif path.is_dir():
            mounts += ["--ro-bind", str(path), str(path)]
    stamps = [os.stat(path).st_mtime_ns for path in HOST_FILES if os.path.exists(path)]
    layer = cache / f"host-{hashlib.sha256(repr((stamps, mounts, links)).encode()).hexdigest()[:16]}"
    if not layer.exists():
        scratch = cache / f"host.{os.getpid()}"
        for name in "usr etc root home/user tmp var/tmp var/log var/lib var/cache run opt srv mnt dev proc".split():
            (scratch / name).mkdir(parents=True)
        for name in ("tmp", "var/tmp"):
            (scratch / name).chmod(0o1777)
        for name, link in links.items():
            (scratch / name).symlink_to(link)
        for line in mounts[1::3]:
            (scratch / line.lstrip("/")).mkdir(exist_ok=True, parents=True)
        texts = {
            "passwd": "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
            "group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
            "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
            "hostname": "sandbox\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
            "resolv.conf": "",
        }
        for name, text in texts.items():
            (scratch / "etc" / name).write_text(text)
        for source in map(Path, HOST_FILES):
            target = scratch / source.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            elif source.exists():
                shutil.copy(source, target)
        if os.geteuid() == 0:
            os.chown(scratch / "home/user", 1000, 1000)
        _settle(scratch, layer)
    return layer, mounts
