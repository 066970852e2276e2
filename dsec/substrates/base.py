"""What every substrate implements. The Edge knows nothing else about them; REGISTRY names where each lives."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from dsec.errors import SubstrateUnavailable
from dsec.guest.protocol import Agent
from dsec.types import Capabilities, Record, Spec, Stats


@dataclass(frozen=True)
class Probe(Record):
    """Whether a substrate works here, found by really starting one."""

    usable: bool
    reason: str = ""
    """Why not, in one line; or what it runs on."""
    fix: str = ""
    """What to install or set, as a command where there is one."""
    seconds: float = 0.0
    """From request to first output."""


class Running(Protocol):
    """One live sandbox. All methods are safe to call while commands run in it."""

    agent: Agent
    capabilities: Capabilities

    async def freeze(self) -> None:
        """Stops every process where it stands; they keep their memory."""

    async def thaw(self) -> None: ...

    async def stats(self) -> Stats: ...

    async def snapshot(self, target: Path) -> None:
        """Captures the files (and memory, where fork_memory) in the folder `target`, which must not exist yet. Frozen
        while it copies, thawed after. Complete or absent: written beside and renamed."""

    async def destroy(self) -> None:
        """Kills every process within a second and frees all it held. Idempotent; never raises for a dead sandbox."""

    def state(self) -> dict[str, Any]:
        """JSON that lets `Substrate.adopt` find it again in a new Edge process."""

    async def died(self) -> str:
        """Returns when the sandbox's last process is gone, with the reason in one line."""


class Substrate(Protocol):
    """A kind of sandbox. Made once per Edge with `home`, the Edge's state folder."""

    name: str
    capabilities: Capabilities

    def __init__(self, home: Path) -> None: ...

    async def probe(self) -> Probe:
        """Starts one. A substrate with several `runtimes` (names) takes one of them as `runtime`."""

    async def create(self, id: str, spec: Spec, folder: Path, snapshot: Path | None = None) -> Running:
        """Starts a sandbox whose own state is in `folder` (exists, empty, mode 0700), from a `snapshot` if given. The
        agent need not have said hello yet: its frames queue. Raises SubstrateUnavailable, Capacity or ImageError,
        leaving nothing behind."""

    async def adopt(self, id: str, spec: Spec, folder: Path, state: dict[str, Any]) -> Running:
        """Takes over a sandbox that an earlier Edge process left running. Raises NotFound when it is dead."""

    async def close(self) -> None:
        """Ends what the substrate itself keeps (pools, zygotes); sandboxes go on."""


REGISTRY = {
    "function": "dsec.substrates.function:FunctionSubstrate",
    "container": "dsec.substrates.container:ContainerSubstrate",
    "microvm": "dsec.substrates.microvm:MicroVMSubstrate",
    "vm": "dsec.substrates.vm:VMSubstrate",
}


def load(name: str, home: Path) -> Substrate:
    """The substrate of that name; one that is not part of this installation raises SubstrateUnavailable."""
    module, _, cls = REGISTRY[name].partition(":")
    try:
        return getattr(import_module(module), cls)(home)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise SubstrateUnavailable(
            f"{name} is not part of this installation", reason=f"no module {module}", fix="pip install dsv4"
        ) from None
