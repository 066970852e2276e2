"""What the adapters share: a command's outcome as bytes, and file errors as Python's own."""

from __future__ import annotations

import base64
import errno
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsec.errors import InvalidRequest, NotFound
from dsec.sandbox import AsyncSandbox

OSERRORS: dict[int, type[OSError]] = {
    errno.EACCES: PermissionError,
    errno.EPERM: PermissionError,
    errno.EROFS: PermissionError,
    errno.EISDIR: IsADirectoryError,
    errno.ENOTDIR: NotADirectoryError,
    errno.EEXIST: FileExistsError,
}
LARGE = 256 * 1024
"""Bytes of input that travel beside the command at most."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended; output not decoded."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool


async def run(box: AsyncSandbox, command: str | list[str], input: bytes | None = None, **options: Any) -> Outcome:
    """A command from start to end. Raises Timeout and what else the sandbox raises. A large input lies in a file of the
    sandbox meanwhile."""
    if input is not None and len(input) > LARGE:
        path = f"/tmp/.input-{secrets.token_hex(8)}"
        await box.files.write(path, input)
        words = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        try:
            return await run(box, ["/bin/sh", "-c", 'exec "$@" <"$0"', path, *words], None, **options)
        finally:
            await box.files.remove(path)
    given = {} if input is None else {"input": base64.b64encode(input).decode()}
    output: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    result: dict[str, Any] = {}
    async for kind, data in box._transport.stream(
        "commands.run", {"id": box.id, "command": command, **given, **options}
    ):
        if kind == "result":
            result = json.loads(data)
        else:
            output[kind].append(data)
    out, err = (b"".join(output[name]) for name in ("stdout", "stderr"))
    return Outcome(result["exit_code"], out, err, result["truncated"])


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turns the sandbox's errors about a file into FileNotFoundError, PermissionError and their like."""
    try:
        yield
    except NotFound as error:
        raise FileNotFoundError(errno.ENOENT, str(error), path) from error
    except InvalidRequest as error:
        number = error.fields.get("errno")
        if number is None:
            raise
        raise OSERRORS.get(number, OSError)(number, str(error), path) from error
