"""Nothing is acknowledged that is not on the disk: what the process really asked of the kernel, seen below Python.

A library put in front of libc writes down each write, sync, new file and rename of a program that logs steps. Before a
command runs its BEGIN, and before its answer is given its END with all it names, must have been synced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dsec

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
static void say(char kind, int fd, const void *data, size_t n) {
    static int out = -1;
    char link[64], line[4600];
    if (out < 0) out = syscall(SYS_openat, AT_FDCWD, getenv("SEEN"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd == out) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    line[0] = kind, line[1] = ' ';
    long got = readlink(link, line + 2, 4000), at = 2 + (got > 0 ? got : 0);
    if (at > 7 && !memcmp(line + at - 6, "/marks", 6) && n < 500) {
        line[at++] = ' ';
        memcpy(line + at, data, n);
        at += n;
    }
    line[at++] = '\n';
    syscall(SYS_write, out, line, at);
}
#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define WROTE(name, ...) REAL(name); say('W', fd, 0, ~0); return real(fd, __VA_ARGS__)
typedef const struct iovec *vec;
ssize_t write(int fd, const void *p, size_t n) { REAL(write); say('W', fd, p, n); return real(fd, p, n); }
ssize_t pwrite(int fd, const void *p, size_t n, off_t at) { WROTE(pwrite, p, n, at); }
ssize_t pwrite64(int fd, const void *p, size_t n, off64_t at) { WROTE(pwrite64, p, n, at); }
ssize_t writev(int fd, vec v, int n) { WROTE(writev, v, n); }
ssize_t pwritev(int fd, vec v, int n, off_t at) { WROTE(pwritev, v, n, at); }
ssize_t pwritev64(int fd, vec v, int n, off64_t at) { WROTE(pwritev64, v, n, at); }
ssize_t pwritev2(int fd, vec v, int n, off_t at, int f) { WROTE(pwritev2, v, n, at, f); }
ssize_t pwritev64v2(int fd, vec v, int n, off64_t at, int f) { WROTE(pwritev64v2, v, n, at, f); }
int fsync(int fd) { REAL(fsync); int r = real(fd); if (!r) say('S', fd, 0, ~0); return r; }
int fdatasync(int fd) { REAL(fdatasync); int r = real(fd); if (!r) say('S', fd, 0, ~0); return r; }
int rename(const char *from, const char *to) {
    REAL(rename);
    int r = real(from, to), fd = r ? -1 : open(to, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) { say('N', fd, 0, ~0); close(fd); }
    return r;
}
"""

PROGRAM = """
import asyncio, os, sys
from dsec.trajectory import TrajectoryLog
from dsec.types import Spec
if sys.argv[2] == "lazy": os.fdatasync = lambda fd: None
if sys.argv[2] == "no blobs": os.fsync = lambda fd: None
marks = os.open("marks", os.O_WRONLY | os.O_CREAT, 0o600)
async def main():
    log = TrajectoryLog(__import__("pathlib").Path(sys.argv[1]), segment_size=3000, sync=os.fdatasync)
    one = await log.open("t", Spec())
    for step in range(12):
        ticket = await one.begin("run", {"command": f"step {step}"})
        os.write(marks, b"RUN")
        await one.end(ticket, {"stdout": "x" * (100_000 if step % 4 == 2 else 10)})
        os.write(marks, b"ACK")
    log.close()
asyncio.run(main())
"""


def seen(tmp_path: Path, how: str) -> list[str]:
    """What the program asked of the kernel, in order."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl"], cwd=tmp_path, check=True)
    (tmp_path / "program.py").write_text(PROGRAM)
    settings = {"LD_PRELOAD": str(tmp_path / "shim.so"), "SEEN": str(tmp_path / "seen")}
    settings["PYTHONPATH"] = str(Path(dsec.__file__).parents[1])
    command = [sys.executable, "program.py", str(tmp_path / "log"), how]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **settings}, check=True, timeout=60)
    lines = (tmp_path / "seen").read_text(errors="replace").splitlines()
    assert sum(line.startswith("W ") and "/marks " in line for line in lines) == 24, "the library was in between"
    return lines


def faults(lines: list[str], folder: Path) -> list[str]:
    """Marks that were set while something of the log was not yet on the disk."""
    found, dirty, synced, files = [], set[str](), 0, set[str]()
    for line in lines:
        kind, path = line[0], line[2:]
        if kind == "W" and "/marks " in path:
            if dirty or not synced:
                found.append(f"{path.rpartition(' ')[2]}: {sorted(dirty) or 'nothing was synced'}")
            synced = 0
        elif path.startswith(str(folder)) and (path.endswith(".seg") or "/blobs/" in path or kind == "S"):
            if kind == "W":
                dirty |= {path} | ({os.path.dirname(path)} if path.endswith(".seg") and path not in files else set())
                files.add(path)
            elif kind == "N":  # under its new name it is as durable as before, once its folder is
                dirty.add(os.path.dirname(path))
            elif kind == "S":
                synced += 1
                dirty.discard(path)
    return found


def test_what_is_acknowledged_was_synced(tmp_path: Path) -> None:
    lines = seen(tmp_path, "as it is")
    segments = {line[2:] for line in lines if line.endswith(".seg")}
    assert len(segments) > 1 and any("/blobs/" in line for line in lines), "segments rolled, and a blob was made"
    assert faults(lines, tmp_path / "log") == []


@pytest.mark.parametrize("how", ["lazy", "no blobs"])
def test_a_sync_that_is_left_out_is_seen(tmp_path: Path, how: str) -> None:
    assert faults(seen(tmp_path, how), tmp_path / "log")
