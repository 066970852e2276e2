"""The Edge behind a unix socket: many requests on one connection, JSON heads with bytes beside them.

A message is u32 length of the head, u32 length of the bytes, head, bytes. Requests carry id, op, args (and stream:
true for events); answers carry the id and one of result, error, event. {"id": n, "cancel": true} stops listening to n;
the work goes on. After the answer to op "tunnel" a connection is one to a port inside a sandbox. Whoever may open the
socket (mode 0600) is the Edge's owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from dsec.edge.edge import Edge
from dsec.errors import DsecError, InvalidRequest, to_wire
from dsec.guest.build import home as default_home
from dsec.guest.streams import splice

HEAD = struct.Struct("<II")
MAX_HEAD, MAX_DATA = 1 << 24, 1 << 29


def message(head: dict[str, Any], data: bytes = b"") -> bytes:
    """The bytes of one message."""
    text = json.dumps(head).encode()
    return HEAD.pack(len(text), len(data)) + text + data


def beside(args: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Arguments as they travel: a stream's standard input, "input", goes as bytes beside the JSON."""
    data = args.get("input")
    if not isinstance(data, bytes):
        return args, b""
    return {name: value for name, value in args.items() if name != "input"}, data


async def receive(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next message; raises IncompleteReadError at the end and InvalidRequest for nonsense."""
    head, data = HEAD.unpack(await reader.readexactly(HEAD.size))
    if head > MAX_HEAD or data > MAX_DATA:
        raise InvalidRequest(f"a message of {head} + {data} bytes")
    value = json.loads(await reader.readexactly(head))
    return value, await reader.readexactly(data) if data else b""


class Server:
    """Serves one Edge. `run` returns when asked to shut down, by call or signal."""

    def __init__(self, edge: Edge, path: Path) -> None:
        self.edge, self.path = edge, path
        self.over = asyncio.Event()
        self.destroy = False
        self._calls: set[asyncio.Task[None]] = set()
        """Work that is brought to its end, whoever goes away: else there would be half a sandbox."""

    async def run(self) -> None:
        early = self.path.with_suffix(f".{os.getpid()}")  # visible only once it listens, in place of a dead one's
        old = os.umask(0o177)
        server = await asyncio.start_unix_server(self._client, early)
        os.umask(old)
        os.rename(early, self.path)
        await self.over.wait()
        server.close()
        self.path.unlink(missing_ok=True)
        await self.edge.stop(self.destroy)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                head, data = await receive(reader)
                id = int(head["id"])
                if head.get("op") == "tunnel" and not tasks:
                    await self._tunnel(head, reader, writer)
                    return
                if head.get("cancel"):
                    if id in tasks and tasks[id] not in self._calls:
                        tasks[id].cancel()
                    continue
                task = tasks[id] = asyncio.ensure_future(self._serve(head, data, writer))
                if not head.get("stream"):
                    self._calls.add(task)
                    task.add_done_callback(self._calls.discard)
                task.add_done_callback(lambda _, id=id: tasks.pop(id, None))  # type: ignore[misc]
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, DsecError, ValueError, KeyError):
            pass  # it went away, or talks nonsense: what it started goes on
        finally:
            for task in set(tasks.values()) - self._calls:
                task.cancel()
            writer.close()

    async def _tunnel(self, head: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """From the answer on, this connection is one to a port inside a sandbox."""
        try:
            args = head.get("args") or {}
            stream = await self.edge.tunnel(str(args.get("id")), int(args.get("port") or 0))
        except DsecError as error:
            writer.write(message({"id": head["id"], "error": to_wire(error)}))
            return
        writer.write(message({"id": head["id"], "result": {}}))
        await splice(stream, reader, writer)

    async def _serve(self, head: dict[str, Any], data: bytes, writer: asyncio.StreamWriter) -> None:
        id, op, args = head["id"], str(head.get("op")), head.get("args") or {}
        try:
            if op == "shutdown":
                self.destroy = bool(args.get("destroy"))
                writer.write(message({"id": id, "result": {}}))
                self.over.set()
            elif head.get("stream"):
                args |= {"input": data} if data else {}
                async for kind, piece in self.edge.stream(op, args):
                    writer.write(message({"id": id, "event": kind}, piece))
                    await writer.drain()
            else:
                result, out = await self.edge.call(op, args, data)
                _tell(writer, {"id": id, "result": result}, out)
        except DsecError as error:
            _tell(writer, {"id": id, "error": to_wire(error)})
        except ConnectionError:
            return
        except Exception as error:
            _tell(writer, {"id": id, "error": {"error": "DsecError", "message": f"{type(error).__name__}: {error}"}})
            raise
        with contextlib.suppress(ConnectionError):
            await writer.drain()


def _tell(writer: asyncio.StreamWriter, head: dict[str, Any], data: bytes = b"") -> None:
    """Writes a message, unless nobody is there any more."""
    if not writer.is_closing():
        writer.write(message(head, data))


async def serve(home: Path) -> None:
    """This host's Edge for `home`: one only, held by a lock that dies with the process."""
    lock = open(home / "edge.lock", "w")  # noqa: SIM115 - held as long as the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return
    edge = Edge(home)
    await edge.start()
    server = Server(edge, home / "edge.sock")
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.over.set)
    await server.run()
    lock.close()


def main() -> None:
    """`python -m dsec.edge.server [HOME]`."""
    home = Path(sys.argv[1]) if len(sys.argv) > 1 else default_home()
    asyncio.run(serve(home))


if __name__ == "__main__":
    main()
