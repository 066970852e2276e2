"""Compiles the C++ beside this file once for each kind of processor and hands out its functions.

No torch headers: a build takes seconds. The instructions are chosen at run time (`dsv4.kernels.cpu.isa`), one library
each; libraries lie in the user's cache under a name that changes with the source, the compiler and the instructions.
Without a compiler the caller uses the reference and one line says so.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dsv4.kernels.cpu import isa

_HERE = Path(__file__).parent
_PROBE = _HERE / "isa.cpp"
# C++14, in which <cmath> is parsed in a third of the time.
_FLAGS = "-O3 -std=c++14 -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros -fopenmp -Wno-psabi".split()
# What each library holds: files whose rows are of one type, `-DBF16` or not, and files that know no types.
_EITHER = ("attend", "experts", "linear", "mhc", "norm", "product", "rows", "softmax")
_SOURCES = {None: ("compress", "route", "sample"), torch.float32: _EITHER, torch.bfloat16: (*_EITHER, "decode")}
# Sums may be reassociated into vector lanes (infinities and NaN keep their meaning), but not in sources that spell
# their own lanes: two functions that promise one order of addition would be free to differ.
_REASSOCIATED = {"mhc", "norm", "softmax"}


@cache
def library(dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """The compiled kernels for rows of float32 or bfloat16, or those that know no types (None); or None: no compiler, a
    failed build, or DSV4_KERNELS=reference. ValueError where DSV4_ISA asks for instructions that are not there."""
    log = logging.getLogger("dsv4.kernels")
    if os.environ.get("DSV4_KERNELS", "cpu") == "reference":
        return None
    if _compiler() is None:
        log.warning("no C++ compiler found: running the plain torch kernels (slower; install g++ to change that)")
        return None
    try:
        chosen = isa.choose(levels())
        _share_threads()
        return ctypes.CDLL(str(build(chosen, dtype)))
    except subprocess.CalledProcessError as error:
        log.warning(
            "the C++ kernels did not compile, running the plain torch ones: %s", error.stderr.strip().splitlines()[0]
        )
    except OSError as error:
        log.warning("the C++ kernels are not usable, running the plain torch ones: %s", error)
    return None


def _compiler() -> str | None:
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((found for name in names if (found := shutil.which(name))), None)


@cache
def levels() -> list[str]:
    """The instruction sets that this processor and its system can run, the best last (`isa.LEVELS`)."""
    return isa.available(ctypes.CDLL(str(_compiled("isa", [_PROBE], ()))))


def build(level: str, dtype: torch.dtype | None) -> Path:
    """The library of one instruction set and type, compiled unless the cache holds it. CalledProcessError, OSError."""
    kind = {None: "any", torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    flags = (*isa.flags(level), *(("-DBF16",) if dtype == torch.bfloat16 else ()))
    return _compiled(f"kernels-{level}-{kind}", [_HERE / f"{name}.cpp" for name in _SOURCES[dtype]], flags)


def _compiled(name: str, sources: list[Path], flags: tuple[str, ...]) -> Path:
    compiler = _compiler()
    assert compiler is not None
    texts = [path.read_text() for path in [*sources, *sorted(_HERE.glob("*.h"))]]
    parts = [*texts, compiler, *_FLAGS, *sorted(_REASSOCIATED), *flags]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dsv4"
    target = folder / f"{name}-{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's library
        if target.exists():
            return target

        def compile(source: Path) -> str:
            made = str(Path(scratch) / f"{source.stem}.o")
            order = ["-fassociative-math"] if source.stem in _REASSOCIATED else []
            _call(compiler, *_FLAGS, *order, *flags, "-c", str(source), "-o", made)
            return made

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # the longest first
            objects = list(pool.map(compile, sorted(sources, key=lambda path: -path.stat().st_size)))
        built = Path(scratch) / "kernels.so"
        _call(compiler, "-shared", "-fopenmp", *objects, "-o", str(built))
        built.rename(target)  # built aside: whoever sees it sees all of it
    return target


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _share_threads() -> None:
    """torch's own OpenMP first and for all: two of them would keep two sets of threads that fight for the cores."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="dsv4-kernel")


def parallel(rows: int, work: Callable[[int, int, int], None], grain: int = 256) -> None:
    """Calls work(part, begin, end) over ranges of ``rows`` in as many threads as torch uses; ctypes frees the GIL
    meanwhile."""
    parts = parts_of(rows, grain)
    if parts == 1:
        work(0, 0, rows)
        return
    step = -(-rows // parts)
    ranges = [(part, part * step, min((part + 1) * step, rows)) for part in range(parts)]
    others = [_pool().submit(work, *r) for r in ranges[1:]]
    work(*ranges[0])
    for other in others:
        other.result()


def parts_of(rows: int, grain: int = 256) -> int:
    """How many ranges `parallel` makes."""
    return max(1, min(torch.get_num_threads(), rows // grain))


def call(name: str, dtype: torch.dtype | None, *arguments: torch.Tensor | int | float | None) -> None:
    """The C++ function ``name`` of `library(dtype)`. Tensors go as addresses, int as long, float as float."""
    function = getattr(library(dtype), name)
    converted: list[object] = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            converted.append(ctypes.c_void_p(value.data_ptr()))
        elif value is None:
            converted.append(None)
        else:
            converted.append(ctypes.c_long(value) if isinstance(value, int) else ctypes.c_float(value))
    function(*converted)


class _Nothing:
    """Where a forward pass leaves what no backward pass will ask for."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None: ...


def run(function: Any, *arguments: Any) -> Any:
    """``function.apply(*arguments)`` of an autograd function, without autograd's part (ten microseconds of a decoding
    step's hundred calls) when no gradient is wanted."""
    return function.apply(*arguments) if torch.is_grad_enabled() else function.forward(_Nothing(), *arguments)
