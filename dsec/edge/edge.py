"""Owns this host's sandboxes. Every operation of the API is a method named op_*; server.py and tests call `call`.

Order with a trajectory (spec 3.6): BEGIN durable, run, END durable, reply. Without one the operation just runs. What
the Edge must not forget lies in each sandbox's folder (state.jsonl) and in its agent, so a new Edge takes over where a
killed one stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from dsec.edge.box import Box, recorded
from dsec.edge.commands import CommandOperations
from dsec.edge.files import FileOperations, sync_tree
from dsec.edge.pool import Pool
from dsec.edge.trajectories import TrajectoryOperations
from dsec.errors import (
    Capacity,
    DsecError,
    InvalidRequest,
    NotFound,
    SubstrateUnavailable,
)
from dsec.launch.cgroups import abandon, detect, sweep
from dsec.network.gateway import NetworkOperations
from dsec.substrates import base
from dsec.types import Record, SandboxInfo, Spec, page

MAX_LIVE = 2000
KEPT_KEYS = 3600.0
"""Seconds for which an idempotency key stands for its sandbox after this has ended."""
Answer = dict[str, Any]


class Edge(TrajectoryOperations, CommandOperations, FileOperations, NetworkOperations):
    """See the module. `start` adopts what an earlier Edge left; `stop` ends this process's part, not the sandboxes."""

    def __init__(self, home: Path, host: str = "", max_live: int | None = None) -> None:
        self.home, self.host = home, host or socket.gethostname()
        self.max_live = max_live or int(os.environ.get("DSEC_MAX_LIVE", MAX_LIVE))
        self.boxes: dict[str, Box] = {}
        self.snapshots = home / "snapshots"
        self.pool = Pool(self)
        self.log: Any = None
        self.tended: Any = None
        self._substrates: dict[str, base.Substrate] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keys: dict[str, tuple[float, asyncio.Future[SandboxInfo]]] = {}
        self._tested: dict[str, asyncio.Future[None]] = {}

    # life of the Edge

    async def start(self) -> None:
        for folder in (self.home / "sandboxes", self.snapshots):  # 0700: a snapshot may hold setuid files of id 0
            folder.mkdir(exist_ok=True, mode=0o700)
        for scratch in self.snapshots.glob(".*"):  # a capture that was killed
            await asyncio.to_thread(shutil.rmtree, scratch, True)
        if (self.home / "log").exists():
            self.tended = self._task(self.tend_log())
        await asyncio.gather(*(self._adopt(folder) for folder in sorted((self.home / "sandboxes").iterdir())))
        await asyncio.to_thread(lambda: sweep(detect()))

    async def stop(self, destroy: bool = False) -> None:
        """Ends the Edge; sandboxes and mounted images live on for the next one unless `destroy`."""
        await self.pool.close()
        if destroy:
            await asyncio.gather(*(self._end(box, "the Edge was shut down") for box in list(self.boxes.values())))
        for box in self.boxes.values():
            self._release(box)
            if box.running is not None:
                box.running.agent.close()
        for task in list(self._tasks):
            task.cancel()
        for substrate in self._substrates.values():
            await substrate.close()
        if destroy and (self.home / "images").exists():
            from dsec.images.layers import Images  # here: an Edge without images starts without them

            await asyncio.to_thread(Images(self.home).unmount_all)
        if self.log is not None:
            self.log.close()  # here: SQLite wants the thread that opened it

    def substrate(self, name: str) -> base.Substrate:
        if name not in self._substrates:
            self._substrates[name] = base.load(name, self.home)
        return self._substrates[name]

    async def _adopt(self, folder: Path) -> None:
        try:
            state = Box.saved(folder)
            spec = Spec.from_dict(state["spec"])
        except (OSError, ValueError, KeyError, DsecError):
            await asyncio.to_thread(abandon, folder)  # never finished being made
            return
        box = Box(folder.name, spec, folder, self.host, state["isolation"], state["capabilities"], state["created"])
        box.deadline, box.state, box.left = state["deadline"], state["state"], state["left"]
        box.source, box.image_digest = state["source"], state.get("image_digest", "")
        try:
            if state["running"] is None:
                raise NotFound("it was being made when the Edge ended")
            box.running = await self.substrate(spec.substrate).adopt(box.id, spec, folder, state["running"])
            if self.pool.stocked(spec):
                raise NotFound("it was in stock, and nobody owns it")
            if box.state == "running":
                await asyncio.wait_for(box.recover(), 20)
        except (DsecError, TimeoutError) as error:
            box.state, box.reason = "dead", str(error)
            if box.running is not None:
                await box.running.destroy()
            else:
                await asyncio.to_thread(abandon, folder)
            return
        self.boxes[box.id] = box
        self._watch(box)

    async def _self_test(self, substrate: base.Substrate) -> None:
        """Once per Edge and substrate, before it serves: canary writes from inside must fail."""
        test = getattr(substrate, "self_test", None)
        if test is None:
            return
        if substrate.name not in self._tested:
            self._tested[substrate.name] = asyncio.ensure_future(test())
        try:
            await asyncio.shield(self._tested[substrate.name])
        except DsecError:
            del self._tested[substrate.name]
            raise

    # calls

    async def call(self, op: str, args: Mapping[str, Any], data: bytes = b"") -> tuple[Answer, bytes]:
        """Runs one operation; raises DsecError. Bytes go beside the JSON in both directions."""
        method = getattr(self, "op_" + op.replace(".", "_"), None)
        if method is None or op.startswith("stream."):
            raise NotFound(f"no operation {op!r}")
        try:
            answer = await (
                method(**args, data=data) if op in ("files.write", "commands.send_stdin") else method(**args)
            )
        except TypeError as error:
            if "argument" in str(error) and "op_" in str(error):
                raise InvalidRequest(f"{op}: {str(error).partition(') ')[2] or error}") from None
            raise
        if isinstance(answer, bytes):
            return {}, answer
        return (answer.as_dict() if isinstance(answer, Record) else answer or {}), b""

    async def stream(self, op: str, args: Mapping[str, Any]) -> AsyncIterator[tuple[str, bytes]]:
        """("stdout" | "stderr", bytes) as they come, then ("result", JSON)."""
        if op == "commands.run":
            async for event in self._run(**args):
                yield event
        elif op == "commands.connect":
            async for event in self._follow(self._box(args["id"]).command(int(args["command"]))):
                yield event
        else:
            raise NotFound(f"no stream {op!r}")

    def _box(self, id: str) -> Box:
        box = self.boxes.get(id)
        if box is None:
            raise NotFound(f"no sandbox {id!r} on {self.host}")
        return box

    # making and ending sandboxes

    async def op_create(self, spec: dict[str, Any] | Spec, pooled: bool = True) -> SandboxInfo:
        spec = spec if isinstance(spec, Spec) else Spec.from_dict(spec)
        if spec.idempotency_key is not None:  # the same key asks for the same sandbox, also while it is being made
            self._forget_keys()
            _, known = self._keys.get(spec.idempotency_key, (0.0, None))
            if known is None or (known.done() and (known.cancelled() or known.exception())):
                if box := self._claimed(spec, pooled):
                    known = asyncio.get_running_loop().create_future()
                    known.set_result(box.info())
                else:
                    known = asyncio.ensure_future(self._create(spec, False))
                self._keys[spec.idempotency_key] = time.monotonic(), known
            return await asyncio.shield(known)
        return await self._create(spec, pooled)

    def _forget_keys(self) -> None:
        """Those given KEPT_KEYS seconds ago whose sandbox is gone; they lie in the order in which they were given."""
        for key, (given, known) in list(self._keys.items()):
            if time.monotonic() - given < KEPT_KEYS:
                break
            if known.done() and (known.cancelled() or known.exception() or known.result().id not in self.boxes):
                del self._keys[key]

    async def _create(self, spec: Spec, pooled: bool) -> SandboxInfo:
        if spec.trajectory is not None:
            return await self._resume(spec)
        return (self._claimed(spec, pooled) or await self.make(spec)).info()

    def _claimed(self, spec: Spec, pooled: bool) -> Box | None:
        """One from stock. A trajectory needs its log first."""
        return self.pool.claim(spec) if pooled and spec.trajectory is None else None

    async def make(self, spec: Spec, snapshot: str = "") -> Box:
        """A new sandbox, with the files of a snapshot if one is named."""
        if spec.image.startswith("snapshot:"):
            snapshot = spec.image.partition(":")[2]
        source = self._snapshot(snapshot) if snapshot else None
        if source is not None:
            spec = spec.but(image=json.loads((source / "meta.json").read_text())["image"])
        if len(self.boxes) >= self.max_live:
            raise Capacity(f"{len(self.boxes)} sandboxes are live on {self.host}, its limit is {self.max_live}")
        substrate = self.substrate(spec.substrate)
        levels = getattr(substrate, "isolation", None)  # a substrate of several variants
        isolation = levels(spec) if levels else substrate.capabilities.isolation
        if isolation < spec.isolation_min:
            text = f"{spec.substrate} gives isolation level {isolation} here, {spec.isolation_min} was asked for"
            raise SubstrateUnavailable(text, reason=text, fix="another substrate, or a lower isolation_min")
        self.refuse_network(spec, substrate)
        await self._self_test(substrate)
        folder = substrate.standby() if hasattr(substrate, "standby") else None
        if folder is None:
            folder = self.home / "sandboxes" / f"sb-{secrets.token_hex(8)}"
            folder.mkdir(mode=0o700)
        id = folder.name
        box = Box(id, spec, folder, self.host, isolation, substrate.capabilities.as_dict(), source=snapshot)
        self.boxes[id] = box
        try:
            box.running = await substrate.create(id, spec, folder, source)
        except BaseException:
            del self.boxes[id]
            await asyncio.to_thread(shutil.rmtree, folder, True)
            raise
        box.capabilities = box.running.capabilities.as_dict()
        box.state, box.deadline = "running", time.time() + spec.timeout
        box.save()
        self._watch(box)
        return box

    def _watch(self, box: Box) -> None:
        """Sets the deadline's clock, and notices when the sandbox dies or its agent lies."""
        self._arm(box)
        self.network(box)
        box.watcher = self._task(self._until_dead(box))

    def _task(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _arm(self, box: Box) -> None:
        if box.timer is not None:
            box.timer.cancel()
        if box.state == "running":
            delay = max(box.deadline - time.time(), 0)
            box.timer = asyncio.get_running_loop().call_later(
                delay, lambda: self._task(self._end(box, "its time was over"))
            )

    async def _until_dead(self, box: Box) -> None:
        assert box.running is not None
        ended = asyncio.ensure_future(box.running.died())
        await asyncio.wait([ended, box.running.agent.failed], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([ended], timeout=1.0)  # the process's end says more than the connection's
        reason = ended.result() if ended.done() else box.running.agent.failed.result()
        ended.cancel()
        await self._end(box, reason, "failed")

    async def _end(self, box: Box, reason: str, state: str = "dead") -> None:
        if box.state in ("dead", "failed"):
            return
        box.state, box.reason = state, reason
        if box.timer is not None:
            box.timer.cancel()
        if box.watcher is not None and box.watcher is not asyncio.current_task():
            box.watcher.cancel()
        if box.running is not None:
            await box.running.destroy()
        self._release(box)
        # results of commands stay readable for a while, the rest is gone
        asyncio.get_running_loop().call_later(60, lambda: self.boxes.pop(box.id, None))
        if not box.commands:
            self.boxes.pop(box.id, None)

    def _release(self, box: Box) -> None:
        if box.gateway is not None:
            box.gateway.close()
        if box.saver is not None and box.saver is not asyncio.current_task():
            box.saver.cancel()
        if box.trajectory is not None:
            box.trajectory.release()
            box.trajectory = None

    async def op_connect(self, id: str, timeout: float | None = None) -> SandboxInfo:
        """The sandbox, resumed if it was paused; its deadline moves only when `timeout` is given."""
        box = self._box(id)
        if box.state == "paused":
            await self.op_resume(id)
        box.alive()
        if timeout is not None:
            await self.op_set_timeout(id, timeout)
        return box.info()

    async def op_info(self, id: str) -> SandboxInfo:
        return self._box(id).info()

    async def op_list(
        self, metadata: dict[str, str] | None = None, state: list[str] | None = None, limit: int | None = None,
        next_token: str | None = None,
    ) -> Answer:  # fmt: skip
        wanted = (metadata or {}).items()
        found = [box.info() for box in self.boxes.values() if wanted <= box.spec.metadata.items()]
        return page([info for info in found if info.state in (state or ("running", "paused"))], limit, next_token)

    async def op_kill(self, id: str) -> Answer:
        box = self.boxes.get(id)
        if box is None or box.state in ("dead", "failed"):
            return {"killed": False}
        await self._end(box, "killed")
        return {"killed": True}

    async def op_set_timeout(self, id: str, timeout: float) -> SandboxInfo:
        box = self._box(id)
        if not timeout >= 0:
            raise InvalidRequest(f"timeout must not be negative: {timeout!r}")
        box.deadline, box.left = time.time() + timeout, timeout
        self._arm(box)
        box.save()
        return box.info()

    async def op_pause(self, id: str) -> SandboxInfo:
        """Stops its processes and its clock."""
        box = self._box(id)
        await box.alive().freeze()
        box.state, box.left = "paused", max(box.deadline - time.time(), 0)
        self._arm(box)
        box.save()
        return box.info()

    async def op_resume(self, id: str) -> SandboxInfo:
        box = self._box(id)
        if box.state == "paused" and box.running is not None:
            await box.running.thaw()
            box.state, box.deadline = "running", time.time() + box.left
            if not box.commands:
                await box.recover()
            self._arm(box)
            box.save()
        box.alive()
        return box.info()

    async def op_metrics(self, id: str) -> Record:
        box = self._box(id)
        if box.running is None:
            box.alive()
        assert box.running is not None
        return await box.running.stats()

    def _snapshot(self, id: str) -> Path:
        folder = self.snapshots / id
        if "/" in id or id.startswith(".") or not folder.is_dir():
            raise NotFound(f"no snapshot {id!r} on {self.host}")
        return folder

    async def op_snapshot(self, id: str) -> Answer:
        return {"snapshot": await self.capture(self._box(id), f"snap-{secrets.token_hex(8)}")}

    async def capture(self, box: Box, name: str, **meta: Any) -> str:
        """The box's files as they are, durable under `name`: whole or not at all."""
        from dsec.trajectory.failpoint import crash  # here: an Edge without trajectories starts without the log
        from dsec.trajectory.segment import sync_folder

        scratch = self.snapshots / f".{name}"
        try:
            if box.spec.substrate != "function":  # which has no agent, and says itself that it has no files
                await box.alive().agent.ping(30)  # a create answers before the sandbox is up
            await box.alive().snapshot(scratch)
            meta |= {"image": box.spec.image, "substrate": box.spec.substrate}
            (scratch / "meta.json").write_text(json.dumps(meta))
            crash("edge.half_snapshot")
            await asyncio.to_thread(sync_tree, scratch)
            os.rename(scratch, self.snapshots / name)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, scratch, True)
            raise
        await asyncio.to_thread(sync_folder, self.snapshots)
        crash("edge.captured")
        return name

    async def op_delete_snapshot(self, snapshot: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self._snapshot(snapshot))

    async def op_list_snapshots(self) -> Answer:
        return {"snapshots": sorted(path.name for path in self.snapshots.glob("snap-*"))}

    async def op_fork(self, id: str, count: int = 1, timeout: float | None = None) -> Answer:
        """`count` sandboxes with the files this one has now; each entry is an info or an error."""
        box = self._box(id)
        if not 1 <= count <= 1000:
            raise InvalidRequest(f"count is 1 to 1000, not {count!r}")
        snapshot = (await self.op_snapshot(id))["snapshot"]
        spec = box.spec.but(trajectory=None, idempotency_key=None, timeout=timeout or box.spec.timeout)
        try:
            made = await asyncio.gather(*(self.make(spec, snapshot) for _ in range(count)), return_exceptions=True)
        finally:
            await self.op_delete_snapshot(snapshot)
        answers = []
        for each in made:
            if isinstance(each, BaseException) and not isinstance(each, DsecError):
                raise each
            answers.append(recorded(each) if isinstance(each, DsecError) else {"info": each.info().as_dict()})
        return {"forks": answers}

    async def op_pool(self, spec: dict[str, Any], size: int) -> Answer:
        """Keeps `size` sandboxes of this kind ready; returns how many are."""
        return {"ready": await self.pool.resize(Spec.from_dict(spec), size)}

    async def op_status(self) -> Answer:
        return {"host": self.host, "pid": os.getpid(), "live": len(self.boxes), "max_live": self.max_live}

    async def op_call(
        self, id: str, function: str, args: list[Any], kwargs: dict[str, Any], timeout: float | None = 60
    ) -> Answer:
        """A function sandbox's call: a registered name, or code that defines main()."""
        box = self._box(id)
        call = getattr(box.alive(), "call", None)
        if call is None:
            raise InvalidRequest(f"a {box.spec.substrate} runs commands, not calls")

        async def act(step: int) -> Answer:
            return {"value": await call(function, args, kwargs, timeout)}

        return await self._logged(box, "call", {"function": function, "args": args, "kwargs": kwargs}, act)

    async def replace_files(self, box: Box, snapshot: str) -> None:
        """Gives the box the files of a snapshot: a fresh sandbox under the same name."""
        if box.watcher is not None:
            box.watcher.cancel()
        assert box.running is not None
        old, box.commands = box.running, {}
        folder = self.home / "sandboxes" / f"{box.id}.{secrets.token_hex(3)}"
        folder.mkdir(mode=0o700)
        box.running = await self.substrate(box.spec.substrate).create(
            box.id, box.spec, folder, self._snapshot(snapshot)
        )
        box.folder = folder
        await old.destroy()
        box.save()
        self._watch(box)
