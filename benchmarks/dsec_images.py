"""How soon an image that is not here runs its first command, and how much of it that fetches.

    python benchmarks/dsec_images.py [--image here] [--command "/usr/bin/python3 -c pass"] [--rounds 5] [--busy-ok]

Needs root. The image "here" is made of this machine's own files: its Python with all it loads, and beside it other
programs and libraries up to `--mib`. Any other image is one of `dsec image` (python and debian are built on first use,
which needs mmdebstrap). It is pushed to a folder; each round is a fresh host that mounts it on
demand with `--latency` seconds added to every chunk: once knowing the recorded start trace; once the guess that every
image ships with, which is the first start of an image anywhere; once neither. Peers in the same run: the same layer
mounted from a whole file (warm), and fetching everything first, as a registry's pull does. The floor of reading
everything: fetching and checking all chunks eight at a time, then the plain read. Bars: the first command fetches at
most 25 % of the bytes and takes at most 3 times the warm time; a full read takes at most twice the plain one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsec.guest.build import home
from dsec.images import lazy
from dsec.images.debian import ensure
from dsec.images.layers import Images
from dsec.images.manifest import fetch_chunk


@contextlib.contextmanager
def unmounted(folder: str) -> Iterator[None]:
    """Nothing stays mounted below a folder, also after a failure."""
    try:
        yield
    finally:
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if (target := line.split()[1]).startswith(folder):
                subprocess.run(["umount", "-l", target], check=False)


def gather(target: Path, mib: int) -> None:
    """A root folder of this machine's own files: the system's Python, what it loads, and others until it is full."""
    python = Path("/usr/bin/python3").resolve()
    asked = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    library = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    linked = subprocess.run(["ldd", python], capture_output=True, text=True, check=True).stdout
    needed = [python, *(Path(word).resolve() for word in linked.split() if word.startswith("/"))]
    folders = (library, Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/bin"))
    others = [path for folder in folders for path in folder.rglob("*")]
    left = mib << 20
    for path in [*needed, *others]:
        copy = target / path.relative_to("/")
        if copy.exists() or not path.is_file() or path.is_symlink() or path.stat().st_size > left:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
        left -= path.stat().st_size
    for word in (Path("/usr/bin/python3"), *(Path(word) for word in linked.split() if word.startswith("/"))):
        link = target / word.parent.resolve().relative_to("/") / word.name
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(word.resolve(), word.parent.resolve()))
    for name in ("bin", "lib", "lib64"):
        (target / name).symlink_to(f"usr/{name}")


def timed(root: Path, command: list[str]) -> float:
    """Seconds of a command inside a root folder."""
    started = time.perf_counter()
    chroot = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin") or "chroot"
    done = subprocess.run([chroot, str(root), *command], stdout=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, command
    return time.perf_counter() - started


def read_all(root: Path) -> float:
    started = time.perf_counter()
    with open("/dev/null", "wb") as sink:  # tar does not read a file whose archive is /dev/null
        tar = subprocess.Popen(["tar", "-C", str(root), "-cf", "-", "."], stdout=subprocess.PIPE)
        subprocess.run(["cat"], stdin=tar.stdout, stdout=sink, check=True)
        tar.wait()
    return time.perf_counter() - started


def fetch_all(images: Images, digest: str, latency: float) -> float:
    """Seconds to fetch and check every chunk, eight at a time, and keep none."""

    def fetch(chunk: str) -> None:
        time.sleep(latency)
        fetch_chunk(images.store, chunk)

    started = time.perf_counter()
    with ThreadPoolExecutor(8) as workers:
        list(workers.map(fetch, images.layer(digest).chunks))
    return time.perf_counter() - started


def host(folder: Path, store: Path, name: str, latency: float, trace: bytes | None) -> tuple[Images, str]:
    """A host that has nothing but the image's lists (and its trace)."""
    shutil.rmtree(folder, ignore_errors=True)
    images = Images(folder, str(store))
    digest = images.get(name).layers[0][1]
    images.layer(digest)
    if trace is not None:
        (images.folder / "layers" / f"{digest}.trace").write_bytes(trace)
    started = lazy.serve
    lazy.serve = lambda images, digest: started(images, digest, latency)  # type: ignore[assignment, misc]
    try:
        images.mount(name)
    finally:
        lazy.serve = started
    return images, digest


def status(images: Images, digest: str) -> dict[str, int]:
    time.sleep(2.5 * lazy.FLUSH_SECONDS)
    found: dict[str, int] = json.loads((images.folder / "lazy" / digest / "status").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="here")
    parser.add_argument("--mib", type=int, default=200, help="size of the image made of this machine's files")
    parser.add_argument("--command", default="/usr/bin/python3 -c pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.001, help="seconds added to each chunk")
    parser.add_argument("--busy-ok", action="store_true", help="measure although the machine is busy")
    options = parser.parse_args()
    load, command, name = os.getloadavg()[0], shlex.split(options.command), options.image
    if load > 0.5 and not options.busy_ok:
        sys.exit(f"load {load:.2f}: the machine is busy (--busy-ok measures anyway)")
    found: dict[str, list[float]] = {}

    def note(label: str, value: float) -> None:
        found.setdefault(label, []).append(value)

    with tempfile.TemporaryDirectory(dir=home(), ignore_cleanup_errors=True) as temporary, unmounted(temporary):
        store, folder = Path(temporary) / "store", Path(temporary) / "host"
        ours = Images(Path(temporary) / "maker" if name == "here" else home(), str(store))
        if name == "here":
            gather(Path(temporary) / "root", options.mib)
            ours.add(name, Path(temporary) / "root")
        else:
            ensure(ours, name)
        ours.push(name)
        (plain,), size = ours.mount(name), ours.get(name).layers[0][2] / 2**20
        shutil.rmtree(store / "traces")
        images, digest = host(folder, store, name, options.latency, None)
        timed(images.mount(name)[0], command)
        images.unmount(name)
        while (trace := images.trace(digest)) is None:  # written when the daemon ends
            time.sleep(0.1)
        for _ in range(options.rounds):
            for label, known in (("recorded", trace), ("guessed", None), ("neither", None)):
                shutil.rmtree(store / "traces", ignore_errors=True)  # the first host to start an image stores its trace
                if label == "guessed":
                    ours.store.put(f"traces/{digest}.guess", (ours.folder / "layers" / f"{digest}.guess").read_bytes())
                began = time.perf_counter()
                images, digest = host(folder, store, name, options.latency, known)
                note(f"mount, {label} (ms)", (time.perf_counter() - began) * 1e3)
                (root,) = images.mount(name)
                note(f"first command, {label} (ms)", timed(root, command) * 1e3)
                seen = status(images, digest)
                note(f"fetched, {label} (%)", 100 * seen["fetched"] / seen["size"])
                note("the same again (ms)", min(timed(root, command) for _ in range(5)) * 1e3)
                if label == "neither":
                    note("read all on demand (s)", read_all(root))
                images.unmount(name)
            note("whole file, warm (ms)", min(timed(plain, command) for _ in range(5)) * 1e3)
            note("read all of the whole file (s)", read_all(plain))
            note("fetch and check all (s)", fetch_all(ours, digest, options.latency))
            shutil.rmtree(folder)
            images, started = Images(folder, str(store)), time.perf_counter()
            images.pull(name)
            timed(images.mount(name)[0], command)
            note("pull first, then run (ms)", (time.perf_counter() - started) * 1e3)
            images.unmount(name)
    print(
        f"{name}: {size:.0f} MiB; load {load:.2f} before, {os.getloadavg()[0]:.2f} after; medians of {options.rounds}"
    )
    middle = {label: statistics.median(values) for label, values in found.items()}
    for label, values in found.items():
        print(f"{label:34}{middle[label]:10.1f}   ({min(values):.1f} to {max(values):.1f})")
    for label in ("recorded", "guessed", "neither"):
        ratio = middle[f"first command, {label} (ms)"] / middle["whole file, warm (ms)"]
        print(f"first command over warm, {label}: {ratio:.2f}")
    whole = middle["read all of the whole file (s)"]
    ratio, floor = (middle[name] / whole for name in ("read all on demand (s)", "fetch and check all (s)"))
    print(f"reading all of it over the plain read: {ratio:.2f} (floor {1 + floor:.2f})")


if __name__ == "__main__":
    main()
