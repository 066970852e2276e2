"""A sandbox's network as the Edge gives it: the proxy outwards, and ports forwarded inwards."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from dsec.errors import DsecError, Forbidden, SubstrateUnavailable
from dsec.guest.streams import Stream, splice
from dsec.network import proxy
from dsec.network.policy import Policy, parse

if TYPE_CHECKING:
    from dsec.edge.box import Box
    from dsec.substrates.base import Substrate
    from dsec.types import Spec


class Gateway:
    """Of one sandbox, as long as this Edge has it."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self.policy: Policy = parse(box.spec.network)
        self._servers: dict[int, asyncio.Server] = {}

    async def open(self) -> None:
        """Tells the agent to open the proxy's port."""
        assert self._box.running is not None
        streams = self._box.running.agent.streams
        streams.accept = proxy.Proxy(self.policy).serve
        with contextlib.suppress(DsecError):  # an agent that is gone is noticed elsewhere
            await streams.gate(proxy.PORT)

    def check(self, port: int) -> None:
        """Raises Forbidden unless the policy opens this port."""
        if not self.policy.lets_in(port):
            text = f'port {port} of this sandbox is closed; create it with network={{"allow_in": [{port}]}}'
            raise Forbidden(text)

    async def connect(self, port: int) -> Stream:
        """A connection to the port inside. Forbidden by the policy, InvalidRequest when nobody listens."""
        self.check(port)
        return await self._box.alive().agent.streams.connect(port)

    async def host(self, port: int) -> str:
        """ "127.0.0.1:N" on this host, forwarded to `port` on the sandbox's loopback. Forbidden by the policy."""
        self.check(port)
        if port not in self._servers:

            async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                try:
                    await splice(await self.connect(port), reader, writer)
                except (DsecError, OSError):
                    pass  # nobody listens there, or it is gone: the client sees its connection end
                finally:
                    writer.close()

            self._servers[port] = await asyncio.start_server(forward, "127.0.0.1", 0)
        name = self._servers[port].sockets[0].getsockname()
        return f"{name[0]}:{name[1]}"

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
        self._servers.clear()


class NetworkOperations:
    """The Edge's part; a mixin of Edge."""

    _box: Any
    _task: Any

    def refuse_network(self, spec: Spec, substrate: Substrate) -> None:
        """Raises SubstrateUnavailable when the substrate cannot give the policy that is asked for."""
        if spec.network != "none" and not substrate.capabilities.network:
            text = f"a {spec.substrate} has no network here; the policy {', '.join(spec.network)} cannot be given"
            raise SubstrateUnavailable(text, reason="no network policies here", fix='network="none"')

    def network(self, box: Box) -> None:
        """Opens a sandbox's network, again after an adoption or a rollback. Its frame goes ahead of any command's."""
        if box.gateway is not None:
            box.gateway.close()
        box.gateway = Gateway(box)
        if box.gateway.policy.outwards:
            self._task(box.gateway.open())

    async def op_get_host(self, id: str, port: int) -> dict[str, Any]:
        """Where on this host a port of the sandbox is reached."""
        return {"host": await self._gateway(id).host(int(port))}

    async def op_check_port(self, id: str, port: int) -> dict[str, Any]:
        """For API servers, which forward it themselves: Forbidden unless the policy opens the port."""
        self._gateway(id).check(int(port))
        return {}

    async def tunnel(self, id: str, port: int) -> Stream:
        """A connection to a port of the sandbox."""
        return await self._gateway(id).connect(port)

    def _gateway(self, id: str) -> Gateway:
        box = self._box(id)
        box.alive()
        assert box.gateway is not None
        gateway: Gateway = box.gateway
        return gateway


def environment(network: str | tuple[str, ...]) -> dict[str, str]:
    """What commands of a sandbox with that policy are told about the way out."""
    return proxy.ENV if parse(network).outwards else {}
