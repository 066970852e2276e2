"""The Edge's file operations: resolved inside the sandbox by its agent, and through its trajectory if it has one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from dsec.edge.box import Box

Answer = dict[str, Any]


class FileOperations(ABC):
    """The op_files_* methods of an Edge, which gives the two below."""

    @abstractmethod
    def _box(self, id: str) -> Box: ...

    @abstractmethod
    async def _logged(
        self, box: Box, kind: str, args: dict[str, Any], act: Any, idempotent: bool = False
    ) -> Answer: ...

    async def op_files_read(self, id: str, path: str, offset: int = 0, size: int = 1 << 28) -> bytes:
        box = self._box(id)

        async def act(step: int) -> Answer:
            return {"data": await box.alive().agent.read(path, offset, size)}

        answer = await self._logged(box, "files.read", {"path": path, "offset": offset, "size": size}, act, True)
        value = answer["data"]
        return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")

    async def op_files_write(
        self, id: str, path: str, mode: int = 0o644, append: bool = False, data: bytes = b""
    ) -> Answer:
        box = self._box(id)

        async def act(step: int) -> Answer:
            await box.alive().agent.write(path, data, mode, append)
            return {"size": len(data)}

        args = {"path": path, "mode": mode, "append": append, "data": data}
        return await self._logged(box, "files.write", args, act, idempotent=not append)

    async def op_files_list(self, id: str, path: str) -> Answer:
        box = self._box(id)

        async def act(step: int) -> Answer:
            return {"entries": [entry.as_dict() for entry in await box.alive().agent.list(path)]}

        return await self._logged(box, "files.list", {"path": path}, act, True)

    async def op_files_get_info(self, id: str, path: str) -> Answer:
        box = self._box(id)

        async def act(step: int) -> Answer:
            return (await box.alive().agent.stat(path)).as_dict()

        return await self._logged(box, "files.get_info", {"path": path}, act, True)

    async def op_files_remove(self, id: str, path: str) -> Answer:
        box = self._box(id)

        async def act(step: int) -> Answer:
            await box.alive().agent.remove(path)
            return {}

        return await self._logged(box, "files.remove", {"path": path}, act)

    async def op_files_rename(self, id: str, path: str, to: str) -> Answer:
        box = self._box(id)

        async def act(step: int) -> Answer:
            await box.alive().agent.rename(path, to)
            return {}

        return await self._logged(box, "files.rename", {"path": path, "to": to}, act)

    async def op_files_make_dir(self, id: str, path: str) -> Answer:
        box = self._box(id)

        async def act(step: int) -> Answer:
            await box.alive().agent.make_dir(path)
            return {}

        return await self._logged(box, "files.make_dir", {"path": path}, act, True)


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
