"""The web application: routes, keys, headers, errors. Everything about the answer itself is in `chat`."""

from __future__ import annotations

import asyncio
import json
import secrets
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4.server.chat import Reply, Service
from dsv4.server.chunks import Chunk, assemble
from dsv4.text import RequestError

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = {  # the page talks to its own server and to nobody else
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
}
LARGEST_BODY = 48 * 2**20
T = TypeVar("T")


class ApiError(Exception):
    """An error with its HTTP status, DeepSeek's `type` and `code`."""

    def __init__(self, status: int, message: str, type: str, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": None, "code": code}}


def create_app(service: Service, api_key: str | None = None, keep_alive: float = 10.0, clients: int = 64) -> FastAPI:
    """The application for uvicorn or any ASGI server.

    api_key     when given, requests must carry it as `Authorization: Bearer`.
    keep_alive  seconds of silence after which a waiting client gets a comment (stream) or an empty line (no stream).
    clients     answers that may be in the making at once; one more gets status 429.
    """
    app = FastAPI(title="dsv4", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
    )
    app.add_middleware(TraceId)
    places = asyncio.Semaphore(clients)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if api_key is not None and not secrets.compare_digest(given.encode(), api_key.encode()):
            message = f"Authentication Fails, Your api key: ****{given[-4:]} is invalid"
            raise ApiError(401, message, "authentication_error")

    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse(service.list_models())

    async def chat_completions(request: Request) -> Response:
        check_key(request)
        body = await read_json(request)
        # Long prompts take a while to render; the event loop has other clients.
        reply = await asyncio.to_thread(Reply, service, body)
        if places.locked():
            raise ApiError(429, f"Too many requests: {clients} answers are in the making already", "rate_limit_error")
        chunks = with_place(places, reply.chunks())
        if body.get("stream"):
            return StreamingResponse(event_stream(chunks, keep_alive), media_type="text/event-stream")
        return await whole(request, chunks, keep_alive)

    for base in ("", "/v1", "/beta"):
        app.add_api_route(f"{base}/models", models, methods=["GET"], response_model=None)
        app.add_api_route(f"{base}/chat/completions", chat_completions, methods=["POST"], response_model=None)

    @app.get("/", response_model=None)
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html", headers={"Cache-Control": "no-cache", **PAGE_POLICY})

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return error_response(ApiError(400, str(error), "invalid_request_error"))

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail} ({request.method} {request.url.path})"
        return error_response(ApiError(error.status_code, message, "invalid_request_error"))

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> Response:
        # This handler stands outside the middleware, so the headers are its own affair.
        headers = {"x-ds-trace-id": uuid.uuid4().hex, "access-control-allow-origin": "*"}
        return JSONResponse(internal(error).body, 500, headers)

    return app


def internal(error: Exception) -> ApiError:
    """What the client is told of a fault of ours; the log has the traceback."""
    return ApiError(500, f"Internal server error ({type(error).__name__})", "internal_error", "internal_error")


def error_response(error: ApiError) -> Response:
    # ASCII, because a message may quote what a client sent, and that may be no valid Unicode.
    return Response(json.dumps(error.body), error.status, media_type="application/json")


async def read_json(request: Request) -> Any:
    """The request's body. Raises `RequestError` with the place of the first syntax error."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > LARGEST_BODY:
            raise ApiError(413, f"The request body exceeds {LARGEST_BODY} bytes", "invalid_request_error")
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise RequestError(f"Failed to parse the request body as JSON: {error.msg} at {place}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"Failed to parse the request body as JSON: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise RequestError("Failed to parse the request body as JSON: nested too deeply") from None


async def with_place(places: asyncio.Semaphore, chunks: AsyncIterator[T]) -> AsyncIterator[T]:
    """The same items, holding a place while they come."""
    async with places:
        async for chunk in chunks:
            yield chunk


async def with_pauses(items: AsyncIterator[T], seconds: float) -> AsyncIterator[T | None]:
    """The same items, and None whenever `seconds` pass without one."""
    pending = asyncio.ensure_future(anext(items, None))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=seconds)
            if not done:
                yield None
                continue
            item = pending.result()
            if item is None:
                return
            yield item
            pending = asyncio.ensure_future(anext(items, None))
    finally:
        pending.cancel()


async def event_stream(chunks: AsyncIterator[Chunk], keep_alive: float) -> AsyncIterator[str]:
    """Server-sent events; [DONE] only after a complete answer."""
    try:
        async for chunk in with_pauses(chunks, keep_alive):
            yield ": keep-alive\n\n" if chunk is None else f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except Exception as error:
        yield f"data: {json.dumps(internal(error).body)}\n\n"
        raise
    yield "data: [DONE]\n\n"


async def whole(request: Request, chunks: AsyncIterator[Chunk], keep_alive: float) -> Response:
    """The answer in one piece. If it takes long, empty lines precede it, so that no proxy gives up."""

    async def collect() -> Chunk:
        return assemble([chunk async for chunk in chunks])

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(left())
    try:
        await asyncio.wait({answer, gone}, timeout=keep_alive, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return JSONResponse(answer.result())
        if gone.done():
            answer.cancel()
            return Response(status_code=499)
    finally:
        gone.cancel()

    async def lines() -> AsyncIterator[str]:
        try:
            while not answer.done():
                yield "\n"
                await asyncio.wait({answer}, timeout=keep_alive)
            yield json.dumps(answer.result(), ensure_ascii=False)
        finally:
            answer.cancel()

    return StreamingResponse(lines(), media_type="application/json")


class TraceId:
    """Gives every response an `x-ds-trace-id`. (Plain ASGI: a wrapped response would hide the client's leaving.)"""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-ds-trace-id", uuid.uuid4().hex.encode())]
            await send(message)

        await self.app(scope, receive, stamped)
