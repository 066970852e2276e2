"""What a layer's first command will read, told from what is in it: its start trace until a start has been recorded.

A shell and Python with every library that their loader maps, the modules Python starts with, the files a login reads,
and whatever lies on the way to all of these. Where they lie is said by dump.erofs, so that compressed files are found
too. A wrong guess costs some bytes of the first start, never more: what is read and was not guessed is fetched then.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from dsec.images.manifest import Layer

PROGRAMS = tuple(f"{folder}/{name}" for name in ("sh", "bash", "env", "python3") for folder in ("usr/local/bin", "bin"))
FILES = ("etc/ld.so.cache", "etc/passwd", "etc/nsswitch.conf", "etc/profile", "etc/localtime", "tmp", "root", "home")
LIBRARIES = ("lib64", "lib", "usr/lib", "usr/local/lib")  # and Debian's folders of an architecture in them
ENCODINGS = ("__init__", "aliases", "utf_8")  # what Python imports before anything else
LONGEST = 128 << 20  # bytes of a program that is looked into
MANY = 64  # entries on the way to a file, libraries of a program: more is no honest image
EXTENT = re.compile(r":\s+(\d+)\.\.\s*\d+ \|\s+(\d+)\s*$", re.M)  # bytes of the image
BLOCK, SLOT = 4096, 32  # bytes: of a block, and what inodes are numbered by


def guess(root: Path, image: Path, layer: Layer, most: int) -> list[int]:
    """The chunks, in order and at most so many, that a start from the folder packed into `image` would ask for."""
    program = shutil.which("dump.erofs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        return []
    said = subprocess.run([program, "-s", str(image)], capture_output=True, text=True).stdout
    found = re.search(r"metadata start block:\s+(\d+)", said)
    base = int(found[1]) * BLOCK if found else 0
    chunks = dict.fromkeys([0])
    for entry in dict.fromkeys(_entries(root)):
        if len(chunks) >= most:
            break
        said = subprocess.run([program, "-e", f"--path=/{entry}", str(image)], capture_output=True, text=True).stdout
        pieces = [(base + int(number) * SLOT, SLOT * 2) for number in re.findall(r"NID: (\d+)", said)]
        pieces += [(int(start), int(size)) for start, size in EXTENT.findall(said)]
        for start, size in pieces:
            chunks |= dict.fromkeys(range(start // layer.chunk, -(-(start + size) // layer.chunk)))
    return list(chunks)[:most]


def _entries(root: Path) -> Iterator[str]:
    """Paths in the layer that a start looks up, each after those on the way to it."""
    for file in FILES:
        yield from way(root, file)
    for name in PROGRAMS:
        passed = way(root, name)
        yield from passed
        if not passed:
            continue
        todo, seen = [passed[-1]], set[str]()
        while todo:
            yield from needed(root, todo.pop(0), todo, seen)
        program = Path(passed[-1])
        library = program.parent.parent / "lib" / program.name
        tag = program.name.replace("python", "cpython-").replace(".", "")
        modules = ["os.py", "lib-dynload", *(f"encodings/{name}.py" for name in ENCODINGS)]
        for module in modules + [f"encodings/__pycache__/{name}.{tag}.pyc" for name in ENCODINGS]:
            yield from way(root, str(library / module))


def needed(root: Path, program: str, todo: list[str], seen: set[str]) -> Iterator[str]:
    """The ways to what an ELF file's loader maps; what those need in turn is for `todo`."""
    interpreter, names, folders = _linked(root / program)
    folders = [folder.replace("$ORIGIN", str(Path(program).parent)) for folder in folders]
    for folder in (passed[-1] for name in LIBRARIES if (passed := way(root, name)) and (root / passed[-1]).is_dir()):
        folders += [str(path.relative_to(root)) for path in sorted((root / folder).glob("*-linux-*"))] + [folder]
    for candidates in [[interpreter], *([f"{folder}/{name}" for folder in folders] for name in names)]:
        passed = next(filter(None, (way(root, path) for path in candidates)), [])
        yield from passed
        if passed and passed[-1] not in seen and len(seen) < MANY:
            seen.add(passed[-1])
            todo.append(passed[-1])


def way(root: Path, path: str) -> list[str]:
    """Every entry that looking up a path passes, links and what they point to included; [] if it ends nowhere."""
    passed, here, todo = list[str](), list[str](), path.split("/")[::-1]
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here[-1:] = []
            continue
        here.append(name)
        entry = root.joinpath(*here)
        passed.append("/".join(here))
        if len(passed) > MANY or not os.path.lexists(entry):
            return []
        if entry.is_symlink():
            target = os.readlink(entry)
            here = [] if target.startswith("/") else here[:-1]
            todo += target.split("/")[::-1]
    return passed


def _linked(file: Path) -> tuple[str, list[str], list[str]]:
    """(interpreter, libraries, folders to look in first) of a 64-bit little-endian ELF file; nothing of any other."""
    if not file.is_file() or file.stat().st_size > LONGEST:
        return "", [], []
    data = file.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return "", [], []

    def text(offset: int) -> str:
        return os.fsdecode(data[offset : data.index(b"\0", offset)])

    interpreter, loads, dynamic = "", list[tuple[int, int, int]](), dict[int, list[int]]()
    try:
        start, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
        for index in range(count):
            kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, start + index * size)
            if kind == 1:  # PT_LOAD
                loads.append((address, length, offset))
            elif kind == 2:  # PT_DYNAMIC
                for tag, value in struct.iter_unpack("<QQ", data[offset : offset + length // 16 * 16]):
                    dynamic.setdefault(tag, []).append(value)
            elif kind == 3:  # PT_INTERP
                interpreter = text(offset)
        (table,) = dynamic.get(5, [0])  # DT_STRTAB
        strings = next((table - a + o for a, n, o in loads if a <= table < a + n), 0)
        names = [text(strings + value) for value in dynamic.get(1, [])[:MANY]]  # DT_NEEDED
        paths = [
            text(strings + value) for tag in (15, 29) for value in dynamic.get(tag, [])[:1]
        ]  # DT_RPATH, DT_RUNPATH
        folders = [path for each in paths for path in each.split(":")[:MANY]]
    except (struct.error, ValueError):  # not what its first bytes promise
        return "", [], []
    return interpreter, names, folders
