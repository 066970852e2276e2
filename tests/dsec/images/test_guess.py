"""What a start will read, told from the files of a layer: found where it lies, never outside, never believed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dsec.images import guess as module
from dsec.images.guess import guess, way
from dsec.images.layers import Images
from dsec.images.manifest import start_chunks


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """This machine's sh with what it links to, behind links as distributions have them, and much else."""
    folder = tmp_path / "root"
    (folder / "usr/bin").mkdir(parents=True)
    (folder / "data").mkdir()
    for i in range(8):
        (folder / f"data/before{i}").write_bytes(os.urandom(1 << 20))
    shell = str(shutil.which("sh"))
    for file in re.findall(r"(/\S+)", subprocess.run(["ldd", shell], capture_output=True, text=True).stdout):
        target = folder / "usr" / Path(file).resolve().relative_to("/usr")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        if not (link := folder / "usr" / file.lstrip("/").removeprefix("usr/")).exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent))
    shutil.copy(shell, folder / "usr/bin/dash")
    (folder / "usr/bin/sh").symlink_to("dash")
    for name in ("bin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")
    return folder


@pytest.mark.parametrize("compress", [None, "lz4hc"])
def test_a_shell_with_its_libraries_is_guessed_and_shipped(tmp_path: Path, root: Path, compress: str | None) -> None:
    if shutil.which("dump.erofs") is None:
        pytest.skip("needs dump.erofs (apt-get install erofs-utils)")
    images = Images(tmp_path / "here", str(tmp_path / "store"))
    digest = images.add("tiny", root, compress=compress).layers[0][1]
    images.push("tiny")
    layer, file = images.layer(digest), images.file(digest)
    found = guess(root, file, layer, 1000)
    data = file.read_bytes()
    if compress is None:
        for name in ("usr/bin/dash", next(str(path.relative_to(root)) for path in root.rglob("libc.so.6"))):
            start = data.index((root / name).read_bytes()[:4096])
            end = start + (root / name).stat().st_size - 1
            assert set(range(start // layer.chunk, end // layer.chunk + 1)) <= set(found), name
    assert 0 in found and len(set(found)) == len(found) < len(layer.chunks) / 2, "and not what no start reads"
    assert guess(root, file, layer, 2) == found[:2], "never more than it may be"
    stored = (tmp_path / "store/traces" / f"{digest}.guess").read_text()
    assert stored == str(found[: start_chunks(layer)])


def test_links_stay_inside_and_end(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/a").touch()
    for name, target in {
        "up": "../../../../usr/bin/a",
        "bin": "/usr/bin",
        "ring": "ring",
        "gone": "/etc/passwd",
    }.items():
        (root / name).symlink_to(target)
    assert way(root, "bin/a") == ["bin", "usr", "usr/bin", "usr/bin/a"]
    assert way(root, "up")[-1] == "usr/bin/a", "a link that leaves the root stays at its root"
    assert way(root, "ring") == [] and way(root, "gone") == [] and way(root, "bin/b") == []


def test_a_program_that_is_none_names_nothing(tmp_path: Path) -> None:
    """Every cut and every odd byte in the headers of a real one: nothing is raised, whatever they promise."""
    whole, file = Path(str(shutil.which("sh"))).read_bytes(), tmp_path / "program"
    file.write_bytes(whole)
    interpreter, names, _ = module._linked(file)
    assert "ld-" in interpreter and any(name.startswith("libc.so") for name in names)
    for length in (0, 5, 40, 64, 100, 1000, len(whole) // 2):
        file.write_bytes(whole[:length])
        module._linked(file)
    for position in range(5, 600, 3):
        file.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
        module._linked(file)
    os.mkfifo(tmp_path / "pipe")
    assert module._linked(tmp_path / "pipe") == ("", [], [])
