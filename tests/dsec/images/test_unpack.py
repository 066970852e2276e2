"""Archives from strangers: nothing lands outside, nothing grows without limit, whiteouts hide what they should."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dsec.errors import ImageError
from dsec.images import erofs
from dsec.images.layers import Images
from dsec.images.unpack import Limits, OciLayout, unpack_tar


def tar(*members: tuple[str, Any], mode: str = "w") -> bytes:
    """(name, bytes | None for a folder | dict of TarInfo fields) -> an archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, what in members:
            info = tarfile.TarInfo(name)
            if what is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            elif isinstance(what, bytes):
                info.size = len(what)
                archive.addfile(info, io.BytesIO(what))
            else:
                for key, value in what.items():
                    setattr(info, key, value)
                archive.addfile(info)
    return out.getvalue()


def link(target: str) -> dict[str, Any]:
    return {"type": tarfile.SYMTYPE, "linkname": target}


def hard(target: str) -> dict[str, Any]:
    return {"type": tarfile.LNKTYPE, "linkname": target}


HOSTILE = {
    "dotdot": [("../canary", b"owned")],
    "dotdot inside": [("a", None), ("a/../../canary", b"owned")],
    "through a link": [("out", link("..")), ("out/canary", b"owned")],
    "through an absolute link": [("out", link("/")), ("out/tmp/x", b"owned")],
    "through two links": [("a", None), ("a/b", link("..")), ("a/b/c", link("..")), ("a/b/c/canary", b"owned")],
    "hard link to the host": [("h", hard("../canary"))],
    "hard link through a link": [("out", link("..")), ("h", hard("out/canary"))],
    "hard link to a link": [("l", link("../canary")), ("h", hard("l"))],
    "folder through a link": [("out", link("..")), ("out/new", None)],
    "through a file": [("f", b"x"), ("f/g", b"y")],
    "a file over a folder": [("d", None), ("d", b"x")],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_leaves_the_folder(tmp_path: Path, case: str) -> None:
    canary, root = tmp_path / "canary", tmp_path / "root"
    canary.write_text("host")
    root.mkdir()
    with pytest.raises(ImageError):
        unpack_tar(io.BytesIO(tar(*HOSTILE[case])), root)
    assert canary.read_text() == "host" and canary.stat().st_nlink == 1
    assert sorted(os.listdir(tmp_path)) == ["canary", "root"]


def test_absolute_names_stay_inside_and_devices_stay_out(tmp_path: Path) -> None:
    members = [("/etc/passwd", b"inside"), ("dev/mem", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 1})]
    members += [
        ("disk", {"type": tarfile.BLKTYPE, "devmajor": 8}),
        ("l", link("/etc/passwd")),
        ("h", hard("etc/passwd")),
    ]
    unpack_tar(io.BytesIO(tar(*members)), tmp_path)
    assert (tmp_path / "etc/passwd").read_text() == "inside"
    assert not (tmp_path / "dev/mem").exists() and not (tmp_path / "disk").exists()
    assert os.readlink(tmp_path / "l") == "/etc/passwd"
    assert (tmp_path / "h").stat().st_ino == (tmp_path / "etc/passwd").stat().st_ino


def test_a_later_member_of_the_same_name_wins_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "canary").write_text("host")
    (tmp_path / "root").mkdir()
    unpack_tar(io.BytesIO(tar(("f", link("../canary")), ("f", b"second"))), tmp_path / "root")
    assert (tmp_path / "root/f").read_text() == "second" and (tmp_path / "canary").read_text() == "host"


def test_a_bomb_is_stopped_while_it_is_read(tmp_path: Path) -> None:
    bomb = gzip.compress(tar(("zeros", bytes(100 << 20))), 1)
    (tmp_path / "a").mkdir()
    with pytest.raises(ImageError, match="refused"):
        unpack_tar(io.BytesIO(bomb), tmp_path / "a", Limits(ratio=10))
    assert sum(path.stat().st_size for path in (tmp_path / "a").rglob("*")) == 0, "refused by its header, before a byte"
    (tmp_path / "b").mkdir()
    with pytest.raises(ImageError, match="refused"):
        unpack_tar(io.BytesIO(tar(*[(f"f{i}", b"") for i in range(100)])), tmp_path / "b", Limits(members=50))


CUT = gzip.compress(tar(("a", os.urandom(5000))))[:3000]


@pytest.mark.parametrize(
    "data", [b"", b"no archive", tar(("a", b"x" * 5000))[:3000], CUT], ids=["", "text", "cut", "gz"]
)
def test_what_is_no_archive_is_said_so(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ImageError):
        unpack_tar(io.BytesIO(data), tmp_path)


# OCI


def oci(folder: Path, *layers: bytes, config: dict[str, Any] | None = None) -> Path:
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps({"config": config or {}}).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [blob(gzip.compress(layer), "application/vnd.oci.image.layer.v1.tar+gzip") for layer in layers],
    }
    entry = blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    inner = blob(json.dumps({"manifests": [entry]}).encode(), "application/vnd.oci.image.index.v1+json")
    other = {**entry, "platform": {"architecture": "s390x", "os": "linux"}}
    (folder / "index.json").write_text(json.dumps({"manifests": [other, inner]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


LOWER = tar(
    ("etc", None), ("etc/keep", b"1"), ("etc/gone", b"2"), ("d", None), ("d/old", b"3"), ("x", None), ("x/y", b"4")
)
UPPER = tar(("etc/.wh.gone", b""), ("d", None), ("d/.wh..wh..opq", b""), ("d/new", b"5"), (".wh.x", b""))


@pytest.mark.usefixtures("mountable")
def test_an_oci_layout_is_stacked_with_its_whiteouts(tmp_path: Path) -> None:
    layout = oci(tmp_path / "oci", LOWER, UPPER, config={"Env": ["A=b"], "WorkingDir": "/srv"})
    images = Images(tmp_path / "home")
    image = images.add("mine", layout)
    assert image.config["WorkingDir"] == "/srv" and [role for role, _, _ in image.layers] == ["base", "base"]
    lowers, target = images.mount("mine"), tmp_path / "merged"
    target.mkdir()
    erofs.mount(Path("overlay"), target, "overlay", f"lowerdir={':'.join(map(str, lowers))}")
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*"))
    assert found == ["d", "d/new", "etc", "etc/keep"]


def test_a_forged_blob_is_refused(tmp_path: Path) -> None:
    layout = OciLayout(oci(tmp_path / "oci", LOWER))
    manifest = layout.manifest()
    blob = tmp_path / "oci/blobs/sha256" / manifest["layers"][0]["digest"].partition(":")[2]
    data = blob.read_bytes()
    for forged in (gzip.compress(UPPER), data[:-1] + bytes([data[-1] ^ 1]), data + b"!"):
        blob.write_bytes(forged)
        with pytest.raises(ImageError, match="holds something else"):
            list(layout.layers(manifest))
    manifest["layers"][0]["digest"] = "sha256:" + "../" * 21 + "a"
    with pytest.raises(ImageError, match="no SHA-256"):
        list(layout.layers(manifest))


def test_an_index_that_holds_itself_ends(tmp_path: Path) -> None:
    layout = oci(tmp_path / "oci", LOWER)
    for depth in range(6):
        data = (layout / "index.json").read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / digest).write_bytes(data)
        entry = {
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }
        (layout / "index.json").write_text(json.dumps({"manifests": [entry], "depth": depth}))
    with pytest.raises(ImageError, match="indexes within indexes"):
        OciLayout(layout).manifest()


# Packing


@pytest.mark.usefixtures("mountable")
def test_what_was_packed_is_what_is_mounted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/tool").write_bytes(os.urandom(300_000))
    os.chown(root / "bin/tool", 12, 34)
    os.chmod(root / "bin/tool", 0o4755)  # after chown, which clears setuid
    os.utime(root / "bin/tool", (1_700_000_000, 1_700_000_000))
    os.symlink("tool", root / "bin/alias")
    os.link(root / "bin/tool", root / "bin/twin")
    os.setxattr(root / "bin", "user.note", b"kept")
    images = Images(tmp_path / "home")
    for name, compress in (("plain", None), ("packed", "lz4hc")):
        images.add(name, root, compress=compress)
        (mounted,) = images.mount(name)
        assert (mounted / "bin/tool").read_bytes() == (root / "bin/tool").read_bytes()
        info = (mounted / "bin/twin").stat()
        assert (info.st_uid, info.st_gid, info.st_nlink, stat.S_IMODE(info.st_mode)) == (12, 34, 2, 0o4755)
        assert info.st_mtime == 1_700_000_000, "Python's compiled files depend on it"
        assert os.readlink(mounted / "bin/alias") == "tool"
        assert os.getxattr(mounted / "bin", "user.note") == b"kept"
        assert images.verify(name) == []
        with pytest.raises(OSError, match="Read-only"):
            (mounted / "x").touch()
        assert os.statvfs(mounted).f_flag & os.ST_NOSUID and os.statvfs(mounted).f_flag & os.ST_NODEV
        images.unmount(name)
        assert not os.path.ismount(mounted)
    with pytest.raises(ImageError, match=r"mkfs\.erofs failed"):
        images.add("bad", root, compress="nosuch")
    assert images.names() == ["packed", "plain"] and not list(images.folder.glob("build-*"))


@pytest.mark.usefixtures("mountable")
def test_the_same_content_has_the_same_digest(tmp_path: Path) -> None:
    """Folders that an archive does not list, links and whiteouts included; an image's name says what is in it."""
    (tmp_path / "root/d").mkdir(parents=True)
    (tmp_path / "root/d/f").write_text("x")
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar(("deep/down/f", b"y"), ("deep/l", link("down/f")), ("deep/.wh.gone", b"")))
    images = [Images(tmp_path / name) for name in ("one", "two")]
    for source, base in ((tmp_path / "root", None), (archive, "v0")):
        one, two = (each.add("v0" if base is None else "v1", source, base=base).layers for each in images)
        assert one == two
    with open(tmp_path / "root/d/f", "a") as file:
        file.write("z")
    assert images[0].add("v2", tmp_path / "root").layers != images[1].get("v0").layers


@pytest.mark.usefixtures("mountable")
def test_a_sandboxes_changes_become_a_layer_of_their_own_size(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "srv").mkdir(parents=True)
    (root / "srv/big").write_bytes(os.urandom(8 << 20))
    (root / "srv/old").write_text("old")
    images = Images(tmp_path / "home", str(tmp_path / "store"))
    base = images.add("base", root)
    sent = images.push("base")
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={images.mount('base')[0]},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(tmp_path / "merged")], check=True)
    merged = tmp_path / "merged"
    (merged / "srv/old").unlink()
    (merged / "srv/new").write_text("new")
    os.chown(merged / "srv/new", 100_007, 100_007)
    subprocess.run(["umount", str(merged)], check=True)
    image = images.pack_diff("work/step-1", "base", tmp_path / "upper", shift=100_000)
    assert image.layers[0] == base.layers[0] and image.layers[1][0] == "workspace"
    cost = images.push("work/step-1")
    assert cost == image.layers[1][2] < 64 << 10 < sent, "an update costs its own size"
    lowers = images.mount("work/step-1")
    erofs.mount(Path("overlay"), merged, "overlay", f"lowerdir={':'.join(map(str, lowers))}")
    assert sorted(os.listdir(merged / "srv")) == ["big", "new"]
    assert (merged / "srv/new").stat().st_uid == 7
    assert images.mount("base")[0] == lowers[1], "one mount for all images that share a layer"
    subprocess.run(["umount", str(merged)], check=True)
    assert images.remove("work/step-1") == [image.layers[1][1]]
    assert images.verify("base") == []


def test_names_cannot_point_elsewhere(tmp_path: Path) -> None:
    images = Images(tmp_path)
    for name in ("../x", "a/../b", "/etc/passwd", "A", "", "a" * 80, "a/b/c/d/e"):
        with pytest.raises(ImageError, match="no image name"):
            images.get(name)


@pytest.mark.usefixtures("mountable")
def test_an_ordinary_user_gets_folders(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/tool").write_bytes(os.urandom(300_000))
    os.chmod(root / "bin/tool", 0o755)
    os.symlink("tool", root / "bin/alias")
    here = Images(tmp_path / "here", str(tmp_path / "store"))
    here.add("mine", root)
    here.push("mine")
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & 0o001 and "pytest" in str(path):
            path.chmod(path.stat().st_mode | 0o011)
    home = tmp_path / "there"
    home.mkdir()
    os.chown(home, 54321, 54321)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgid(54321)
            os.setuid(54321)
            (folder,) = Images(home, str(tmp_path / "store")).mount("mine")
            os.write(write, str(folder).encode())
        except Exception as problem:
            os.write(write, repr(problem).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as pipe:
        folder = Path(pipe.read())
    assert (folder / "bin/tool").read_bytes() == (root / "bin/tool").read_bytes()
    assert stat.S_IMODE((folder / "bin/tool").stat().st_mode) == 0o755 and os.readlink(folder / "bin/alias") == "tool"
    assert (folder / "bin/tool").stat().st_uid == 54321
