"""What the tests of virtual machines share: machines on an event loop of their own, and a shell in them."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from dsec.substrates.microvm import MicroVMSubstrate, VirtualMachine
from dsec.types import Spec

SPEC = Spec(substrate="microvm", memory=128, disk=32)


class Bench:
    """A substrate on an event loop of its own, and every machine it made."""

    def __init__(self, substrate: MicroVMSubstrate, scratch: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.substrate, self.scratch, self.count = substrate, scratch, 0
        self.made: list[VirtualMachine] = []

    def run(self, work: Coroutine[Any, Any, Any], timeout: float = 300) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout))

    def folder(self) -> Path:
        self.count += 1
        folder = self.scratch / f"{self.count}"
        folder.mkdir(mode=0o700)
        return folder

    async def create(self, spec: Spec = SPEC, snapshot: Path | None = None) -> VirtualMachine:
        machine = await self.substrate.create(f"test-{self.count}", spec, self.folder(), snapshot)
        self.made.append(machine)
        return machine

    def close(self) -> None:
        for machine in self.made:
            self.run(machine.destroy())
        self.run(self.substrate.close())
        self.loop.close()


async def shell(
    machine: VirtualMachine, command: str | list[str], timeout: float = 120, **options: Any
) -> tuple[int, str]:
    """Exit code and output of a command, both streams in one."""
    out: list[bytes] = []
    process = machine.agent.exec(command, lambda kind, data: out.append(data), **options)
    done = await asyncio.wait_for(process.done, timeout)
    process.forget()
    return done.code, b"".join(out).decode(errors="replace")
