"""The API server's routes for people, curl and other languages; `/` is the fleet page. The SDK's own two paths are
answered before them, in `dsec.api.wire`. Every answer of an error is the JSON of `dsec.errors.to_wire`."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse

from dsec.api.e2b import parts_of
from dsec.api.e2b import router as e2b
from dsec.api.metrics import metrics
from dsec.api.ports import Ports
from dsec.api.service import Service, new_key
from dsec.api.wire import Wire, token_of
from dsec.cluster.store import Key, Project
from dsec.errors import DsecError, Forbidden, InvalidRequest, NotFound, to_wire
from dsec.types import Spec

PAGE = Path(__file__).with_name("fleet.html")


async def user(request: Request) -> Key:
    """Whose key the request carries."""
    service: Service = request.app.state.service
    return await service.who(token_of(request.headers))


async def admin(request: Request) -> Key:
    known = await user(request)
    if not known.admin:
        raise Forbidden("that needs an administrator's key")
    return known


User = Annotated[Key, Depends(user)]
Admin = Annotated[Key, Depends(admin)]
Body = dict[str, Any]


def make_app(service: Service, ports: Ports | None = None) -> Wire:
    """The ASGI application around ``service`` and what forwards ports, if given; it starts and closes both."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        if ports is not None:
            await ports.start()
            service.ports = ports
        yield
        if ports is not None:
            await ports.close()
        await service.close()

    app = FastAPI(title="DSec", docs_url="/docs", redoc_url=None, lifespan=life)
    app.state.service = service
    app.include_router(e2b)

    @app.exception_handler(DsecError)
    async def wrong(request: Request, error: DsecError) -> JSONResponse:
        if request.url.path.startswith("/e2b/"):
            code = 401 if isinstance(error, Forbidden) else max(400, error.status)
            return JSONResponse({"code": code, "message": error.message}, code)
        return JSONResponse(to_wire(error), max(400, error.status))

    # Sandboxes as JSON

    @app.post("/v1/sandboxes", status_code=201)
    async def create(body: Body, request: Request, user: User, priority: int = 0, wait: float | None = None) -> Any:
        """The body is a `Spec`. The header Idempotency-Key makes it repeatable. A priority above 0 goes before others
        and may end them, so it needs an administrator's key."""
        if priority > 0 and not user.admin:
            raise Forbidden("a priority above 0 needs an administrator's key")
        if name := request.headers.get("idempotency-key"):
            body = body | {"idempotency_key": name}
        return (await service.create(user.project, Spec.from_dict(body), priority, wait=wait)).as_dict()

    @app.get("/v1/sandboxes")
    async def listed(user: User, state: str = "") -> Any:
        return {"sandboxes": await service.listing(user.project, None, state.split(",") if state else None)}

    @app.get("/v1/sandboxes/{id}")
    async def info(id: str, user: User) -> Any:
        return (await service.call(user.project, "info", {"id": id}))[0]

    @app.delete("/v1/sandboxes/{id}")
    async def kill(id: str, user: User) -> Any:
        return (await service.call(user.project, "kill", {"id": id}))[0]

    @app.post("/v1/sandboxes/{id}/exec")
    async def execute(id: str, body: Body, user: User) -> Response:
        """Runs {"command": text or list, ...}: one JSON object a line, {"stdout": text}, {"stderr": text}, and at
        last {"result": ...} or {"error": ...}."""
        await service.row(user.project, id)  # an unknown one is a plain 404, not a line in a stream

        async def events() -> AsyncIterator[str]:
            try:
                async for kind, data in service.stream(user.project, "commands.run", {**body, "id": id}):
                    value = json.loads(data) if kind == "result" else data.decode("utf-8", "replace")
                    yield json.dumps({kind: value}) + "\n"
            except DsecError as error:
                yield json.dumps(to_wire(error)) + "\n"

        return StreamingResponse(events(), media_type="application/x-ndjson")

    @app.get("/v1/sandboxes/{id}/files")
    async def read(id: str, path: str, user: User) -> Response:
        _, data = await service.call(user.project, "files.read", {"id": id, "path": path})
        return Response(data, media_type="application/octet-stream")

    @app.put("/v1/sandboxes/{id}/files")
    async def write(id: str, path: str, request: Request, user: User, mode: int = 0o644) -> Any:
        args = {"id": id, "path": path, "mode": mode}
        return (await service.call(user.project, "files.write", args, await request.body()))[0]

    @app.get("/v1/signed/{id}")
    async def signed_read(id: str, path: str, mac: str, until: str = "") -> Response:
        """A file, for whoever has the URL (`files.download_url`)."""
        data = await service.signed("GET", id, path, until, mac)
        return Response(data, media_type="application/octet-stream", headers={"content-disposition": "attachment"})

    @app.put("/v1/signed/{id}")
    @app.post("/v1/signed/{id}")
    async def signed_write(id: str, path: str, mac: str, request: Request, until: str = "") -> Any:
        """The same the other way (`files.upload_url`): the bytes as the body, or as a form's one file."""
        (_, data), *more = parts_of(request.headers.get("content-type", ""), await request.body())
        if more:
            raise InvalidRequest(f"a form of {len(more) + 1} files; the URL is one file's")
        await service.signed("PUT", id, path, until, mac, data)
        return {"path": path, "size": len(data)}

    @app.post("/v1/sandboxes/{id}/{op}")
    async def verb(id: str, op: str, user: User, body: Body | None = None) -> Any:
        """timeout, pause, resume, fork, snapshot, metrics and the operations of commands and files, as JSON."""
        args = dict(body or {})
        try:
            data = base64.b64decode(args.pop("data", ""), validate=True)
        except (binascii.Error, TypeError) as error:
            raise InvalidRequest(f"data is base64: {error}") from None
        op = {"timeout": "set_timeout"}.get(op, op)
        answer, out = await service.call(user.project, op, {**args, "id": id}, data)
        return answer | ({"data": base64.b64encode(out).decode()} if out else {})

    @app.delete("/v1/trajectories/{name:path}")
    async def forget(name: str, user: User) -> Any:
        """Deletes the log of a trajectory and the files kept for it."""
        return await service.delete_trajectory(user.project, name)

    # Projects and keys

    @app.get("/v1/projects")
    async def projects(user: Admin) -> Any:
        return {"projects": [asdict(each) for each in await service._read(service.store.projects)]}

    @app.put("/v1/projects/{name}")
    async def put_project(name: str, user: Admin, weight: float = 1.0, max_live: int = 1000) -> Any:
        if not name.replace("-", "").replace("_", "").isalnum() or not weight > 0 or max_live < 0:
            raise InvalidRequest(f"no project can be {name!r} with weight {weight} and {max_live} sandboxes")
        await service.put_project(Project(name, weight, max_live))
        return {"name": name, "weight": weight, "max_live": max_live}

    @app.post("/v1/projects/{name}/keys", status_code=201)
    async def put_key(name: str, user: Admin, label: str = "", admin: bool = False) -> Any:
        if name not in {each.name for each in await service._read(service.store.projects)}:
            raise NotFound(f"no project {name!r}")
        return {"key": await service._read(new_key, service.store, name, label, admin)}

    @app.delete("/v1/keys/{digest}")
    async def drop_key(digest: str, user: Admin) -> Any:
        return {"dropped": await service._read(service.store.drop_key, digest)}

    # Seeing

    @app.get("/metrics")
    async def prometheus(user: Admin) -> Response:
        """It names projects, so it needs an administrator's key (in Prometheus: authorization, credentials)."""
        return PlainTextResponse(await metrics(service), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> Response:
        well = await service.state()
        return JSONResponse({"ok": well}, 200 if well else 503)

    @app.get("/v1/fleet")
    async def fleet(user: Admin) -> Any:
        return await service.fleet()

    @app.get("/v1/fleet/{id}/steps")
    async def steps(id: str, user: Admin) -> Any:
        return {"steps": await service.steps(id)}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(), headers={"content-security-policy": "default-src 'self' 'unsafe-inline'"})

    return Wire(app, service)
