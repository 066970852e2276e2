"""The SDK's way in: POST /v1/ops/OP and /v1/streams/OP, with bodies as on the Edge's socket.

Straight on ASGI, outside the application with its middleware, routing, dependencies and validation: a warm sandbox's
command takes 2 ms and would wait half as long again for them. Who may do what is `Service`'s to say, as everywhere.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dsec.api.service import Service
from dsec.cluster.link import decode, encode
from dsec.errors import DsecError, Forbidden, InvalidRequest, to_wire

MAX_BODY = 1 << 29
OPS, STREAMS = "/v1/ops/", "/v1/streams/"
KIND = "application/x-dsec"


def token_of(headers: Mapping[str, str]) -> str:
    """X-API-Key, or Authorization: Bearer."""
    given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    if not given:
        raise Forbidden("no API key: send it as X-API-Key")
    return given


class Wire:
    """Answers the SDK's requests; hands all others on."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith((OPS, STREAMS)):
            await self._app(scope, receive, send)
            return
        try:
            if scope["method"] != "POST":
                raise InvalidRequest(f"{path} takes POST")
            headers = Headers(scope=scope)
            user = await self._service.who(token_of(headers))
            args, data = await _message(headers, receive)
            if path.startswith(STREAMS):
                args |= {"input": data} if data else {}
                events = self._events(user.project, path[len(STREAMS) :], args)
                await StreamingResponse(events, media_type=KIND)(scope, receive, send)
                return
            status, kind = 200, KIND
            body = encode(*await self._service.call(user.project, path[len(OPS) :], args, data))
        except DsecError as error:
            status, kind, body = max(400, error.status), "application/json", json.dumps(to_wire(error)).encode()
        about = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": about})
        await send({"type": "http.response.body", "body": body})

    async def _events(self, project: str, op: str, args: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            async for kind, data in self._service.stream(project, op, args):
                yield encode({"event": kind}, data)
        except DsecError as error:
            yield encode({"error": to_wire(error)})


async def _message(headers: Headers, receive: Receive) -> tuple[dict[str, Any], bytes]:
    told = headers.get("content-length", "0")
    parts, got, more = [], 0, True
    while more:
        if max(got, int(told) if told.isdecimal() else 0) > MAX_BODY:
            raise InvalidRequest(f"a body has at most {MAX_BODY} bytes")
        event = await receive()
        if event["type"] == "http.disconnect":
            raise InvalidRequest("the client went away")
        parts.append(event.get("body", b""))
        got, more = got + len(parts[-1]), event.get("more_body", False)
    try:
        args, data = decode(b"".join(parts))
    except ValueError as error:
        raise InvalidRequest(f"not a message: {error}") from None
    if not isinstance(args, dict):
        raise InvalidRequest("arguments are a JSON object")
    return args, data
