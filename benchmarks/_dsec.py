"""What benchmarks of sandboxes share: an Edge in a folder of its own, and the load before and after."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from dsec.edge.edge import Edge


@contextlib.asynccontextmanager
async def an_edge(max_live: int | None = None) -> AsyncIterator[Edge]:
    """An Edge without sandboxes; both end with the block."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, kernel {os.uname().release}, uid {os.geteuid()}")
    with tempfile.TemporaryDirectory(prefix="dsec-bench-") as name:
        home = Path(name)
        home.chmod(0o711)  # sandboxes run as other users
        edge = Edge(home, max_live=max_live)
        await edge.start()
        try:
            yield edge
        finally:
            await edge.stop(destroy=True)
    print(f"load at the end {os.getloadavg()[0]:.2f}")
