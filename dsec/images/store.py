"""Where images live for all hosts: a folder (any POSIX mount: NFS, 3FS) or an S3-compatible server. Keys are paths.

chunks/aa/<sha256>   256 KiB of a layer, stored once however many layers hold it
layers/<sha256>.json the list of a layer's chunks; its name is the digest of what it says
images/<name>.json   which layers an image is made of
traces/<sha256>.json in which order a layer's chunks were asked for when it was first started
traces/<sha256>.guess the same, told from what is in the layer when it was packed
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qs, quote, urlsplit
from xml.etree import ElementTree

from dsec.errors import ImageError, NotFound

if TYPE_CHECKING:
    import httpx

TIMEOUT = 30.0  # seconds an S3 request may take
TRIES = 4


class Store(Protocol):
    """Whole objects by key. `get` raises NotFound; anything else that goes wrong is an OSError or ImageError."""

    def get(self, key: str) -> bytes: ...
    def put(self, key: str, data: bytes) -> None: ...
    def has(self, key: str) -> bool: ...
    def list(self, prefix: str) -> Iterable[str]: ...
    def delete(self, key: str) -> None: ...


def open_store(url: str) -> Store:
    """A path, or s3://bucket/prefix?endpoint=http://host:port&region=... (keys: AWS_ACCESS_KEY_ID and _SECRET_...)."""
    if not url.startswith("s3://"):
        return FolderStore(Path(url.removeprefix("file://")).expanduser())
    parts = urlsplit(url)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if unknown := options.keys() - {"endpoint", "region"}:
        raise ImageError(f"{url}: unknown options {sorted(unknown)}; endpoint and region are known")
    try:
        key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    except KeyError as missing:
        raise ImageError(f"{url} needs {missing} in the environment") from None
    region = options.get("region", os.environ.get("AWS_REGION", "us-east-1"))
    endpoint = options.get("endpoint", f"https://s3.{region}.amazonaws.com")
    return S3Store(endpoint, parts.netloc, parts.path.strip("/"), region, key, secret)


class FolderStore:
    """Files under one folder. An object is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> bytes:
        try:
            return (self.folder / key).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"{key} is not in {self.folder}") from None

    def put(self, key: str, data: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.rename(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def has(self, key: str) -> bool:
        return (self.folder / key).exists()

    def list(self, prefix: str) -> Iterable[str]:
        for path in sorted((self.folder / prefix).rglob("*")):
            if path.is_file() and not path.name.startswith(".new-"):
                yield str(path.relative_to(self.folder))

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / key).unlink()


class S3Store:
    """Path-style requests signed with AWS Signature Version 4 (its documentation's four steps, in `_request`)."""

    def __init__(self, endpoint: str, bucket: str, prefix: str, region: str, key: str, secret: str) -> None:
        import httpx  # here: a store in a folder does not need it

        self.host, self.base = urlsplit(endpoint).netloc, endpoint.rstrip("/")
        self.bucket, self.prefix, self.region, self.key, self.secret = bucket, prefix, region, key, secret
        self.unreachable = httpx.TransportError
        self.client = httpx.Client(timeout=TIMEOUT, limits=httpx.Limits(max_connections=32))

    def get(self, key: str) -> bytes:
        answer = self._request("GET", self._path(key))
        if answer.status_code == 404:
            raise NotFound(f"{key} is not in s3://{self.bucket}/{self.prefix}")
        return self._checked(answer, key).content

    def put(self, key: str, data: bytes) -> None:
        self._checked(self._request("PUT", self._path(key), data), key)

    def has(self, key: str) -> bool:
        answer = self._request("HEAD", self._path(key))
        return answer.status_code != 404 and bool(self._checked(answer, key))

    def list(self, prefix: str) -> Iterable[str]:
        token = None
        while True:
            query = {"list-type": "2", "prefix": f"{self.prefix}/{prefix}".lstrip("/")}
            query |= {"continuation-token": token} if token else {}
            answer = self._checked(self._request("GET", f"/{self.bucket}", query=query), prefix)
            tree = ElementTree.fromstring(answer.content)
            for element in tree.iterfind("{*}Contents/{*}Key"):
                yield (element.text or "").removeprefix(f"{self.prefix}/")
            token = tree.findtext("{*}NextContinuationToken")
            if not token:
                return

    def delete(self, key: str) -> None:
        answer = self._request("DELETE", self._path(key))
        if answer.status_code != 404:
            self._checked(answer, key)

    def _path(self, key: str) -> str:
        return "/" + "/".join(part for part in (self.bucket, self.prefix, key) if part)

    def _checked(self, answer: httpx.Response, key: str) -> httpx.Response:
        if answer.is_success:
            return answer
        raise ImageError(f"{answer.request.method} {key}: the store answered {answer.status_code} {answer.text[:200]}")

    def _request(
        self, method: str, path: str, data: bytes = b"", query: dict[str, str] | None = None
    ) -> httpx.Response:
        """One signed request, repeated with growing pauses while the server is unreachable or answers 5xx."""
        for attempt in range(TRIES):
            try:
                answer = self._signed(method, path, data, query or {})
                if answer.status_code < 500 or attempt == TRIES - 1:
                    return answer
            except self.unreachable as problem:
                if attempt == TRIES - 1:
                    raise ImageError(
                        f"{method} {path}: the store at {self.base} does not answer: {problem}"
                    ) from problem
            time.sleep(0.1 * 4**attempt)
        raise AssertionError

    def _signed(self, method: str, path: str, data: bytes, query: dict[str, str]) -> httpx.Response:
        now = datetime.now(UTC)
        stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
        payload = hashlib.sha256(data).hexdigest()
        target = quote(path, safe="/-_.~")
        asked = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items()))
        headers = {"host": self.host, "x-amz-content-sha256": payload, "x-amz-date": stamp}
        names = ";".join(headers)
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        request = "\n".join((method, target, asked, lines, names, payload))
        scope = f"{day}/{self.region}/s3/aws4_request"
        text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()))
        key = f"AWS4{self.secret}".encode()
        for part in (day, self.region, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        credential = f"Credential={self.key}/{scope}, SignedHeaders={names}, Signature={signature}"
        headers["authorization"] = f"AWS4-HMAC-SHA256 {credential}"
        url = f"{self.base}{target}" + (f"?{asked}" if asked else "")
        return self.client.request(method, url, content=data, headers=headers)
