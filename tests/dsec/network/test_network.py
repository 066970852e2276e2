"""The network of real sandboxes, against servers on this host's loopback: the listed one is reached, nothing else."""

from __future__ import annotations

import http.client
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import Forbidden, SubstrateUnavailable
from tests.dsec.conftest import Host

BIG = b"0123456789abcdef" * (1 << 17)  # 2 MiB: eight windows


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = (
            BIG if self.path == "/big" else f"{self.path} {','.join(self.headers.get_all('Host') or ['None'])}".encode()
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        got = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(len(got)).encode())

    def log_message(self, *_: Any) -> None:
        return


class Listening:
    """A web server on this host that counts who came."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        cls = type("Server", (http.server.ThreadingHTTPServer,), {"address_family": family})
        self.came = 0
        self.server = cls((address, 0), Handler)
        verify = self.server.verify_request
        self.server.verify_request = lambda *args: (setattr(self, "came", self.came + 1), verify(*args))[1]
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def listed() -> Iterator[Listening]:
    one = Listening()
    yield one
    one.server.shutdown()


@pytest.fixture(scope="module")
def other() -> Iterator[Listening]:
    one = Listening()
    yield one
    one.server.shutdown()


FETCH = r"""
import os, sys, urllib.request
try:
    data = urllib.request.urlopen(sys.argv[1], sys.argv[2].encode() if len(sys.argv) > 2 else None, timeout=10).read()
    print(len(data), data[:80].decode())
except Exception as error:
    print("no:", error, getattr(error, "read", bytes)().decode())
"""
SOCKS = r"""
import socket, sys
s = socket.create_connection(("127.0.0.1", 3128), 10)
s.sendall(b"\x05\x01\x00"); assert s.recv(2) == b"\x05\x00"
host, port = sys.argv[1].encode(), int(sys.argv[2])
s.sendall(b"\x05\x01\x00\x03" + bytes([len(host)]) + host + port.to_bytes(2, "big"))
code = s.recv(10)[1]
print("code", code)
if not code:
    s.sendall(b"GET /socks HTTP/1.0\r\n\r\n")
    print(b"".join(iter(lambda: s.recv(4096), b"")).decode().splitlines()[-1])
"""


def python(box: Any, code: str, *args: object) -> str:
    if not Path("/usr/bin/python3").exists():
        pytest.skip("the host image has no python3: apt-get install python3-minimal")
    result = box.commands.run(["/usr/bin/python3", "-c", code, *map(str, args)], check=False, timeout=60)
    return str(result.stdout + result.stderr)


def test_only_what_is_listed_is_reached(host: Host, listed: Listening, other: Listening) -> None:
    with host.create(network=[f"127.0.0.1:{listed.port}", f"localhost:{listed.port}"], timeout=120) as box:
        env = dict(line.partition("=")[::2] for line in box.commands.run("env").stdout.splitlines())
        assert env["HTTPS_PROXY"] == "http://127.0.0.1:3128"
        # with the proxy on purpose: urllib would go to loopback itself
        fetch = FETCH.replace("import os", "import os; os.environ['no_proxy'] = ''; import os")
        came = other.came
        assert python(box, fetch, f"http://127.0.0.1:{listed.port}/x?y").startswith("2")
        assert f"/x?y 127.0.0.1:{listed.port}" in python(box, fetch, f"http://127.0.0.1:{listed.port}/x?y")
        assert f"/n localhost:{listed.port}" in python(box, fetch, f"http://localhost:{listed.port}/n")
        assert python(box, fetch, f"http://127.0.0.1:{listed.port}/big").startswith(str(len(BIG)))
        assert python(box, fetch, f"http://127.0.0.1:{listed.port}/", "x" * 100_000).endswith("100000\n")
        refused = python(box, fetch, f"http://127.0.0.1:{other.port}/")
        assert "403" in refused and "only its exact address" in refused
        for url in (f"http://localhost:{other.port}/", "http://169.254.169.254/latest/", "http://example.org/"):
            assert "no: HTTP Error 403" in python(box, fetch, url)
        assert "/socks None" in python(box, SOCKS, "127.0.0.1", listed.port)
        assert python(box, SOCKS, "127.0.0.1", other.port) == "code 2\n"
        assert python(box, SOCKS, "::ffff:127.0.0.1", other.port) == "code 2\n"
        assert python(box, SOCKS, "example.org", 80) == "code 2\n"
        # around the proxy there is nothing at all
        direct = "exec 3<>/dev/tcp/%s/%d && echo THROUGH"
        for address in ("127.0.0.1", "93.184.216.34", "169.254.169.254", "::1"):
            result = box.commands.run(["/bin/bash", "-c", direct % (address, other.port)], check=False, timeout=10)
            assert "THROUGH" not in result.stdout
        raw = "import socket\nfor f in (2, 10, 17):\n try: print('RAW', socket.socket(f, 3))\n except OSError: pass"
        assert python(box, raw) == ""
        udp = "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('8.8.8.8', 53))"
        assert "unreachable" in python(box, udp).lower()
        assert other.came == came, "the server that is not listed was reached"


def test_the_request_says_the_host_it_was_allowed_for(root_host: Host, listed: Listening) -> None:
    """A Host field of another name would reach what shares the address."""
    lie = r"""
import socket, sys
s = socket.create_connection(("127.0.0.1", 3128), 10)
lie = "Host: other.internal\r\nProxy-Authorization: x\r\n\r\n"
s.sendall(f"GET http://127.0.0.1:{sys.argv[1]}/h HTTP/1.1\r\n{lie}".encode())
print(b"".join(iter(lambda: s.recv(4096), b"")).decode().splitlines()[-1])
s = socket.create_connection(("127.0.0.1", 3128), 10)
s.sendall(b"nonsense\r\n\r\n"); print(s.recv(4096).split(b"\r\n")[0].decode())
s = socket.create_connection(("127.0.0.1", 3128), 10)
try:
    s.sendall(b"x" * 100000); print(s.recv(4096).split(b"\r\n")[0].decode())
except OSError as error:
    print(error)
"""
    with root_host.create(network=[f"127.0.0.1:{listed.port}"]) as box:
        lines = python(box, lie, listed.port).splitlines()
    assert lines[0] == f"/h 127.0.0.1:{listed.port}" and "400" in lines[1] and len(lines) == 3, lines


def test_many_connections_at_once_and_after_a_new_edge(make_host: Any, listed: Listening) -> None:
    crowd = r"""
import socket, sys, threading
port, good = int(sys.argv[1]), []
def one(n):
    s = socket.create_connection(("127.0.0.1", 3128), 20)
    s.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
    f = s.makefile("rb")
    assert b"200" in f.readline() and f.readline() == b"\r\n"
    s.sendall(b"GET /big HTTP/1.0\r\n\r\n")
    good.append(len(f.read().partition(b"\r\n\r\n")[2]))
threads = [threading.Thread(target=one, args=(n,)) for n in range(24)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(good), set(good))
"""
    host = make_host("root")
    box = host.create(network=[f"127.0.0.1:{listed.port}"], timeout=120)
    assert python(box, crowd, listed.port) == f"24 {{{len(BIG)}}}\n"
    host.kill()
    host.start()
    again = host.sync("connect", box.id)
    assert "/socks None" in python(again, SOCKS, "127.0.0.1", listed.port)
    again.kill()


SERVER = """
import http.server, os
class S(http.server.ThreadingHTTPServer): address_family = 10 if ":" in "%s" else 2
os.chdir("/srv"); S(("%s", 8000), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_ports_are_forwarded_where_the_policy_allows(host: Host, address: str) -> None:
    code = SERVER % (address, address)
    with host.create(network={"allow_in": [8000]}, timeout=120) as box:
        box.files.write("/srv/data", BIG)
        box.commands.run(["/usr/bin/python3", "-c", code], background=True, timeout=100)
        box.commands.run("until grep -q ':1F40 .* 0A ' /proc/net/tcp*; do sleep 0.02; done")
        name = box.get_host(8000)
        assert name == box.get_host(8000) and name.startswith("127.0.0.1:")
        for _ in range(3):
            connection = http.client.HTTPConnection(name, timeout=20)
            connection.request("GET", "/data")
            assert connection.getresponse().read() == BIG
            connection.close()
        with pytest.raises(Forbidden, match="allow_in"):
            box.get_host(8001)
        assert "HTTP_PROXY" not in box.commands.run("env").stdout, "a way in is no way out"
        assert box.commands.run(["/bin/bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/3128"], check=False).exit_code
    where = name.split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((where[0], int(where[1])), 5)


def test_a_sandbox_without_a_policy_has_neither(box: Any) -> None:
    with pytest.raises(Forbidden, match="allow_in"):
        box.get_host(80)
    assert box.commands.run(["/bin/bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/3128"], check=False).exit_code


def test_two_sandboxes_do_not_see_each_other(host: Host) -> None:
    with host.create(network={"allow_in": [8000]}) as one, host.create(allow_internet_access=True) as two:
        one.commands.run(["/usr/bin/python3", "-c", SERVER % ("0.0.0.0", "0.0.0.0")], background=True, timeout=60)
        name = one.get_host(8000)
        for address in (name, "127.0.0.1:8000"):
            fetch = FETCH.replace("import os", "import os; os.environ['no_proxy'] = ''; import os")
            assert "no: HTTP Error 403" in python(two, fetch, f"http://{address}/")


def test_a_policy_that_cannot_be_given_is_refused(root_host: Host) -> None:
    with pytest.raises(SubstrateUnavailable, match=r"a function has no network here; the policy example\.org"):
        root_host.create(substrate="function", network=["example.org"])
