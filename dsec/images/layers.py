"""Images on one host: what they are made of, where their layers lie, and the folders an overlay is stacked from.

    images/<name>.json      the image: its layers, base first, and its config
    layers/<digest>.json    a layer's chunks
    layers/<digest>.erofs   a layer that is here in whole
    layers/<digest>.trace   which chunks its first start asked for, in order
    layers/<digest>.guess   which it will ask for, as far as can be told from what is in it
    lazy/<digest>/          one that is being fetched (see lazy.py)
    mounts/<digest>/        where it is mounted, shared by all sandboxes of the host

A layer is named by the digest of its list of chunks. Base, workspace and toolkit are layers of their own: a new
workspace costs its own size, and images that share a base share its file, its mount and its page cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from dsec.errors import ImageError, NotFound
from dsec.images import erofs
from dsec.images.diff import copy_upper
from dsec.images.guess import guess
from dsec.images.manifest import NAME, Image, Layer, Role, chunk_key, distinct, fetch_chunk, start_chunks
from dsec.images.store import Store, open_store
from dsec.images.unpack import Limits, OciLayout, unpack_tar

Say = Callable[[str], None]


class Images:
    """The images of one host. `store` (default: DSEC_STORE) is where other hosts' images come from and ours go to."""

    def __init__(self, home: Path, store: str | None = None) -> None:
        self.folder = home / "images"
        for name in ("images", "layers", "lazy", "mounts", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.url = store or os.environ.get("DSEC_STORE")
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """ImageError if there is none."""
        if self._store is None:
            if not self.url:
                raise ImageError("no image store: set DSEC_STORE to a folder or s3://bucket/prefix, or give --store")
            self._store = open_store(self.url)
        return self._store

    # Making

    def add(
        self,
        name: str,
        source: Path,
        base: str | None = None,
        role: Role | None = None,
        compress: str | None = None,
        limits: Limits | None = None,
        config: dict[str, Any] | None = None,
    ) -> Image:
        """Builds an image from a root folder, a tar or an OCI layout; on top of the layers of `base` if given."""
        below = self.get(base) if base else None
        config = {**(below.config if below else {}), **(config or {})}
        if source.is_dir() and (source / "oci-layout").exists():
            oci = OciLayout(source, limits)
            manifest = oci.manifest()
            files = list(oci.layers(manifest))
            made = [
                self._layer_of_tar(path, limits, index > 0 or base is not None, compress)
                for index, path in enumerate(files)
            ]
            config |= oci.config(manifest)
        elif source.is_dir():
            made = [self._layer(source, compress)]
        elif source.is_file():
            made = [self._layer_of_tar(source, limits, base is not None, compress)]
        else:
            raise ImageError(f"{source} is neither a folder, a tar nor an OCI layout")
        role = role or ("workspace" if below else "base")
        layers = (*(below.layers if below else ()), *((role, layer.digest, layer.size) for layer in made))
        return self._save(Image(name, layers, config))

    def pack_diff(self, name: str, base: str, upper: Path, role: Role = "workspace", shift: int = 0) -> Image:
        """Makes what a sandbox changed (the upper folder of its overlay) a layer on top of its image.

        `shift` is taken off every owner: a sandbox's root is nobody outside. The sandbox should be frozen.
        """
        below = self.get(base)
        with self._scratch() as scratch:
            copy_upper(upper, scratch / "root", shift)
            layer = self._layer(scratch / "root", None)
        return self._save(Image(name, (*below.layers, (role, layer.digest, layer.size)), below.config))

    def _layer_of_tar(self, path: Path, limits: Limits | None, whiteouts: bool, compress: str | None) -> Layer:
        with self._scratch() as scratch, open(path, "rb") as file:
            (scratch / "root").mkdir(mode=0o755)
            unpack_tar(file, scratch / "root", limits, whiteouts)
            return self._layer(scratch / "root", compress)

    def _layer(self, root: Path, compress: str | None) -> Layer:
        with self._scratch() as scratch:
            erofs.pack(root, scratch / "layer.erofs", compress)
            layer = Layer.of(scratch / "layer.erofs")
            self._write(f"layers/{layer.digest}.json", layer.encode())
            guessed = guess(root, scratch / "layer.erofs", layer, start_chunks(layer))
            self._write(f"layers/{layer.digest}.guess", json.dumps(guessed).encode())
            os.rename(scratch / "layer.erofs", self.file(layer.digest))
        return layer

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="build-", dir=self.folder) as name:
            yield Path(name)

    def _save(self, image: Image) -> Image:
        if not NAME.fullmatch(image.name):
            raise ImageError(f"{image.name!r} is no image name: lower case, digits, '.', '_', '-', up to four parts")
        self._write(f"images/{image.name}.json", image.encode())
        return image

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}.new")
        new.write_bytes(data)
        os.rename(new, path)

    # Looking

    def names(self) -> list[str]:
        folder = self.folder / "images"
        return sorted(str(path.relative_to(folder)).removesuffix(".json") for path in folder.rglob("*.json"))

    def get(self, name: str) -> Image:
        """The image of that name here, else in the store (its lists are fetched, not its data); NotFound."""
        if not NAME.fullmatch(name):
            raise ImageError(f"{name!r} is no image name")
        path = self.folder / "images" / f"{name}.json"
        if path.exists():
            return Image.decode(path.read_bytes())
        if not self.url:
            raise NotFound(f"no image {name!r} (`dsec image list` shows what there is)")
        image = Image.decode(self.store.get(f"images/{name}.json"))
        return self._save(image)

    def layer(self, digest: str) -> Layer:
        path = self.folder / "layers" / f"{digest}.json"
        if not path.exists():
            layer = Layer.decode(self.store.get(f"layers/{digest}.json"), digest)
            self._write(f"layers/{digest}.json", layer.encode())
        return Layer.decode(path.read_bytes(), digest)

    def file(self, digest: str) -> Path:
        """Where a layer's EROFS file lies when it is here in whole."""
        return self.folder / "layers" / f"{digest}.erofs"

    def present(self, digest: str) -> bool:
        return self.file(digest).exists()

    # Moving

    def push(self, name: str, say: Say = lambda line: None) -> int:
        """Puts an image into the store; returns the bytes that were not there already."""
        image, sent = self.get(name), 0
        for _, digest, size in image.layers:
            if self.store.has(f"layers/{digest}.json"):
                say(f"{digest[:12]} is there")
                continue
            layer = self.layer(digest)
            with open(self.file(digest), "rb") as file, ThreadPoolExecutor(8) as workers:
                push = partial(self._push_chunk, file.fileno(), layer)
                sent += sum(workers.map(push, distinct(layer)))
            self.store.put(f"layers/{digest}.json", layer.encode())  # last: who sees the list finds the chunks
            for suffix, kind in (("json", "trace"), ("guess", "guess")):
                if (path := self.folder / "layers" / f"{digest}.{kind}").exists():
                    self.store.put(f"traces/{digest}.{suffix}", path.read_bytes())
            say(f"{digest[:12]} {size >> 10} KiB")
        self.store.put(f"images/{name}.json", image.encode())
        return sent

    def _push_chunk(self, fd: int, layer: Layer, chunk: tuple[int, str]) -> int:
        index, digest = chunk
        key = chunk_key(digest)
        if self.store.has(key):
            return 0
        data = os.pread(fd, layer.chunk, index * layer.chunk)
        self.store.put(key, data)
        return len(data)

    def trace(self, digest: str) -> bytes | None:
        """The recorded order of a layer's first start, as stored; None if nothing was recorded."""
        path = self.folder / "layers" / f"{digest}.trace"
        return path.read_bytes() if path.exists() else None

    def pull(self, name: str, say: Say = lambda line: None) -> Image:
        """Fetches an image in whole, every chunk checked against its digest."""
        image = self.get(name)
        for _, digest, size in image.layers:
            if not self.present(digest):
                layer = self.layer(digest)
                with self._scratch() as scratch:
                    with open(scratch / "layer", "wb") as file, ThreadPoolExecutor(8) as workers:
                        for data in workers.map(lambda chunk: fetch_chunk(self.store, chunk), layer.chunks):
                            file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    os.rename(scratch / "layer", self.file(digest))
                say(f"{digest[:12]} {size >> 10} KiB")
        return image

    def verify(self, name: str) -> list[str]:
        """What is wrong with an image's files here; empty when every byte is what its digest says."""
        problems = []
        for role, digest, size in self.get(name).layers:
            if not self.present(digest):
                problems.append(f"{role} {digest[:12]} is not here in whole ({size} bytes)")
                continue
            wanted, found = self.layer(digest), Layer.of(self.file(digest))
            bad = [i for i, (a, b) in enumerate(zip(wanted.chunks, found.chunks)) if a != b]
            if bad or wanted.size != found.size:
                problems.append(f"{role} {digest[:12]}: {len(bad)} chunks differ (first {bad[:1]}), {found.size} bytes")
        return problems

    def remove(self, name: str) -> list[str]:
        """Forgets an image and deletes the layers that no other image here uses; returns their digests.

        Mounts that are in use go away when the last file on them is closed.
        """
        image = self.get(name)
        (self.folder / "images" / f"{name}.json").unlink()
        used = {digest for other in self.names() for _, digest, _ in self.get(other).layers}
        dropped = [digest for _, digest, _ in image.layers if digest not in used]
        for digest in dropped:
            with self._locked(digest):
                self._unmount(digest)
                for suffix in ("erofs", "json", "trace", "guess"):
                    (self.folder / "layers" / f"{digest}.{suffix}").unlink(missing_ok=True)
                shutil.rmtree(self.folder / "lazy" / digest, ignore_errors=True)
                shutil.rmtree(self.folder / "folders" / digest, ignore_errors=True)
        return dropped

    # Mounting

    def mount(self, name: str) -> list[Path]:
        """The image's layers as folders, top first, as overlayfs wants its lower folders; mounted if they are not yet.

        A layer that is here in whole is mounted from its file, any other from one that fetches what is read. An
        ordinary user may not mount: for them the image is fetched in whole and unpacked.
        """
        digests = [digest for _, digest, _ in reversed(self.get(name).layers)]
        if os.geteuid() == 0:
            return [self._mount(digest) for digest in digests]
        self.pull(name)
        return [self._unpacked(digest) for digest in digests]

    def _unpacked(self, digest: str) -> Path:
        target = self.folder / "folders" / digest
        with self._locked(digest), self._scratch() as scratch:
            if not target.exists():
                erofs.extract(self.file(digest), scratch / "root")
                target.parent.mkdir(exist_ok=True)
                os.rename(scratch / "root", target)
        return target

    def _mount(self, digest: str) -> Path:
        target = self.folder / "mounts" / digest
        with self._locked(digest):
            if not _alive(self.folder / "lazy" / digest / "file"):
                self._unmount(digest)
            if os.path.ismount(target):
                return target
            target.mkdir(exist_ok=True)
            if self.present(digest):
                source = self.file(digest)
            else:
                from dsec.images.lazy import serve

                source = serve(self, digest)
            erofs.mount(source, target)
        return target

    def unmount(self, name: str) -> None:
        """Takes an image's layers off their folders (sandboxes that run keep theirs)."""
        for _, digest, _ in self.get(name).layers:
            with self._locked(digest):
                self._unmount(digest)

    def unmount_all(self) -> None:
        """As `unmount`, for every layer that is mounted, also those that no image names any more."""
        for target in (self.folder / "mounts").iterdir():
            with self._locked(target.name):
                self._unmount(target.name)

    def _unmount(self, digest: str) -> None:
        for target in (self.folder / "mounts" / digest, self.folder / "lazy" / digest / "file"):
            while os.path.ismount(target) or not _alive(target):
                erofs.unmount(target)

    @contextlib.contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        """Two processes may want the same layer at once: one mounts it."""
        with open(self.folder / "locks" / digest[:32], "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _alive(target: Path) -> bool:
    """False for a mount whose server is gone. (statvfs asks the server; stat may answer from the kernel's memory.)"""
    try:
        os.statvfs(target)
    except FileNotFoundError:
        return True
    except OSError as problem:
        if problem.errno in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE):
            return False
        raise
    return True
