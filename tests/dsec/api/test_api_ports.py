"""Ports of sandboxes through the API server, with a real server inside a real container."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Cluster
from websockets.sync.client import connect

from dsec.api import ports
from dsec.api.client import RemoteTransport
from dsec.api.ports import parse
from dsec.errors import Forbidden, InvalidRequest, SubstrateUnavailable
from dsec.sandbox import Sandbox

SERVER = r"""
import base64, hashlib, http.server, json, socketserver, threading, time
class Web(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.headers.get("Upgrade") == "websocket":
            key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            self.send_response(101)
            self.send_header("Upgrade", "websocket"); self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
            self.end_headers()
            while True:
                kind, size = self.rfile.read(2)
                mask, size = self.rfile.read(4), size & 127
                data = bytes(byte ^ mask[n % 4] for n, byte in enumerate(self.rfile.read(size)))
                self.wfile.write(bytes((kind, size)) + data)
                if kind & 15 == 8: self.close_connection = True; return
        if self.path == "/slow":
            self.send_response(200); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
            for word in (b"one", b"two"):
                self.wfile.write(b"3\r\n" + word + b"\r\n"); time.sleep(0.3)
            self.wfile.write(b"0\r\n\r\n")
            return
        body = json.dumps([self.path, dict(self.headers)]).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        left = size = int(self.headers["Content-Length"])
        while left: left -= len(self.rfile.read(min(left, 65536)))
        self.send_response(200); self.send_header("Content-Length", str(size)); self.end_headers()
        for _ in range(size // 65536): self.wfile.write(bytes(65536))
    def log_message(self, *_): pass
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"hello\n")
        for line in self.rfile: self.wfile.write(line[::-1])
        self.wfile.write(b"bye")
threading.Thread(target=socketserver.ThreadingTCPServer(("127.0.0.1", 9000), Echo).serve_forever).start()
http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Web).serve_forever()
"""


@pytest.fixture(scope="module")
def box(cluster: Cluster) -> Iterator[Any]:
    remote = RemoteTransport(cluster.url, cluster.blue)
    spec = {
        "substrate": "container",
        "timeout": 120,
        "memory": 128,
        "pids": 32,
        "network": {"allow_in": [8000, 9000, 9]},
    }
    with Sandbox.create(**spec, transport=remote) as made:
        made.commands.run(["/usr/bin/python3", "-c", SERVER], background=True, timeout=100)
        made.commands.run("until grep -q ':1F40 ' /proc/net/tcp; do sleep 0.02; done")
        yield made


def get(cluster: Cluster, path: str, **headers: str) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.service.ports.port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers.get("Content-Type", ""), json.loads(body) if body else None


def label(box: Any, port: int = 8000) -> str:
    return str(box.get_host(port).partition("/")[2])


def test_a_request_and_its_answer(cluster: Cluster, box: Any) -> None:
    host = box.get_host(8000)
    assert host.startswith(f"127.0.0.1:{cluster.service.ports.port}/8000-{box.id}-")
    status, _, (path, headers) = get(cluster, f"/{label(box)}/a/b?c=d", X="y", Authorization="Bearer theirs")
    assert (status, path) == (200, "/a/b?c=d") and headers["X"] == "y" and headers["Authorization"] == "Bearer theirs"
    assert headers["Host"] == "localhost:8000" and headers["X-Forwarded-Prefix"] == f"/{label(box)}"
    assert get(cluster, f"/{label(box)}?q")[2][0] == "/?q" and get(cluster, f"/{label(box)}")[2][0] == "/"


def test_a_name_below_the_servers_domain(cluster: Cluster, box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.service.ports, "domain", "boxes.test:8701")
    host = box.get_host(8000)
    assert host == f"8000-{box.id}-{cluster.service.ticket(box.id)}.boxes.test:8701" and len(host.split(".")[0]) <= 63
    status, _, (path, headers) = get(cluster, "/a/b", Host=host)
    assert (status, path, headers["X-Forwarded-Host"]) == (200, "/a/b", host)


def test_bodies_stream_both_ways(cluster: Cluster, box: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.service.ports.port, timeout=20)
    connection.request("GET", f"/{label(box)}/slow")
    answer = connection.getresponse()
    assert answer.read1(10) == b"one", "before the second word is said"
    assert answer.read() == b"two"
    size = 16 << 16
    connection.request("POST", f"/{label(box)}/", body=bytes(size))
    assert len(connection.getresponse().read()) == size


def test_websockets(cluster: Cluster, box: Any) -> None:
    with connect(f"ws://{box.get_host(8000)}/chat", open_timeout=20) as link:
        for text in ("one", "two" * 30):
            link.send(text)
            assert link.recv(20) == text


def test_any_protocol_by_connect_with_half_closed_ends(cluster: Cluster, box: Any) -> None:
    with socket.create_connection(("127.0.0.1", cluster.service.ports.port), 20) as link:
        link.sendall(f"CONNECT {label(box, 9000)}:9000 HTTP/1.1\r\n\r\nabc\n".encode())
        file = link.makefile("rb")
        assert b" 200 " in file.readline() and file.readline() == b"\r\n"
        assert file.readline() == b"hello\n" and file.read(4) == b"\ncba"
        link.shutdown(socket.SHUT_WR)
        assert file.read() == b"bye"


def test_who_may(cluster: Cluster, box: Any) -> None:
    good, plain = label(box), f"8000-{box.id}"
    assert get(cluster, f"/{plain}/", **{"x-api-key": cluster.blue})[0] == 200
    assert get(cluster, f"/{plain}/", **{"e2b-traffic-access-token": good[-24:]})[0] == 200
    for name, value in (("x-api-key", cluster.blue), ("e2b-traffic-access-token", good[-24:])):
        given = get(cluster, f"/{plain}/", **{name: value})[2][1]
        assert name not in {each.lower() for each in given}, "what it asks with stays here"
    kind = "application/vnd.dsec.error+json"
    refused = {
        f"/{plain}/": {},
        f"/{plain}": {"x-api-key": "wrong"},
        f"/{plain}-{'a' * 24}/": {"x-api-key": cluster.blue},
        f"/8000-{'0' * 32}-{good[-24:]}/": {},
        f"/8001-{box.id}-{good[-24:]}/": {},  # the policy has no such port
    }
    for path, headers in refused.items():
        status, given, error = get(cluster, path, **headers)
        assert (status, given, error["error"]) == (403, kind, "Forbidden"), path
    assert get(cluster, f"/{plain}/", **{"x-api-key": cluster.red})[0] == 404, "of another project"
    assert get(cluster, f"/9-{box.id}-{good[-24:]}/")[0] == 400, "nobody listens"
    for path in ("/", "/v1/sandboxes", "/8000-/", "/99999-ab/", "/8000-../x"):
        assert get(cluster, path)[0] == 400
    with pytest.raises(Forbidden, match="allow_in"):
        box.get_host(8001)
    with pytest.raises(InvalidRequest, match="a port is a number"):
        box.get_host("8000")


def test_a_server_without_ports_says_so(cluster: Cluster, box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.service, "ports", None)
    with pytest.raises(SubstrateUnavailable, match="forwards no ports"):
        box.get_host(8000)


def test_limits(cluster: Cluster, box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ("127.0.0.1", cluster.service.ports.port)
    with socket.create_connection(where, 20) as link:
        link.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * (ports.HEAD + 1))
        assert not link.makefile("rb").read(), "a head without an end"
    monkeypatch.setattr(ports, "SECONDS", 0.1)
    with socket.create_connection(where, 20) as link:
        link.sendall(b"GET / HT")
        assert link.recv(1) == b"", "nor one that takes too long"
    monkeypatch.setattr(ports, "SECONDS", 10.0)
    path = f"/{label(box)}/"
    monkeypatch.setattr(ports, "MOST", 0.5)
    assert get(cluster, path)[0] == 503
    monkeypatch.setattr(ports, "MOST", 0)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        get(cluster, path)


def test_a_killed_sandbox_ends_its_connections(cluster: Cluster) -> None:
    remote = RemoteTransport(cluster.url, cluster.blue)
    made = Sandbox.create(substrate="container", timeout=60, network=["in:9000"], transport=remote)
    made.commands.run(["/usr/bin/python3", "-c", SERVER], background=True)
    made.commands.run("until grep -q ':2328 ' /proc/net/tcp; do sleep 0.02; done")
    with socket.create_connection(("127.0.0.1", cluster.service.ports.port), 20) as link:
        link.sendall(f"CONNECT {label(made, 9000)}:1 HTTP/1.1\r\n\r\n".encode())
        file = link.makefile("rb")
        assert b" 200 " in file.readline() and file.readline() == b"\r\n" and file.readline() == b"hello\n"
        threading.Thread(target=made.kill).start()
        assert file.read() == b""


def test_a_head_cannot_hold_two_requests() -> None:
    for head in ("GET /\n HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nA: b\rC: d\r\n\r\n", "GET /\r\n\r\n"):
        with pytest.raises(InvalidRequest, match="no HTTP/1 request"):
            parse(head, "")
