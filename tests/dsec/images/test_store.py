"""Stores: a folder, and a real S3-compatible server that checks every signature."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dsec.errors import ImageError, NotFound
from dsec.images.layers import Images
from dsec.images.manifest import chunk_key, fetch_chunk
from dsec.images.store import FolderStore, Store, open_store


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    endpoint = request.getfixturevalue("server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-tests")
    bucket = f"b{time.monotonic_ns()}"
    made = open_store(f"s3://{bucket}/some/prefix?endpoint={endpoint}")
    made._request("PUT", f"/{bucket}")  # type: ignore[attr-defined]
    return made


def test_objects_come_back_whole(store: Store) -> None:
    with pytest.raises(NotFound):
        store.get("chunks/aa/none")
    assert not store.has("chunks/aa/none")
    data = os.urandom(300_000)
    store.put("chunks/aa/one", data)
    store.put("images/a b+c~é.json", b"")  # names that signatures get wrong
    assert store.get("chunks/aa/one") == data and store.has("chunks/aa/one")
    assert store.get("images/a b+c~é.json") == b""
    store.put("chunks/aa/one", b"again")
    assert store.get("chunks/aa/one") == b"again"
    assert list(store.list("chunks")) == ["chunks/aa/one"]
    store.delete("chunks/aa/one")
    store.delete("chunks/aa/one")
    assert list(store.list("chunks")) == []


def test_a_wrong_secret_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ImageError, match="403"):
        open_store(f"s3://bucket/p?endpoint={server}").put("x", b"y")


def test_a_server_that_is_away_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr("dsec.images.store.TRIES", 2)
    with pytest.raises(ImageError, match="does not answer"):
        open_store("s3://b/p?endpoint=http://127.0.0.1:9").get("x")
    with pytest.raises(ImageError, match="unknown options"):
        open_store("s3://b/p?endpont=http://127.0.0.1:9")


@pytest.mark.usefixtures("mountable")
def test_an_image_goes_to_another_host(store: Store, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    data = os.urandom(1 << 20)
    (root / "one").write_bytes(data)
    (root / "zeros").write_bytes(bytes(2 << 20))
    here, there = Images(tmp_path / "here", "unused"), Images(tmp_path / "there", "unused")
    here._store = there._store = store
    image = here.add("mine", root)
    assert here.push("mine") < image.layers[0][2], "chunks that repeat are sent once"
    assert here.push("mine") == 0
    assert there.pull("mine") == image and there.verify("mine") == []
    (mounted,) = there.mount("mine")
    assert (mounted / "one").read_bytes() == data
    # A forged list or chunk is noticed.
    layer = there.layer(image.layers[0][1])
    store.put(chunk_key(layer.chunks[0]), b"forged")
    with pytest.raises(ImageError, match="corrupt"):
        fetch_chunk(store, layer.chunks[0])
    third = Images(tmp_path / "third", "unused")
    third._store = store
    store.put(f"layers/{layer.digest}.json", layer.encode() + b" ")
    with pytest.raises(ImageError, match="another digest"):
        third.pull("mine")


@pytest.mark.usefixtures("mountable")
def test_a_layer_is_loaded_on_demand_from_s3(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-tests")
    url = f"s3://lazy{time.monotonic_ns()}/images?endpoint={server}"
    root = tmp_path / "root"
    root.mkdir()
    for i in range(8):
        (root / f"f{i}").write_bytes(os.urandom(400_000))
    here, there = Images(tmp_path / "here", url), Images(tmp_path / "there", url)
    here.store._request("PUT", "/" + url.split("/")[2])  # type: ignore[attr-defined]
    digest = here.add("mine", root).layers[0][1]
    here.push("mine")
    (mounted,) = there.mount("mine")
    assert not there.present(digest)
    assert (mounted / "f3").read_bytes() == (root / "f3").read_bytes()
