"""How the SDK reaches an Edge: one call or one stream of events, over whatever lies between.

`Transport` is the whole contract. EmbeddedTransport talks to this host's Edge over its unix socket and starts the
Edge when none runs; RemoteTransport (dsec.remote) talks HTTP to an API server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

Event = tuple[str, bytes]
"""("stdout", bytes), ("stderr", bytes), or ("result", JSON of the answer) which is the last."""


class Transport(Protocol):
    """Operations are named as in dsec/edge/edge.py; arguments and answers are JSON, bytes travel beside them.

    Errors are raised as the DsecError the Edge raised.
    """

    async def call(self, op: str, args: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]: ...

    def stream(self, op: str, args: dict[str, Any]) -> AsyncIterator[Event]: ...

    async def close(self) -> None: ...
