"""Tasks in the harbor (Terminal-Bench) layout, run and scored in a sandbox.

A task is a folder: `task.toml` (limits, metadata), `instruction.md`, `environment/` (files for the working folder; its
Dockerfile names the base), `tests/test.sh` (writes a number to /logs/verifier/reward.txt or its exit code decides),
`solution/solve.sh`. Only base images that exist here are used, by `images`; nothing is built from a Dockerfile.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsec.errors import InvalidRequest, NotFound
from dsec.sandbox import AsyncSandbox

REWARD = "/logs/verifier/reward.txt"
FOLDER = "/app"


@dataclass(frozen=True)
class Task:
    """One task as it lies on disk."""

    name: str
    folder: Path
    instruction: str
    base: str
    """The image of the Dockerfile's FROM line."""
    agent_timeout: float = 900.0
    verifier_timeout: float = 900.0
    cpu: float = 1.0
    memory: int = 2048
    disk: int = 10240
    metadata: Mapping[str, Any] = field(default_factory=dict)


def load(folder: str | Path) -> Task:
    """Raises InvalidRequest, naming the file, for a folder that is no task."""
    folder = Path(folder)
    for name in ("task.toml", "instruction.md", "tests/test.sh"):
        if not (folder / name).is_file():
            raise InvalidRequest(f"{folder} is no harbor task: it has no {name}")
    try:
        told = tomllib.loads((folder / "task.toml").read_text())
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{folder / 'task.toml'}: {error}") from None
    environment = told.get("environment", {})
    return Task(
        folder.name,
        folder,
        (folder / "instruction.md").read_text(),
        _base(folder / "environment" / "Dockerfile"),
        float(told.get("agent", {}).get("timeout_sec", 900.0)),
        float(told.get("verifier", {}).get("timeout_sec", 900.0)),
        float(environment.get("cpus", 1)),
        _mib(environment.get("memory_mb", environment.get("memory", 2048))),
        _mib(environment.get("storage_mb", environment.get("storage", 10240))),
        told.get("metadata", {}),
    )


def load_all(folder: str | Path) -> list[Task]:
    """Every task of a data set's folder, by name."""
    return [load(path.parent) for path in sorted(Path(folder).glob("*/task.toml"))]


def _base(dockerfile: Path) -> str:
    if dockerfile.is_file():
        for line in dockerfile.read_text().splitlines():
            if line.upper().startswith("FROM "):
                return line.split()[1]
    return ""


def _mib(size: Any) -> int:
    """2048, "2G" or "512M" as MiB."""
    if isinstance(size, str):
        units = {"G": 1024, "M": 1}
        if size[-1:].upper() not in units or not size[:-1].isdigit():
            raise InvalidRequest(f"a size is like 2G or 512M, not {size!r}")
        return int(size[:-1]) * units[size[-1].upper()]
    return int(size)


async def start(task: Task, images: Mapping[str, str] | None = None, **spec: Any) -> AsyncSandbox:
    """A sandbox with the task's files in /app. ``images``: base image of a Dockerfile -> image here ("host")."""
    image = (images or {}).get(task.base, "host")
    wanted: dict[str, Any] = {
        "substrate": "container",
        "image": image,
        "cpu": task.cpu,
        "memory": task.memory,
        "disk": task.disk,
        "timeout": task.agent_timeout + task.verifier_timeout + 60,
        "metadata": {"harbor.task": task.name},
    }
    box = await AsyncSandbox.create(**wanted | spec)
    await box.files.make_dir(FOLDER)
    await _copy(box, task.folder / "environment", FOLDER)
    return box


async def _copy(box: AsyncSandbox, source: Path, target: str) -> None:
    for path in sorted(source.rglob("*")) if source.is_dir() else ():
        if path.is_file() and path.name != "Dockerfile":
            mode = path.stat().st_mode & 0o777
            await box.files.write(f"{target}/{path.relative_to(source)}", path.read_bytes(), mode=mode)


async def solve(box: AsyncSandbox, task: Task) -> None:
    """Runs the task's own solution, which proves that the task can be solved here. Raises CommandFailed."""
    await _copy(box, task.folder / "solution", "/solution")
    await box.commands.run(["bash", "/solution/solve.sh"], cwd=FOLDER, timeout=task.agent_timeout)


async def score(box: AsyncSandbox, task: Task) -> float:
    """Brings the tests into the sandbox only now, runs them -> the reward they write, else 1.0 or 0.0 by exit code."""
    await _copy(box, task.folder / "tests", "/tests")
    await box.files.make_dir("/logs/verifier")
    done = await box.commands.run(["bash", "/tests/test.sh"], cwd=FOLDER, timeout=task.verifier_timeout, check=False)
    try:
        return float((await box.files.read(REWARD)).strip())
    except NotFound:
        return float(done.exit_code == 0)
    except ValueError as error:
        raise InvalidRequest(f"{task.name}: {REWARD} holds no number: {error}") from None
