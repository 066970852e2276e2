"""Which instructions the kernels are compiled for: asked of the processor at run time, or DSV4_ISA=avx2|avx512|amx."""

from __future__ import annotations

import ctypes
import os
import platform

LEVELS: dict[str, tuple[str, ...]] = {
    "generic": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi"),
    "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"),
}
"""From the plainest to the best, each a superset of the one before: what the compiler is told."""

EMULATED = "amx-emulated"
"""The code of "amx" with its instructions in plain C++: slow, for tests on processors without them."""


def flags(level: str) -> tuple[str, ...]:
    """Compiler flags of a level. Outside x86 "generic" means this very processor."""
    if level == EMULATED:
        return (*LEVELS["avx512"], "-DDSV4_TILES_EMULATED")
    if level == "generic" and platform.machine() not in ("x86_64", "AMD64"):
        return ("-march=native",)
    return LEVELS[level]


def available(probe: ctypes.CDLL) -> list[str]:
    """The levels that run here, best last; ``probe`` is the compiled isa.cpp."""
    return list(LEVELS)[: probe.isa_level() + 1]


def choose(levels: list[str]) -> str:
    """The best of ``levels``, or what DSV4_ISA says. ValueError where that is unknown or cannot run here."""
    wanted = os.environ.get("DSV4_ISA", "")
    if not wanted:
        return levels[-1]
    if wanted == EMULATED and "avx512" in levels:
        return wanted
    if wanted not in LEVELS:
        raise ValueError(f"DSV4_ISA={wanted} is unknown; known: {', '.join(LEVELS)}")
    if wanted not in levels:
        raise ValueError(f"DSV4_ISA={wanted}: this processor has no {wanted}, only {', '.join(levels)}")
    return wanted
