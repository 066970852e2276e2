"""Inspect's sandbox provider `dsec`: ``sandbox="dsec"`` or ``sandbox=("dsec", "spec.json")`` in a task.

The configuration is a `Spec` as JSON (a file's path, or Inspect's own configuration object with the same fields).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentConfigType,
    SandboxEnvironmentLimits,
    sandboxenv,
)

from dsec.adapters.raw import os_errors, run
from dsec.errors import InvalidRequest, NotFound, Timeout
from dsec.sandbox import AsyncSandbox

HOUR = 3600.0


def spec_of(config: Any) -> dict[str, Any]:
    """The fields of a `Spec` in an Inspect configuration; nothing gives a container that lives for six hours."""
    if config is None:
        given: dict[str, Any] = {}
    elif isinstance(config, str):
        given = json.loads(Path(config).read_text())
    else:
        given = config.model_dump() if hasattr(config, "model_dump") else dict(config)
    return {"substrate": "container", "timeout": 6 * HOUR} | given


@sandboxenv(name="dsec")
class DsecSandboxEnvironment(SandboxEnvironment):
    """One sandbox of a sample."""

    def __init__(self, box: AsyncSandbox, user: str = "root") -> None:
        """``user``: whom commands run as and whose permissions count for files; relative paths start at root's home, or
        for others at /tmp, as the image `host` has no home that is theirs."""
        self.box, self._user, self._folder = box, user, "/root" if user == "root" else "/tmp"

    @classmethod
    def config_files(cls) -> list[str]:
        return ["dsec.json"]

    @classmethod
    async def sample_init(
        cls, task_name: str, config: SandboxEnvironmentConfigType | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        labels = {"inspect.task": task_name}
        spec = spec_of(config) | {"metadata": labels}
        return {"default": cls(await AsyncSandbox.create(**spec), spec.get("user", "root"))}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: SandboxEnvironmentConfigType | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        for each in environments.values():
            if isinstance(each, cls):
                await each.box.kill()

    @classmethod
    async def cli_cleanup(cls, id: str | None) -> None:
        """`inspect sandbox cleanup dsec [ID]`: ends one, or all that Inspect made."""
        for info in await AsyncSandbox.list():
            if info.id == id or (id is None and "inspect.task" in info.metadata):
                await (await AsyncSandbox.connect(info.id)).kill()

    def _path(self, file: str) -> str:
        return file if file.startswith("/") else f"{self._folder}/{file}"

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        limit = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        data = input.encode() if isinstance(input, str) else input
        options = {
            "cwd": self._path(cwd) if cwd else self._folder,
            "env": env,
            "user": user,
            "timeout": timeout,
            "limit": limit,
        }
        try:
            done = await run(self.box, cmd, data, **options)
        except Timeout as error:
            raise TimeoutError(str(error)) from error
        except NotFound as error:
            return ExecResult(False, 127, "", str(error))
        except InvalidRequest as error:
            if error.fields.get("errno") in (1, 13):
                raise PermissionError(error.fields["errno"], str(error)) from error
            return ExecResult(False, 126, "", str(error))  # no such user, no such folder, not a program
        if done.truncated:
            raise OutputLimitExceededError(
                SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, done.stdout.decode("utf-8", "replace")
            )
        if done.exit_code == 126 and b"ermission denied" in done.stderr:
            raise PermissionError(done.stderr.decode("utf-8", "replace"))
        return ExecResult(done.exit_code == 0, done.exit_code, done.stdout.decode(), done.stderr.decode())

    async def write_file(self, file: str, contents: str | bytes) -> None:
        path = self._path(file)
        with os_errors(path):
            await self.box.files.write(path, contents, user=self._user)

    async def read_file(self, file: str, text: bool = True) -> Any:
        path, limit = self._path(file), SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        with os_errors(path):
            if (await self.box.files.get_info(path, user=self._user)).size > limit:
                raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
            data: bytes = await self.box.files.read(path, format="bytes", user=self._user)
        return data.decode() if text else data
