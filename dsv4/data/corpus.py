"""The corpus: real text that every machine with Python has, with its origin on record.

Sources are the standard library, the packages installed for the running interpreter, their documentation, and the
system's documentation and manual pages. Nothing is downloaded. The held-out set is whole standard-library modules,
chosen by the hash of their path alone, so that any machine and any Python holds out the same names.

A corpus folder holds one text file per source (documents back to back), `heldout.txt`, and `manifest.json`, which lists
for every document its path, package, bytes, sha256 and split, and what was dropped and why.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.common.console import Progress
from dsv4.common.files import atomic_folder, atomic_write
from dsv4.data.filters import Contamination, NearCopies, poor
from dsv4.data.manpage import plain_text

SHARES = {"stdlib": 0.30, "packages": 0.45, "docs": 0.12, "man": 0.13}  # of the byte limit; our choice
PACKAGE_SHARE = 0.08  # no package may fill more of its source than this
HELDOUT_RATE = 1 / 6  # of the eligible standard-library modules
NEAR_COPY = 0.5  # a file is dropped when this much of it was already kept
_SKIP = {"site-packages", "dist-packages", "__pycache__", "node_modules"}
_HISTORY = re.compile(r"(?i)change|history|news")  # lists of commits teach little


@dataclass(frozen=True)
class File:
    """A candidate: `name` is relative to the root of its source, so that it reads the same on every machine."""

    source: str
    package: str
    name: str
    path: Path

    @property
    def rank(self) -> bytes:
        return hashlib.sha256(self.name.encode()).digest()

    def read(self) -> bytes:
        """UTF-8 text with \\n line ends; manual pages as plain text."""
        data = self.path.read_bytes()
        if self.path.suffix == ".gz":
            data = gzip.decompress(data)
        if self.source == "man":
            data = plain_text(data.decode("utf-8", "replace")).encode()
        return data.replace(b"\r\n", b"\n").removeprefix(b"\xef\xbb\xbf")


def is_heldout(name: str, size: int) -> bool:
    """Whether the standard-library file `name` (posix path below Lib) is held out: a module, not a test, of 4 to
    100 KB, by the hash of its path. No list: the same rule answers on any machine."""
    parts = name.split("/")
    if not name.endswith(".py") or any(p in ("test", "tests", "idle_test", "encodings") for p in parts):
        return False
    return 4_000 <= size <= 100_000 and hashlib.sha256(name.encode()).digest()[0] < 256 * HELDOUT_RATE


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in _SKIP)
        yield from (Path(folder) / f for f in sorted(files) if f.endswith(suffixes))


def _files(source: str, root: Path, suffixes: tuple[str, ...]) -> Iterator[File]:
    for path in _walk(root, suffixes):
        if path.is_file() and not (source == "docs" and _HISTORY.search(path.name)):
            name = path.relative_to(root).as_posix()
            first = re.split(r"[-_.]" if source == "man" else "-", name.split("/")[0])[0].removesuffix(".py")
            yield File(source, "python" if source == "stdlib" else first, name, path)


def candidates() -> list[File]:
    """Every file of this machine that the corpus may use, in a fixed order (by source, then by hash of its name)."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    roots = {Path(sysconfig.get_path("purelib")): 0, Path(sysconfig.get_path("purelib", vars=base)): 0}
    found = list(_files("stdlib", stdlib, (".py", ".txt")))
    for root in roots:
        found += _files("packages", root, (".py", ".pyi"))
        found += _files("docs", root, (".md", ".rst", ".txt", "METADATA"))
    found += _files("docs", Path("/usr/share/doc"), (".md", ".txt", ".rst", "README", "README.gz", ".txt.gz", ".md.gz"))
    for section in range(1, 9):
        found += _files("man", Path(f"/usr/share/man/man{section}"), ("", ".gz"))
    order = list(SHARES)
    return sorted(found, key=lambda f: (order.index(f.source), f.rank, f.path))


def heldout_files(files: list[File]) -> dict[str, bytes]:
    """Name -> text of the held-out files among the candidates, sorted by name."""
    chosen = [f for f in files if f.source == "stdlib" and is_heldout(f.name, f.path.stat().st_size)]
    heldout = {f.name: data for f in sorted(chosen, key=lambda f: f.name) if poor(data := f.read()) is None}
    if not heldout:
        raise ValueError(f"no held-out file among {len(files)} candidates: is the standard library's source installed?")
    return heldout


def build_corpus(out: Path, max_bytes: int = 150_000_000, files: list[File] | None = None) -> dict[str, Any]:
    """Collects, filters and writes the corpus to the folder `out` (which must not exist); returns the manifest.

    max_bytes: limit of the training text; each source may fill its share of it. files: candidates, by default all
    of this machine. The result depends on nothing but the files.
    """
    files = candidates() if files is None else files
    heldout = heldout_files(files)
    contamination, copies, exact = Contamination(heldout), NearCopies(), set[bytes]()
    rows, contaminated, dropped = [], [], Counter[str]()
    filled, by_package = Counter[str](), Counter[tuple[str, str]]()
    with ExitStack() as stack:
        folder = stack.enter_context(atomic_folder(out))
        progress = stack.enter_context(Progress(len(files), "corpus", "files"))
        shards = {name: stack.enter_context(open(folder / f"{name}.txt", "wb")) for name in (*SHARES, "heldout")}

        def write(shard: str, name: str, package: str, data: bytes) -> None:
            shards[shard].write(data)
            split = "heldout" if shard == "heldout" else "train"
            row = {"source": shard, "split": split, "package": package, "path": name, "bytes": len(data)}
            rows.append(row | {"sha256": hashlib.sha256(data).hexdigest()})

        for name, data in heldout.items():
            write("heldout", name, "python", data)
        for file in files:
            quota = max_bytes * SHARES[file.source]
            progress.update(1, kept=len(rows), megabytes=round(sum(filled.values()) / 1e6, 1))
            if file.source == "stdlib" and file.name in heldout:
                continue
            if filled[file.source] >= quota:
                dropped["over the source's share"] += 1
                continue
            if file.source != "stdlib" and by_package[file.source, file.package] >= quota * PACKAGE_SHARE:
                dropped["over the package's share"] += 1
                continue
            data = file.read()
            if reason := poor(data):
                dropped[reason] += 1
            elif (digest := hashlib.sha256(data).digest()) in exact:
                dropped["exact copy"] += 1
            elif found := contamination.copied_from(data):
                dropped["copies a held-out file"] += 1
                row = {"path": file.name, "package": file.package, "copies": found[0], "shared_runs": found[1]}
                contaminated.append(row)
            elif copies.share(data) > NEAR_COPY:
                dropped["near copy"] += 1
            else:
                exact.add(digest)
                copies.keep(data)
                write(file.source, file.name, file.package, data)
                filled[file.source] += len(data)
                by_package[file.source, file.package] += len(data)
        for shard in shards.values():
            shard.flush()
        manifest = {
            "python": sys.version.split()[0],
            "max_bytes": max_bytes,
            "train_bytes": dict(filled),
            "heldout_bytes": sum(map(len, heldout.values())),
            "heldout_files": len(heldout),
            "train_files": len(rows) - len(heldout),
            "dropped": dict(dropped.most_common()),
            "contaminated": contaminated,
            "files": rows,
        }
        atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1))
    return manifest


def load_manifest(corpus: Path) -> dict[str, Any]:
    """The manifest of a corpus folder."""
    path = Path(corpus) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{corpus} holds no corpus: manifest.json is missing (build one with dsv4.data.build_corpus)")
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def texts(corpus: Path, source: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(manifest row, text) of every document of one source ("heldout" for the held-out files), in manifest order."""
    rows = [row for row in load_manifest(corpus)["files"] if row["source"] == source]
    with open(Path(corpus) / f"{source}.txt", "rb") as stream:
        for row in rows:
            data = stream.read(row["bytes"])
            if len(data) != row["bytes"]:
                raise ValueError(f"{source}.txt ends inside {row['path']}: {len(data)} of {row['bytes']} bytes")
            yield row, data.decode("utf-8")


def heldout_texts(corpus: Path) -> dict[str, str]:
    """Path -> text of the held-out files."""
    return {row["path"]: text for row, text in texts(corpus, "heldout")}
