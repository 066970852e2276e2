"""The Edge's file operations: resolved inside the sandbox by its agent, and through its trajectory if it has one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dsec.edge.box import Box
from dsec.errors import InvalidRequest, NotFound
from dsec.guest.protocol import Agent, Owner

Answer = dict[str, Any]
WATCHED = 64 << 20
"""Bytes of events of a watch, half of which are told as they come."""


class FileOperations(ABC):
    """The op_files_* methods of an Edge, which gives the four below."""

    @abstractmethod
    def _box(self, id: str) -> Box: ...

    @abstractmethod
    async def _options(self, box: Box, user: str | None, env: dict[str, str] | None, cwd: str | None) -> Answer: ...

    @abstractmethod
    async def _logged(
        self, box: Box, kind: str, args: dict[str, Any], act: Any, idempotent: bool = False
    ) -> Answer: ...

    @abstractmethod
    async def _user(self, box: Box, user: str) -> tuple[int, int, str]: ...

    async def _file(
        self, id: str, kind: str, act: Callable[[Agent, Owner | None], Awaitable[Answer]], idempotent: bool = False,
        user: str | None = None, **args: Any,
    ) -> Answer:  # fmt: skip
        """An operation through the box's trajectory, with the permissions of `user` (None: root's)."""
        box = self._box(id)

        async def work(step: int) -> Answer:
            owner = (await self._user(box, user))[:2] if user else None
            return await act(box.alive().agent, owner)

        return await self._logged(box, kind, {**args, **({"user": user} if user else {})}, work, idempotent)

    async def op_files_read(
        self, id: str, path: str, offset: int = 0, size: int = 1 << 28, part: bool = False, user: str | None = None
    ) -> bytes:
        """At most `size` bytes: of a longer file only with `part`."""

        async def act(agent: Agent, owner: Owner | None) -> Answer:
            return {"data": await agent.read(path, offset, size, part, owner)}

        args = {"path": path, "offset": offset, "size": size, **({"part": True} if part else {})}
        value = (await self._file(id, "files.read", act, True, user, **args))["data"]
        return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")

    async def op_files_write(
        self, id: str, path: str, mode: int = 0o644, append: bool = False, data: bytes = b"", user: str | None = None
    ) -> Answer:
        async def act(agent: Agent, owner: Owner | None) -> Answer:
            await agent.write(path, data, mode, append, owner=owner)
            return {"size": len(data)}

        args = {"path": path, "mode": mode, "append": append, "data": data}
        return await self._file(id, "files.write", act, not append, user, **args)

    async def op_files_list(self, id: str, path: str, user: str | None = None) -> Answer:
        async def act(agent: Agent, owner: Owner | None) -> Answer:
            return {"entries": [entry.as_dict() for entry in await agent.list(path, owner)]}

        return await self._file(id, "files.list", act, True, user, path=path)

    async def op_files_get_info(self, id: str, path: str, user: str | None = None) -> Answer:
        async def act(agent: Agent, owner: Owner | None) -> Answer:
            return (await agent.stat(path, owner)).as_dict()

        return await self._file(id, "files.get_info", act, True, user, path=path)

    async def op_files_remove(self, id: str, path: str, user: str | None = None) -> Answer:
        async def act(agent: Agent, owner: Owner | None) -> Answer:
            await agent.remove(path, owner)
            return {}

        return await self._file(id, "files.remove", act, False, user, path=path)

    async def op_files_rename(self, id: str, path: str, to: str, user: str | None = None) -> Answer:
        async def act(agent: Agent, owner: Owner | None) -> Answer:
            await agent.rename(path, to, owner)
            return {"entry": (await agent.stat(to, owner)).as_dict()}

        return await self._file(id, "files.rename", act, False, user, path=path, to=to)

    async def op_files_make_dir(self, id: str, path: str, user: str | None = None) -> Answer:
        async def act(agent: Agent, owner: Owner | None) -> Answer:
            made = False
            try:
                await agent.stat(path, owner)
            except NotFound:
                made = True
            await agent.make_dir(path, owner)
            return {"made": made}

        return await self._file(id, "files.make_dir", act, True, user, path=path)

    async def op_files_url(self, id: str, **_: Any) -> Answer:
        raise InvalidRequest("URLs of files are the API server's: this is a host's own Edge, which speaks no HTTP")

    async def op_files_watch(
        self, id: str, path: str, recursive: bool = False, user: str | None = None, timeout: float | None = None
    ) -> Answer:
        """Begins to tell what changes in a folder: a command without a program, whose output is watch.h's lines. No
        trajectory records it."""
        box = self._box(id)
        options = await self._options(box, user, None, path)
        started = box.start([], timeout, 0, watch=2 if recursive else 1, limit=WATCHED, **options)
        started.text = f"watch {path}"
        await box.alive().agent.ping(30)  # a refusal comes before this answer
        if started.result.done():
            await started.result
        return {"command": started.id}

    async def op_files_watched(self, id: str, command: int) -> bytes:
        """The lines of a watch since this was last asked. When there are no more: what ended it, or NotFound."""
        watch = self._box(id).command(command)
        fresh = watch.rest + b"".join(data for _, data in watch.output[watch.told :])
        watch.told = len(watch.output)
        lines, end, watch.rest = fresh.rpartition(b"\0")
        if not lines and watch.result.done():
            watch.result.result()  # raises what ended it, if anything did
            raise NotFound("the watch has ended")
        return lines + end


def sync_tree(folder: Path) -> None:
    """Makes a small finished tree durable: its files, then its folders."""
    for root, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(root, name)
            if os.path.isfile(path) and not os.path.islink(path):
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                os.fsync(fd)
                os.close(fd)
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
