"""The part of E2B's HTTP that its own Python SDK needs for sandboxes, commands and files.

    E2B_API_URL=http://SERVER/e2b  E2B_SANDBOX_URL=http://SERVER/e2b  E2B_API_KEY=<our key>

A template names an image ("base" is `host`). Commands speak Connect's JSON form: unary calls are plain JSON, streams
are envelopes of one flag byte, u32 length (big-endian), JSON. Not there: templates, volumes, logs, changing
the network.
"""

from __future__ import annotations

import base64
import email.parser
import email.policy
import json
import struct
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from math import ceil
from typing import Annotated, Any
from urllib.parse import parse_qsl, unquote

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from dsec.api.service import Service
from dsec.cluster.store import Key
from dsec.errors import DsecError, Forbidden, InvalidRequest, NotFound, Timeout
from dsec.parts import EVENTS
from dsec.types import EntryInfo, Spec

VERSION = "0.5.7"
"""The version of E2B's in-sandbox daemon that we look like: no newer feature is asked for."""
CODES = {400: "invalid_argument", 403: "permission_denied", 404: "not_found", 408: "deadline_exceeded",
         409: "already_exists", 429: "resource_exhausted", 503: "unavailable"}  # fmt: skip
SIGNALS = {"SIGNAL_SIGKILL": 9, "SIGNAL_SIGTERM": 15}
router = APIRouter(prefix="/e2b", include_in_schema=False)
Json = dict[str, Any]


async def user(request: Request) -> Key:
    """The API asks with X-API-Key, the sandbox's own endpoint with X-Access-Token: here the same key."""
    token = request.headers.get("x-api-key") or request.headers.get("x-access-token")
    if not token:
        raise Forbidden("no API key")
    service: Service = request.app.state.service
    return await service.who(token)


User = Annotated[Key, Depends(user)]


def serve(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Serve = Annotated[Service, Depends(serve)]


def outside(service: Service | None, id: str) -> Json:
    """How its ports are reached: PORT-ID.DOMAIN, with the token as a header."""
    if service is None or service.ports is None or not service.ports.domain:
        return {}
    return {"domain": service.ports.domain, "trafficAccessToken": service.ticket(id)}


def shown(info: Json, token: str = "", service: Service | None = None) -> Json:
    """Our record in E2B's words."""
    times = {
        name: datetime.fromtimestamp(min(info[key], 4e9), UTC).isoformat()
        for name, key in (("startedAt", "created"), ("endAt", "deadline"))
    }
    return {
        "sandboxID": info["id"], "templateID": info["image"], "alias": info["image"], "clientID": info["host"],
        "envdVersion": VERSION, "state": "paused" if info["state"] == "paused" else "running", "cpuCount": 1,
        "memoryMB": 1024, "diskSizeMB": 512, "metadata": info["metadata"], **times,
        **({"envdAccessToken": token} if token else {}), **outside(service, info["id"]),
    }  # fmt: skip


@router.post("/sandboxes", status_code=201)
@router.post("/v2/sandboxes", status_code=201)
async def create(body: Json, request: Request, key: User, service: Serve) -> Json:
    template = str(body.get("templateID") or "base")
    network = body.get("network") or {}
    image = "host" if template == "base" else template
    spec = Spec(
        image=f"snapshot:{image}" if image.startswith("snap-") else image,
        timeout=float(body.get("timeout") or 300),
        env=body.get("envVars") or {},
        metadata=body.get("metadata") or {},
        # E2B's clients say allow_internet_access=True when nobody asked; here only what is listed is opened
        network={  # type: ignore[arg-type]
            "allow_out": network.get("allowOut"),
            "deny_out": ["0.0.0.0/0"],
            "allow_in": ["*"] if service.ports is not None else [],  # as there; the token of its traffic is needed
        },
    )
    info = await service.create(key.project, spec)
    return shown(info.as_dict(), request.headers["x-api-key"], service)


@router.get("/sandboxes")
@router.get("/v2/sandboxes")
async def listing(
    request: Request, response: Response, key: User, service: Serve, metadata: str = "", limit: int | None = None,
    nextToken: str | None = None,
) -> list[Json]:  # fmt: skip
    wanted = {unquote(name): unquote(value) for name, value in parse_qsl(metadata)}
    states = [state for given in request.query_params.getlist("state") for state in given.split(",")] or None
    asked = {"metadata": wanted, "state": states, "limit": limit, "next_token": nextToken}
    found, _ = await service.call(key.project, "list", asked)
    if found["next_token"]:
        response.headers["x-next-token"] = found["next_token"]
    return [shown(info) for info in found["sandboxes"]]


@router.get("/sandboxes/{id}")
async def info(id: str, request: Request, key: User, service: Serve) -> Json:
    found, _ = await service.call(key.project, "info", {"id": id})
    return shown(found, request.headers["x-api-key"], service)


@router.get("/sandboxes/{id}/metrics")
async def metrics(id: str, key: User, service: Serve) -> list[Json]:
    """What it uses now: there is no history. cpuUsedPct is the mean since it was made."""
    found, _ = await service.call(key.project, "metrics", {"id": id})
    row = await service.row(key.project, id)
    now = time.time()
    spec = Spec.from_dict(dict(row.spec))
    return [{
        "timestamp": datetime.fromtimestamp(now, UTC).isoformat(), "timestampUnix": int(now),
        "cpuCount": ceil(spec.cpu),
        "cpuUsedPct": round(100 * found["cpu_seconds"] / max(now - row.created, 1e-3), 2),
        "memUsed": found["memory_bytes"], "memTotal": spec.memory << 20, "memCache": 0,
        "diskUsed": found["disk_bytes"], "diskTotal": spec.disk << 20,
    }]  # fmt: skip


@router.post("/sandboxes/{id}/snapshots", status_code=201)
async def snapshot(id: str, key: User, service: Serve) -> Json:
    found, _ = await service.call(key.project, "snapshot", {"id": id})
    return {"snapshotID": found["snapshot"], "names": []}


@router.delete("/templates/{name}", status_code=204)
async def drop_snapshot(name: str, key: User, service: Serve) -> None:
    """Snapshots only: images are the operator's."""
    await service.delete_snapshot(key.project, name)


@router.delete("/sandboxes/{id}", status_code=204)
async def kill(id: str, key: User, service: Serve) -> None:
    await service.call(key.project, "kill", {"id": id})


@router.post("/sandboxes/{id}/timeout", status_code=204)
async def set_timeout(id: str, body: Json, key: User, service: Serve) -> None:
    await service.call(key.project, "set_timeout", {"id": id, "timeout": body["timeout"]})


@router.post("/sandboxes/{id}/pause", status_code=204)
async def pause(id: str, key: User, service: Serve) -> Response:
    try:
        await service.call(key.project, "pause", {"id": id})
    except InvalidRequest as error:
        if not error.fields.get("paused"):
            raise
        return JSONResponse({"code": 409, "message": error.message}, 409)
    return Response(status_code=204)


@router.post("/sandboxes/{id}/connect")
@router.post("/v2/sandboxes/{id}/connect")
@router.post("/sandboxes/{id}/resume", status_code=201)
async def connect(id: str, request: Request, key: User, service: Serve) -> Json:
    """Resumes it if it was paused; a time given by E2B's client moves the deadline, as it does there."""
    body = json.loads(await request.body() or b"{}")
    found, _ = await service.call(key.project, "connect", {"id": id, "timeout": body.get("timeout")})
    return shown(found, request.headers["x-api-key"], service)


# Inside the sandbox


def sandbox_of(request: Request) -> str:
    return request.headers.get("e2b-sandbox-id") or ""


@router.get("/health", status_code=204)
async def health(request: Request, service: Serve) -> Response:
    return Response(status_code=204)


def username(request: Request) -> str | None:
    """E2B names whom a command runs as in a Basic header; its usual "user" is whatever the spec says."""
    given = request.headers.get("authorization", "")
    if not given.startswith("Basic "):
        return None
    return whom(base64.b64decode(given[6:]).decode().partition(":")[0])


def whom(name: str | None) -> str | None:
    return None if name in ("", "user") else name


def entry(found: Json) -> Json:
    """A file's record as Connect's JSON has it (64-bit numbers are text)."""
    one = EntryInfo(**found)
    kind = {"file": "FILE_TYPE_FILE", "dir": "FILE_TYPE_DIRECTORY", "link": "FILE_TYPE_SYMLINK"}
    when = datetime.fromtimestamp(one.mtime, UTC).isoformat().replace("+00:00", "Z")
    bits = "".join(letter if one.mode >> (8 - n) & 1 else "-" for n, letter in enumerate("rwxrwxrwx"))
    return {
        "name": one.name, "path": one.path, "type": kind.get(one.type, "FILE_TYPE_UNSPECIFIED"), "size": str(one.size),
        "mode": one.mode, "permissions": bits, "owner": str(one.uid), "group": str(one.gid), "modifiedTime": when,
    }  # fmt: skip


@router.get("/files")
async def read(path: str, request: Request, key: User, service: Serve, username: str | None = None) -> Response:
    args = {"id": sandbox_of(request), "path": rooted(path), "user": whom(username)}
    _, data = await service.call(key.project, "files.read", args)
    return Response(data, media_type="application/octet-stream")


@router.post("/files")
async def write(request: Request, key: User, service: Serve, path: str = "", username: str | None = None) -> list[Json]:
    """One file as the body, or several as a form."""
    found = parts_of(request.headers.get("content-type", ""), await request.body())
    files = [(path or name, data) for name, data in found]
    for name, data in files:
        args = {"id": sandbox_of(request), "path": rooted(name), "user": whom(username)}
        await service.call(key.project, "files.write", args, data)
    return [{"name": name.rpartition("/")[2], "path": rooted(name), "type": "file"} for name, _ in files]


def parts_of(kind: str, body: bytes) -> list[tuple[str, bytes]]:
    """Names and bytes of a form's files; a body that is no form is one without a name. Raises InvalidRequest."""
    if not kind.startswith("multipart/"):
        return [("", body)]
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    parts = parser.parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
    found = [(str(part.get_filename()), bytes(part.get_payload(decode=True))) for part in parts.iter_parts()]
    if not found:
        raise InvalidRequest("a form without files")
    return found


def rooted(path: str) -> str:
    return path if path.startswith("/") else f"/root/{path}"


@router.post("/filesystem.Filesystem/WatchDir")
async def watch_dir(request: Request, key: User, service: Serve) -> Response:
    body, limit = json.loads((await request.body())[5:] or b"{}"), request.headers.get("connect-timeout-ms")
    args = {
        "id": sandbox_of(request), "path": rooted(str(body.get("path", ""))), "recursive": bool(body.get("recursive")),
        "user": username(request), "timeout": int(limit) / 1000 if limit and int(limit) else None,
    }  # fmt: skip
    return StreamingResponse(changes(service, key.project, args), media_type="application/connect+json")


def change(line: bytes) -> Json:
    """A line of watch.h in E2B's words."""
    return {"name": line[2:].decode("utf-8", "replace"), "type": f"EVENT_TYPE_{EVENTS[chr(line[0])].upper()}"}


async def changes(service: Service, project: str, args: Json) -> AsyncIterator[bytes]:
    """What changes in a folder, as envelopes, until the client goes."""
    number, rest = None, b""
    follow = {"id": args["id"]}
    try:
        number = (await service.call(project, "files.watch", args))[0]["command"]
        yield envelope({"start": {}})
        async for kind, data in service.stream(project, "commands.connect", follow | {"command": number}):
            *lines, rest = (rest + data).split(b"\0") if kind == "stdout" else [rest]
            for line in lines:
                yield envelope({"filesystem": change(line)})
        yield envelope({}, last=True)
    except DsecError as error:
        yield envelope({"error": wrong(error)}, last=True)
    finally:
        if number is not None:  # not awaited: the client may have gone, and this task with it
            service.aside(service.call(project, "commands.kill", follow | {"command": number}))


@router.post("/filesystem.Filesystem/{method}")
async def filesystem(method: str, body: Json, request: Request, key: User, service: Serve) -> Response:
    box = {"id": sandbox_of(request), "user": username(request)}

    async def call(op: str, **args: Any) -> Json:
        return (await service.call(key.project, op, {**box, **args}))[0]

    try:
        path = rooted(str(body.get("path", "")))
        answer: Json = {}
        if method == "ListDir":
            answer = {"entries": [entry(each) for each in (await call("files.list", path=path))["entries"]]}
        elif method == "Remove":
            await call("files.remove", path=path)
        elif method == "CreateWatcher":  # E2B's synchronous client asks for events; its other one uses WatchDir
            watch = await call("files.watch", path=path, recursive=bool(body.get("recursive")))
            answer = {"watcherId": str(watch["command"])}
        elif method in ("GetWatcherEvents", "RemoveWatcher"):
            args = {"id": box["id"], "command": watcher(body.get("watcherId"))}
            if method == "RemoveWatcher":
                await service.call(key.project, "commands.kill", args)
            else:
                _, lines = await service.call(key.project, "files.watched", args)
                answer = {"events": [change(line) for line in lines.split(b"\0")[:-1]]}
        elif method in ("Stat", "MakeDir", "Move"):
            if method == "MakeDir" and not (await call("files.make_dir", path=path))["made"]:
                return JSONResponse({"code": "already_exists", "message": path}, 409)
            if method == "Move":
                source, path = rooted(str(body["source"])), rooted(str(body["destination"]))
                await call("files.rename", path=source, to=path)
            answer = {"entry": entry(await call("files.get_info", path=path))}
        else:
            return JSONResponse({"code": "unimplemented", "message": method}, 501)
        return JSONResponse(answer)
    except DsecError as error:
        return JSONResponse(wrong(error), error.status)


def watcher(text: Any) -> int:
    if not str(text).isdecimal():
        raise NotFound(f"no watcher {text!r:.100}")
    return int(text)


def wrong(error: DsecError) -> Json:
    """An error in Connect's words."""
    return {"code": CODES.get(error.status, "internal"), "message": error.message}


def envelope(value: Json, last: bool = False) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack(">BI", 2 if last else 0, len(text)) + text


@router.post("/process.Process/{method}")
async def process(method: str, request: Request, key: User, service: Serve) -> Response:
    raw, box = await request.body(), {"id": sandbox_of(request)}
    streamed = method in ("Start", "Connect")
    try:
        body = json.loads(raw[5:] if streamed else raw or b"{}")
    except ValueError as error:
        raise InvalidRequest(f"not JSON: {error}") from None
    if streamed:
        return StreamingResponse(
            events(service, key.project, box["id"], method, body, request), media_type="application/connect+json"
        )
    try:
        answer: Json = {}
        if method == "List":
            listed, _ = await service.call(key.project, "commands.list", box)
            answer = {
                "processes": [
                    {
                        "pid": each["id"],
                        "config": {"cmd": "/bin/bash", "args": ["-l", "-c", each["command"]], "envs": {}},
                    }
                    for each in listed["commands"]
                    if each["exit_code"] is None
                ]
            }
        elif method == "SendSignal":
            number = SIGNALS.get(str(body.get("signal")), 15)
            done, _ = await service.call(key.project, "commands.kill", {**box, "command": pid(body), "signal": number})
            if not done["killed"]:
                raise NotFound("it has ended")
        elif method in ("SendInput", "CloseStdin"):
            data = base64.b64decode(next(iter(body.get("input", {}).values()), ""))
            args = {**box, "command": pid(body), "close": method == "CloseStdin"}
            await service.call(key.project, "commands.send_stdin", args, data)
        else:
            return JSONResponse({"code": "unimplemented", "message": method}, 501)
        return JSONResponse(answer)
    except DsecError as error:
        return JSONResponse(wrong(error), error.status)


def pid(body: Json) -> int:
    selector = body.get("process", {})
    if "pid" not in selector:
        raise InvalidRequest("processes are named by pid")
    return int(selector["pid"])


async def events(
    service: Service, project: str, id: str, method: str, body: Json, request: Request
) -> AsyncIterator[bytes]:
    """A command's events as envelopes: start, data, end."""
    try:
        if method == "Start":
            asked, limit = body["process"], request.headers.get("connect-timeout-ms")
            started, _ = await service.call(project, "commands.start", {
                "id": id, "command": [asked["cmd"], *asked.get("args", [])], "env": asked.get("envs") or None,
                "cwd": asked.get("cwd"), "user": username(request), "stdin": bool(body.get("stdin")),
                "timeout": int(limit) / 1000 if limit and int(limit) else None,
            })  # fmt: skip
            number = started["command"]
        else:
            number = pid(body)
        yield envelope({"event": {"start": {"pid": number}}})
        async for kind, data in service.stream(project, "commands.connect", {"id": id, "command": number}):
            if kind == "result":
                code = json.loads(data)["exit_code"]
                yield envelope({"event": {"end": {"exitCode": code, "exited": True, "status": f"exit status {code}"}}})
            else:
                yield envelope({"event": {"data": {kind: base64.b64encode(data).decode()}}})
        yield envelope({}, last=True)
    except Timeout as error:
        yield envelope({"error": {"code": "deadline_exceeded", "message": error.message}}, last=True)
    except DsecError as error:
        yield envelope({"error": wrong(error)}, last=True)
