"""`dsec serve --tls-cert`: the API and ports of sandboxes over TLS, with a certificate made here."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Cluster
from typer.testing import CliRunner

from dsec.api.cli import app
from dsec.api.client import RemoteTransport
from dsec.api.ports import Ports
from dsec.cluster.link import Unreachable

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signed itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    make = [*words.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(make, check=True, capture_output=True)
    return cert, key


def test_ports_speak_tls_and_nothing_else(cluster: Cluster, pair: tuple[Path, Path]) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*pair)
    ports = Ports(cluster.service, tls=tls)
    cluster.run(ports.start())
    try:
        trusting = ssl.create_default_context(cafile=str(pair[0]))
        connection = http.client.HTTPSConnection("127.0.0.1", ports.port, context=trusting, timeout=20)
        connection.request("GET", "/8000-abc/", headers={"x-api-key": cluster.blue})
        answer = connection.getresponse()
        assert answer.status == 404 and b"NotFound" in answer.read()  # the store was asked: there is no such sandbox
        connection.close()
        plain = http.client.HTTPConnection("127.0.0.1", ports.port, timeout=20)
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.request("GET", "/8000-abc/")
            plain.getresponse()
        with pytest.raises(ssl.SSLCertVerificationError):  # whoever does not know the certificate says nothing
            http.client.HTTPSConnection("127.0.0.1", ports.port, timeout=20).request("GET", "/")
    finally:
        cluster.run(ports.close())


def test_the_sdk_over_tls(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = f"serve --no-edge --port {port} --ports -1 --home {tmp_path} --tls-cert {pair[0]} --tls-key {pair[1]}"
    command = [sys.executable, "-c", "from dsec.api.cli import app; app()", *serve.split()]
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 30
        while True:
            assert time.monotonic() < end and server.poll() is None, log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        match = re.search(r"dsec_\S+", log.read_text())
        assert match and f"https://127.0.0.1:{port}" in log.read_text()

        async def ask(url: str) -> dict[str, object]:
            remote = RemoteTransport(url, match[0])
            try:
                return (await remote.call("list", {}))[0]
            finally:
                await remote.close()

        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            asyncio.run(ask(f"https://127.0.0.1:{port}"))
        monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))  # whom Python's ssl trusts
        assert asyncio.run(ask(f"https://127.0.0.1:{port}")) == {"sandboxes": [], "next_token": None}
        with pytest.raises(Unreachable):
            asyncio.run(ask(f"http://127.0.0.1:{port}"))
    finally:
        server.terminate()
        server.wait(20)


def test_bad_certificates_are_one_clear_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for given, text in (
        (["--tls-key", str(pair[1])], "needs --tls-cert"),
        (["--tls-cert", str(pair[1])], "no certificate with its key"),
        (["--tls-cert", str(tmp_path / "none.pem")], "No such file"),
    ):
        result = CliRunner().invoke(app, ["serve", "--no-edge", "--home", str(tmp_path), *given])
        assert result.exit_code == 2 and text in " ".join(result.output.split())
