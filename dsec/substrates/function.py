"""Functions: a pool of warm Python workers that answer calls. What each variant stops, and what it does not:

    resident     level 0  one long-lived process; a call sees what earlier calls left. For code you wrote.
    forked       level 1  a child per call with rlimits and no_new_privs: crashes, leaks and loops end with the call.
    namespaced   level 1  forked, without a network, in namespaces of its own, under the system call filter. It reads
                          host files that everybody may read: a container is the next step, not this.

A call names a function that a module in DSEC_FUNCTIONS (of the Edge: "mine,theirs.more") has put through `register`, as
"module:name", or is code that defines main(). Arguments and values are JSON both ways; nothing of a worker is
unpickled. `image` chooses the variant ("host" means forked).
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
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
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


@dataclass(eq=False, slots=True)
class Call:
    """It waits for a worker, and then for that one's reply; ``timeout``: seconds that the worker may take."""

    request: bytes
    timeout: float | None
    reply: asyncio.Future[tuple[str, Any]]
    worker: Worker | None = None


class Functions:
    """See base.Running: WORKERS processes of one variant, started when first called."""

    def __init__(self, variant: str, spec: Spec) -> None:
        self.variant, self.spec = variant, spec
        self.agent = NoAgent()
        self.capabilities = Capabilities(
            isolation=LEVELS[variant], persistent_fs=False, network=False, snapshots=False, tty=False, limits="rlimit"
        )
        self._waiting: deque[Call] = deque()
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[str] = self._loop.create_future()

    async def call(self, function: str, args: list[Any], kwargs: dict[str, Any], timeout: float | None) -> Any:
        """The function's value. Raises SandboxFailed with its traceback, Timeout, NotFound for an unknown name."""
        if self._end.done():
            raise SandboxFailed("it is dead")
        call = Call(json.dumps([function, args, kwargs]).encode(), timeout, self._loop.create_future())
        self._waiting.append(call)
        self._serve()
        try:
            kind, value = await call.reply
        except asyncio.CancelledError:
            if call.worker is not None and call.worker.call is call:
                call.worker.kill()
            raise
        if kind == "value":
            return value
        if kind == "unknown":
            raise NotFound(str(value))
        raise SandboxFailed(str(value), kind=kind)

    def _serve(self) -> None:
        """Gives the calls that wait to workers that have none."""
        while self._waiting and (self._idle or len(self._all) < WORKERS):
            call = self._waiting.popleft()
            if call.reply.done():
                continue  # its caller has gone
            if not self._idle:
                try:
                    self._idle.append(Worker(self.variant, self.spec, self._back))
                except OSError as error:
                    call.reply.set_exception(SandboxFailed(f"no worker can be started: {error}"))
                    continue
                self._all.add(self._idle[-1])
            self._idle.pop().begin(call)

    def _back(self, worker: Worker) -> None:
        """It has answered, or it has died."""
        if not worker.dead:
            self._idle.append(worker)
        else:
            self._all.discard(worker)
            if worker in self._idle:
                self._idle.remove(worker)
        self._serve()

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
        return Stats(pids=len(self._all))

    async def snapshot(self, target: Path) -> None:
        raise InvalidRequest("a function sandbox keeps nothing that a snapshot could hold")

    async def destroy(self) -> None:
        if not self._end.done():
            self._end.set_result("destroyed")
        for call in self._waiting:
            if not call.reply.done():
                call.reply.set_exception(SandboxFailed("it is dead"))
        self._waiting.clear()
        for worker in list(self._all):
            worker.kill(SandboxFailed("it is dead"))


class Worker:
    """A process of this interpreter on one end of a socket pair, with one call at a time. Callbacks alone move it: a
    worker that has answered has its next call before anybody has looked at the answer."""

    def __init__(self, variant: str, spec: Spec, back: Callable[[Worker], None]) -> None:
        """``back``: called when it has answered and may be given the next call, and when it has died."""
        self.dead = False
        self.call: Call | None = None
        self._back = back
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._data = bytearray()
        self._sent = True
        self._deadline = inf
        self._clock: asyncio.TimerHandle | None = None
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

    def begin(self, call: Call) -> None:
        self.call, call.worker = call, self
        self._deadline = inf if call.timeout is None else self._loop.time() + call.timeout
        if self._clock is None or self._deadline < self._clock.when():
            self._watch()
        self._send(memoryview(_HEAD.pack(len(call.request)) + call.request))

    def _watch(self) -> None:
        """Ends a call that takes too long. The clock goes on from call to call (one of its own for each would be a
        tenth of the Edge's time for it) and, when it was set too early, is set anew."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        if self.call is None:
            return
        if self._loop.time() >= self._deadline:
            self.kill(Timeout(f"the call ran past its {self.call.timeout:g} s and was killed"))
        elif self._deadline < inf:
            self._clock = self._loop.call_at(self._deadline, self._watch)

    def _send(self, data: memoryview) -> None:
        """What the socket takes of it now, and the rest when it takes more."""
        try:
            data = data[self._socket.send(data) :]
        except BlockingIOError:
            pass
        except OSError:
            return  # it is dying, as `_read` will see
        self._sent = not data
        if data:
            self._loop.add_writer(self._socket, self._more, data)

    def _more(self, data: memoryview) -> None:
        self._loop.remove_writer(self._socket)
        self._send(data)

    def _read(self) -> None:
        """Takes what has come; a whole reply ends the call. A worker that dies or lies answers ("died", why)."""
        try:
            piece = self._socket.recv(1 << 16)
        except OSError:
            piece = b""
        self._data += piece
        size = 4 + (_HEAD.unpack_from(self._data)[0] if len(self._data) >= 4 else 0)
        asked = self.call is not None and self._sent
        if piece and asked and len(self._data) < size <= 4 + MAX_REPLY:
            return
        try:
            if not piece:
                raise ValueError(f"it ended {'in the middle of its' if self._data else 'without a'} reply")
            if not asked or len(self._data) > size:
                raise ValueError("it spoke unasked")
            if size > 4 + MAX_REPLY:
                raise ValueError(f"a reply of {size - 4} bytes")
            kind, value = json.loads(self._data[4:].decode())
        except (ValueError, TypeError, RecursionError) as error:
            self.kill(SandboxFailed(f"the worker died: {error}", kind="died"))
            return
        self._data.clear()
        self._finish((str(kind), value))
        self._back(self)

    def _finish(self, answer: tuple[str, Any] | DsecError) -> None:
        """Ends the call."""
        call, self.call = self.call, None
        if call is None or call.reply.done():
            return
        if isinstance(answer, DsecError):
            call.reply.set_exception(answer)
        else:
            call.reply.set_result(answer)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._pid, number)

    def kill(self, why: DsecError | None = None) -> None:
        """Ends it, and with `why` the call that it has."""
        if self.dead:
            return
        self.dead = True
        if self._clock is not None:
            self._clock.cancel()
        if self._group is not None:
            self._group.kill()  # whatever it has started, wherever that went
        self.signal(signal.SIGKILL)
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        if self._group is not None:
            self._bury(self._group)
        self._finish(why or SandboxFailed("it was killed"))
        self._back(self)

    def _bury(self, group: cgroups.Cgroup) -> None:
        if not group.remove():  # the last of them is still dying
            with suppress(RuntimeError):
                asyncio.get_running_loop().call_later(0.05, self._bury, group)


# Inside a worker


def _receive(connection: socket.socket) -> bytes | None:
    """The next request: there is never more than one, so most come with one system call."""
    data = connection.recv(1 << 14)
    if len(data) < 4:
        return None
    rest = 4 + _HEAD.unpack_from(data)[0] - len(data)
    return data[4:] + (connection.recv(rest, socket.MSG_WAITALL) if rest else b"")


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
        name, args, kwargs = json.loads(request.decode())
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
