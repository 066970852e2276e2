"""How soon an image that is not here runs its first command, and how much of it that fetches.

    python benchmarks/dsec_images.py [--image python] [--command "python -c pass"] [--rounds 5] [--busy-ok]

Needs root, and the image (built on first use). It is pushed to a folder; each round is a fresh host that mounts it on
demand with `--latency` seconds added to every chunk: once knowing the recorded start trace, once without. Peers in the
same run: the same layer mounted from a whole file (warm), and fetching everything first, as a registry's pull does.
Bars: the first command fetches at most 25 % of the bytes and takes at most 3 times the warm time; a full read takes at
most twice the plain one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsec.guest.build import home
from dsec.images import lazy
from dsec.images.debian import ensure
from dsec.images.layers import Images


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
    parser.add_argument("--image", default="python")
    parser.add_argument("--command", default="python -c pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.001, help="seconds added to each chunk")
    parser.add_argument("--busy-ok", action="store_true", help="measure although the machine is busy")
    options = parser.parse_args()
    load, command, name = os.getloadavg()[0], shlex.split(options.command), options.image
    if load > 0.5 and not options.busy_ok:
        sys.exit(f"load {load:.2f}: the machine is busy (--busy-ok measures anyway)")
    ours = Images(home())
    ensure(ours, name)
    found: dict[str, list[float]] = {}

    def note(label: str, value: float) -> None:
        found.setdefault(label, []).append(value)

    with tempfile.TemporaryDirectory(dir=home()) as temporary:
        store, folder = Path(temporary) / "store", Path(temporary) / "host"
        ours.url, ours._store = str(store), None
        ours.push(name)
        (plain,) = ours.mount(name)
        images, digest = host(folder, store, name, options.latency, None)
        timed(images.mount(name)[0], command)
        images.unmount(name)
        while (trace := images.trace(digest)) is None:  # written when the daemon ends
            time.sleep(0.1)
        for _ in range(options.rounds):
            for label, known in (("with trace", trace), ("no trace", None)):
                images, digest = host(folder, store, name, options.latency, known)
                (root,) = images.mount(name)
                note(f"first command, {label} (ms)", timed(root, command) * 1e3)
                seen = status(images, digest)
                note(f"fetched, {label} (%)", 100 * seen["fetched"] / seen["size"])
                note("the same again (ms)", min(timed(root, command) for _ in range(5)) * 1e3)
                if known is None:
                    note("read all on demand (s)", read_all(root))
                images.unmount(name)
            note("whole file, warm (ms)", min(timed(plain, command) for _ in range(5)) * 1e3)
            note("read all of the whole file (s)", read_all(plain))
            shutil.rmtree(folder)
            images, started = Images(folder, str(store)), time.perf_counter()
            images.pull(name)
            timed(images.mount(name)[0], command)
            note("pull first, then run (ms)", (time.perf_counter() - started) * 1e3)
            images.unmount(name)
    size = ours.get(name).layers[0][2] / 2**20
    print(
        f"{name}: {size:.0f} MiB; load {load:.2f} before, {os.getloadavg()[0]:.2f} after; medians of {options.rounds}"
    )
    middle = {label: statistics.median(values) for label, values in found.items()}
    for label, values in found.items():
        print(f"{label:34}{middle[label]:10.1f}   ({min(values):.1f} to {max(values):.1f})")
    for label in ("with trace", "no trace"):
        ratio = middle[f"first command, {label} (ms)"] / middle["whole file, warm (ms)"]
        print(f"first command over warm, {label}: {ratio:.2f}")


if __name__ == "__main__":
    main()
