"""The SDK. AsyncSandbox is written out; Sandbox is made from it (`twin`), so the two cannot drift apart.

    with Sandbox.create(substrate="container", timeout=300) as box:
        print(box.commands.run("uname -a").stdout)

Names and meanings are E2B's where E2B has them. Seconds everywhere; a sandbox lives `timeout` seconds unless told
otherwise and does not depend on the process that made it (`AsyncSandbox.connect`).
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from typing import Any, Self

from dsec.client import Transport, default_transport
from dsec.errors import InvalidRequest, NotFound, from_wire
from dsec.parts import (
    AsyncCommandHandle,
    AsyncCommands,
    AsyncFiles,
    AsyncPty,
    AsyncWatchHandle,
    one,
)
from dsec.twin import AsyncPage, Either, bounded, twin
from dsec.types import SandboxInfo, SandboxQuery, SnapshotInfo, Spec, Stats


@bounded
class AsyncSandbox:
    """One sandbox. Leaving the context manager kills it; letting go of the object does not."""

    def __init__(self, info: SandboxInfo, transport: Transport) -> None:
        self._set(info.id, transport)
        self.created_as = info
        """The sandbox as it was when this object was made; get_info() asks again."""

    def _set(self, id: str, transport: Transport) -> None:
        self.id = self.sandbox_id = id
        self.commands, self.files, self.pty = AsyncCommands(self), AsyncFiles(self), AsyncPty(self)
        self._transport = transport

    @classmethod
    def _named(cls, id: str, transport: Transport) -> Self:
        """Of an id alone: whether there is such a sandbox is for the first call to find out."""
        self = cls.__new__(cls)
        self._set(id, transport)
        return self

    @classmethod
    async def create(
        cls,
        template: str | None = None,
        *,
        transport: Transport | None = None,
        envs: dict[str, str] | None = None,
        secure: bool | None = None,
        **spec: Any,
    ) -> Self:
        """A new sandbox; the keywords are Spec's fields. With `trajectory` an earlier one is resumed.

        E2B's words: `template` is an image ("base" is "host"; a snapshot's id is one, too), `envs` is env, and every
        sandbox is `secure`. Raises SubstrateUnavailable (with the fix), Capacity, ImageError, InvalidRequest.
        """
        if secure is False:
            raise InvalidRequest("secure=False: here every sandbox is reached with a key only")
        if template is not None:
            template = "host" if template == "base" else template
            template = f"snapshot:{template}" if template.startswith("snap-") else template
        named = {"image": one("image", spec.pop("image", None), "template", template)}
        named["env"] = one("env", spec.pop("env", None), "envs", envs)
        spec |= {name: value for name, value in named.items() if value is not None}
        transport = transport or default_transport()
        wanted = Spec.from_dict(spec).stated()
        info, _ = await transport.call("create", {"spec": wanted})
        return cls(SandboxInfo(**info), transport)

    @Either
    async def connect(self, timeout: float | None = None) -> Self:
        """The sandbox of that id, resumed when paused; `timeout` moves its deadline. Raises NotFound."""
        return type(self)(SandboxInfo(**await self._ask("connect", timeout=timeout)), self._transport)

    @classmethod
    async def list(
        cls,
        query: SandboxQuery | None = None,
        limit: int | None = None,
        next_token: str | None = None,
        *,
        metadata: dict[str, str] | None = None,
        state: list[str] | None = None,
        transport: Transport | None = None,
    ) -> AsyncPage:
        """Live sandboxes whose metadata has these entries, oldest first: a list of all, or of the first `limit` with
        `has_next`, `next_token` and `next_items()` for the others."""
        transport = transport or default_transport()
        if query is not None:
            metadata = one("metadata", metadata, "query.metadata", query.metadata)
            state = one("state", state, "query.state", query.state)

        async def ask(token: str | None) -> dict[str, Any]:
            asked = {"metadata": metadata, "state": state, "limit": limit, "next_token": token}
            return (await transport.call("list", asked))[0]

        return AsyncPage(await ask(next_token), ask)

    @classmethod
    async def pool(cls, size: int, *, transport: Transport | None = None, **spec: Any) -> int:
        """Keeps `size` sandboxes of this kind ready on the host, so that create takes a millisecond; 0 ends it."""
        transport = transport or default_transport()
        answer, _ = await transport.call("pool", {"spec": Spec.from_dict(spec).stated(), "size": size})
        return int(answer["ready"])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    @Either
    async def get_info(self) -> SandboxInfo:
        return SandboxInfo(**await self._ask("info"))

    async def is_running(self) -> bool:
        try:
            return (await self.get_info()).state in ("running", "paused")
        except NotFound:
            return False

    @Either
    async def set_timeout(self, timeout: float) -> None:
        """Seconds from now until it is destroyed."""
        await self._ask("set_timeout", timeout=timeout)

    @Either
    async def pause(self) -> bool:
        """Stops its processes and its clock; `connect` or `resume` lets both go on. False when it was paused."""
        try:
            await self._ask("pause")
        except InvalidRequest as error:
            if not error.fields.get("paused"):
                raise
            return False
        return True

    beta_pause = pause

    @Either
    async def resume(self) -> None:
        await self._ask("resume")

    @Either
    async def kill(self) -> bool:
        """Ends it within a second; False when it was gone."""
        try:
            return bool((await self._ask("kill"))["killed"])
        except NotFound:
            return False

    @Either
    async def get_metrics(self) -> Stats:
        return Stats(**await self._ask("metrics"))

    async def get_host(self, port: int) -> str:
        """Where this port of the sandbox is reached: http://{this} and ws://{this}. On its Edge's machine "host:port";
        through an API server a name or a path of the server's that holds a token. Forbidden unless the network policy
        has the port in allow_in."""
        return str((await self._ask("get_host", port=port))["host"])

    @Either
    async def snapshot(self) -> str:
        """Captures its files; create(image="snapshot:" + this) starts from them."""
        return str((await self._ask("snapshot"))["snapshot"])

    @Either
    async def create_snapshot(self) -> SnapshotInfo:
        """The same with E2B's name: create(template=its snapshot_id) starts from it."""
        return SnapshotInfo(str((await self._ask("snapshot"))["snapshot"]))

    @classmethod
    async def list_snapshots(cls, transport: Transport | None = None) -> Sequence[SnapshotInfo]:
        """All snapshots that somebody asked for, of the host or of the project."""
        answer, _ = await (transport or default_transport()).call("list_snapshots", {})
        return [SnapshotInfo(name) for name in answer["snapshots"]]

    @classmethod
    async def delete_snapshot(cls, snapshot_id: str, transport: Transport | None = None) -> bool:
        """False when there is none of that id."""
        try:
            await (transport or default_transport()).call("delete_snapshot", {"snapshot": snapshot_id})
        except NotFound:
            return False
        return True

    @Either
    async def fork(self, count: int = 1, timeout: float | None = None) -> Sequence[Any]:
        """`count` sandboxes that begin with this one's files (each to live `timeout` seconds, or what this one was
        given); an entry is a sandbox or the error that prevented it."""
        answers = (await self._ask("fork", count=count, timeout=timeout))["forks"]
        return [
            from_wire(each["error"]) if "error" in each else type(self)(SandboxInfo(**each["info"]), self._transport)
            for each in answers
        ]

    async def log_snapshot(self) -> str:
        """Captures its files into its trajectory: a resume after its death goes on from here."""
        return str((await self._ask("log_snapshot"))["snapshot"])

    async def call(self, function: Any, *args: Any, timeout: float | None = 60, **kwargs: Any) -> Any:
        """A function sandbox's call: a registered name ("module:function"), Python code that defines main(), or a
        function, whose source is sent: it may use only what it imports itself."""
        name = function
        if not isinstance(function, str):
            name = f"{textwrap.dedent(inspect.getsource(function))}\nmain = {function.__name__}\n"
        answer = await self._ask("call", function=name, args=list(args), kwargs=kwargs, timeout=timeout)
        return answer["value"]

    async def _ask(self, op: str, **args: Any) -> dict[str, Any]:
        return (await self._transport.call(op, {"id": self.id, **args}))[0]


CommandHandle = twin(AsyncCommandHandle, "CommandHandle")
Commands = twin(AsyncCommands, "Commands")
Files = twin(AsyncFiles, "Files")
WatchHandle = twin(AsyncWatchHandle, "WatchHandle")
Pty = twin(AsyncPty, "Pty")
Sandbox: Any = twin(AsyncSandbox, "Sandbox")
