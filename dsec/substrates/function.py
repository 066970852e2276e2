"""Functions: a pool of warm Python workers that answer calls. What each variant stops, and what it does not:

    resident     level 0  one long-lived process; a call sees what earlier calls left. For code you wrote.
    forked       level 1  a child per call with rlimits and no_new_privs: crashes, leaks and loops end with the call.
    namespaced   level 1  forked, without a network, in namespaces of its own, under the system call filter. It reads
                          host files that everybody may read: a container is the next step, not this.

A call names a function that a module in DSEC_FUNCTIONS (of the Edge: "mine,theirs.more") has put through `register`, as
"module:name", or is code that defines main(). Arguments and values
are JSON both ways; nothing of a worker is unpickled. `image` chooses the variant ("host" means forked).
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from dsec.errors import DsecError, InvalidRequest, NotFound, SandboxFailed, Timeout
from dsec.guest.protocol import Agent
from dsec.launch import cgroups
from dsec.substrates.base import Probe
from dsec.types import Capabilities, Spec, Stats

Variant = Literal["resident", "forked", "namespaced"]
LEVELS: dict[str, int] = {"resident": 0, "forked": 1, "namespaced": 1}
WORKERS = 2
MAX_REPLY = 16 << 20
NOBODY = 65534
_HEAD = struct.Struct("<I")
_REGISTERED: dict[str, Callable[..., Any]] = {}


def register(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function as callable in function sandboxes, by "module:name". A decorator."""
    _REGISTERED[f"{function.__module__}:{function.__qualname__}"] = function
    return function


class FunctionSubstrate:
    """See base.Substrate. Workers belong to the Edge: they end with it, and so do calls in flight."""

    name = "function"
    capabilities = Capabilities(
        isolation=0, persistent_fs=False, network=False, snapshots=False, tty=False, limits="rlimit"
    )

    def __init__(self, home: Path) -> None:
        self.home = home

    def isolation(self, spec: Spec) -> int:
        """What the variant that `spec` names gives."""
        return LEVELS.get("forked" if spec.image == "host" else spec.image, 0)

    async def probe(self) -> Probe:
        start = time.perf_counter()
        running = await self.create("probe", Spec(substrate="function"), self.home)
        try:
            good = await running.call("def main(x): return x + 1", [41], {}, 30) == 42
        except DsecError as error:
            return Probe(False, str(error))
        finally:
            await running.destroy()
        return Probe(good, "forked workers of this interpreter", "", time.perf_counter() - start)

    async def create(self, id: str, spec: Spec, folder: Path, snapshot: Path | None = None) -> Functions:
        if spec.runtime:
            raise InvalidRequest(
                f'a function has no runtime (its image is its variant): runtime="", not {spec.runtime!r}'
            )
        variant = "forked" if spec.image == "host" else spec.image
        if variant not in LEVELS:
            raise InvalidRequest(f"a function's image is its variant, {', '.join(LEVELS)}, not {spec.image!r}")
        return Functions(variant, spec)

    async def adopt(self, id: str, spec: Spec, folder: Path, state: dict[str, Any]) -> Functions:
        return await self.create(id, spec, folder)

    async def close(self) -> None:
        return None


class NoAgent(Agent):
    """In place of an agent: a function sandbox has no commands and no files."""

    def send(self, kind: bytes, id: int, payload: bytes = b"") -> None:
        raise InvalidRequest("a function sandbox runs functions (call), not commands; use a container for those")

    async def journal(self) -> list[Any]:
        return []


class Functions:
    """See base.Running: WORKERS processes of one variant, started when first called."""

    def __init__(self, variant: str, spec: Spec) -> None:
        self.variant, self.spec = variant, spec
        self.agent = NoAgent()
        self.capabilities = Capabilities(
            isolation=LEVELS[variant], persistent_fs=False, network=False, snapshots=False, tty=False, limits="rlimit"
        )
        self._idle: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()
        self._count = 0
        self._all: set[Worker] = set()
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def call(self, function: str, args: list[Any], kwargs: dict[str, Any], timeout: float | None) -> Any:
        """The function's value. Raises SandboxFailed with its traceback, Timeout, NotFound for an unknown name."""
        if self._end.done():
            raise SandboxFailed("it is dead")
        request = json.dumps([function, args, kwargs]).encode()
        worker = await self._take()
        try:
            async with asyncio.timeout(timeout):
                kind, value = await worker.ask(request)
        except TimeoutError:
            worker.kill()
            raise Timeout(f"the call ran past its {timeout:g} s and was killed") from None
        except asyncio.CancelledError:
            worker.kill()
            raise
        finally:
            self._give(worker)
        if kind == "value":
            return value
        if kind == "unknown":
            raise NotFound(str(value))
        raise SandboxFailed(str(value), kind=kind)

    async def _take(self) -> Worker:
        while True:
            if self._idle.empty() and self._count < WORKERS:
                self._count += 1
                worker = Worker(self.variant, self.spec)
                self._all.add(worker)
                return worker
            worker = await self._idle.get()
            if not worker.dead:
                return worker
            self._forget(worker)

    def _give(self, worker: Worker) -> None:
        self._idle.put_nowait(worker)

    def _forget(self, worker: Worker) -> None:
        self._count -= 1
        self._all.discard(worker)

    def state(self) -> dict[str, Any]:
        return {}

    async def died(self) -> str:
        return await asyncio.shield(self._end)

    async def freeze(self) -> None:
        for worker in self._all:
            worker.signal(signal.SIGSTOP)

    async def thaw(self) -> None:
        for worker in self._all:
            worker.signal(signal.SIGCONT)

    async def stats(self) -> Stats:
        return Stats(pids=len([worker for worker in self._all if not worker.dead]))

    async def snapshot(self, target: Path) -> None:
        raise InvalidRequest("a function sandbox keeps nothing that a snapshot could hold")

    async def destroy(self) -> None:
        for worker in self._all:
            worker.kill()
        self._all.clear()
        if not self._end.done():
            self._end.set_result("destroyed")


class Worker:
    """A process of this interpreter on one end of a socket pair. Our end is watched as long as it lives: to begin and
    end that with each call is a fifth of the Edge's time for it."""

    def __init__(self, variant: str, spec: Spec) -> None:
        self.dead = False
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._data = bytearray()
        self._reply: asyncio.Future[None] | None = None
        self._over = False
        os.set_inheritable(theirs.fileno(), True)
        modules = {name.partition(":")[0] for name in _REGISTERED} | set(
            os.environ.get("DSEC_FUNCTIONS", "").split(",")
        )
        names = json.dumps(sorted(modules - {"__main__", ""}))
        where = cgroups.detect()
        self._group = cgroups.Cgroup.claim(where) if where.limits else None
        joins: list[str] = []
        if self._group is not None:
            self._group.limit(spec.cpu, spec.memory, int(spec.pids) + 2)
            joins = [str(path) for path in self._group.joins]
        given = {"variant": variant, "memory": spec.memory, "env": spec.env, "joins": joins}
        settings = json.dumps(given)
        argv = [sys.executable, "-c", "from dsec.substrates.function import work; work()", str(theirs.fileno())]
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        self._pid = os.posix_spawn(
            sys.executable, [*argv, settings, names], {"PYTHONPATH": path, "PATH": os.defpath}, setpgroup=0
        )
        theirs.close()
        self._loop.add_reader(self._socket, self._read)

    def _read(self) -> None:
        """Takes what has come. Once the reply is whole, or cannot be any more, whoever asked goes on."""
        try:
            piece = self._socket.recv(1 << 16)
        except OSError:
            piece = b""
        self._data += piece
        self._over = not piece or max(self._size(), len(self._data)) > 4 + MAX_REPLY
        if self._over:
            self._loop.remove_reader(self._socket)
        if (self._over or len(self._data) >= self._size()) and self._reply is not None and not self._reply.done():
            self._reply.set_result(None)

    def _size(self) -> int:
        """Bytes of the reply that has begun to come, with its head."""
        return 4 + (_HEAD.unpack_from(self._data)[0] if len(self._data) >= 4 else 0)

    async def ask(self, request: bytes) -> tuple[str, Any]:
        """Sends one request and reads its answer. A worker that dies or lies answers ("died", why)."""
        try:
            if self._data or self._over:
                raise ValueError("it ended" if self._over else "it spoke unasked")
            self._reply = self._loop.create_future()
            await self._loop.sock_sendall(self._socket, _HEAD.pack(len(request)) + request)
            await self._reply
            if not self._data:
                raise ValueError("it ended without a reply")
            if self._size() > 4 + MAX_REPLY:
                raise ValueError(f"a reply of {self._size() - 4} bytes")
            if self._size() > len(self._data):
                raise ValueError("it ended in the middle of its reply")
            kind, value = json.loads(self._data[4:])
            self._data.clear()
        except (OSError, ValueError) as error:
            self.kill()
            return "died", f"the worker died: {error}"
        return str(kind), value

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._pid, number)

    def kill(self) -> None:
        if not self.dead:
            self.dead = True
            if self._group is not None:
                self._group.kill()  # whatever it has started, wherever that went
            self.signal(signal.SIGKILL)
            self._loop.remove_reader(self._socket)
            self._socket.close()
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            if self._group is not None:
                self._bury(self._group)

    def _bury(self, group: cgroups.Cgroup) -> None:
        if not group.remove():  # the last of them is still dying
            with suppress(RuntimeError):
                asyncio.get_running_loop().call_later(0.05, self._bury, group)


# Inside a worker


def _receive(connection: socket.socket) -> bytes | None:
    head = connection.recv(4, socket.MSG_WAITALL)
    if len(head) < 4:
        return None
    return connection.recv(_HEAD.unpack(head)[0], socket.MSG_WAITALL)


def work() -> None:
    """The worker's main loop: one request, one reply. Started with the descriptor, the settings and module names."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    for name in json.loads(sys.argv[3]):
        __import__(name)
    os.environ.update(settings["env"])
    for path in settings["joins"]:
        Path(path).write_text("0")
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    variant = settings["variant"]
    if variant != "resident":
        limit(settings, variant == "namespaced")
    _die_with_parent()  # after the change of user, which clears it
    functions: dict[str, Any] = {}
    while (request := _receive(connection)) is not None:
        if variant == "resident":
            reply = _answer(request, functions)
        else:
            reply = _in_child(request)
        connection.sendall(_HEAD.pack(len(reply)) + reply)


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def limit(settings: dict[str, Any], namespaced: bool) -> None:
    """The worker, and so every child of it, gives up what no call needs: root, privileges, memory, the network."""
    import ctypes

    from dsec.launch import seccomp  # now: an ordinary user may not reach our files

    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), what)

    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if namespaced:
        uid, gid = os.geteuid(), os.getegid()
        must(libc.prctl(4, 1, 0, 0, 0), "dumpable")  # else our own /proc entries belong to root
        must(libc.unshare(0x10000000 | 0x00020000 | 0x40000000 | 0x08000000 | 0x04000000), "namespaces")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(text)
    data = settings["memory"] << 20
    for which, value in ((resource.RLIMIT_DATA, data), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 64 << 20)):
        resource.setrlimit(which, (value, value))
    must(libc.prctl(38, 1, 0, 0, 0), "no_new_privs")
    if namespaced:
        must(libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24)), "capabilities")
        code = seccomp.program()
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
        must(libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0), "seccomp")


def _answer(request: bytes, functions: dict[str, Any]) -> bytes:
    try:
        name, args, kwargs = json.loads(request)
        call = functions.get(name) or _find(name)
        functions[name] = call
        return json.dumps(["value", call(*args, **kwargs)]).encode()
    except KeyError as error:
        if error.args and str(error.args[0]).startswith("no function"):
            return json.dumps(["unknown", error.args[0]]).encode()
        return _trace()
    except BaseException:  # the user's code may raise anything, and whatever it is goes back to the user
        return _trace()


def _trace() -> bytes:
    import traceback

    return json.dumps(["error", traceback.format_exc()[-4000:]]).encode()


def _find(name: str) -> Any:
    if "\n" in name or "def " in name:
        scope: dict[str, Any] = {"__name__": "dsec_call"}
        exec(compile(name, "<call>", "exec"), scope)
        if not callable(scope.get("main")):
            raise KeyError("no function main() in the code")
        return scope["main"]
    if name not in _REGISTERED:
        raise KeyError(f"no function {name!r} is registered; there are {', '.join(_REGISTERED) or 'none'}")
    return _REGISTERED[name]


def _in_child(request: bytes) -> bytes:
    """Runs one call in a fork; its processes are gone when this returns."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        _die_with_parent()
        os.close(out)
        reply = _answer(request, {})
        with os.fdopen(into, "wb") as pipe:
            pipe.write(_HEAD.pack(len(reply)) + reply)
        os._exit(0)
    os.close(into)
    data = b""  # by its length, not to the end of the pipe, which a grandchild may hold open
    while len(data) < 4 or len(data) < 4 + min(_HEAD.unpack_from(data)[0], MAX_REPLY):
        part = os.read(out, 1 << 20)
        if not part:
            break
        data += part
    os.close(out)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    reply = data[4:]
    try:
        if len(reply) > MAX_REPLY or len(json.loads(reply)) != 2:
            raise ValueError
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        why = f"reply over {MAX_REPLY} bytes" if len(reply) > MAX_REPLY else f"it ended with {code} and no value"
        return json.dumps(["died", why]).encode()
    return reply
