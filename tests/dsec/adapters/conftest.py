"""Sandboxes of a state folder of the test's own, with an Edge that ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsec.client import EmbeddedTransport
from tests.dsec.conftest import reachable


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    reachable(folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("DSEC_HOME", str(folder))
    patch.delenv("DSEC_URL", raising=False)
    yield folder

    async def end() -> None:
        transport = EmbeddedTransport(folder)
        await transport.call("shutdown", {"destroy": True})
        await transport.close()

    if (folder / "edge.sock").exists():
        asyncio.run(end())
    patch.undo()
