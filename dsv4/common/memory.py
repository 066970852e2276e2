"""What a long-running CPU process should ask of its allocator."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc reuse freed tensors instead of returning their pages to the kernel; True where that took effect.

    By default every tensor of some megabytes is mapped, page-faulted and zeroed anew: a 32 MB addition took 15 ms
    instead of 1.8 ms. The price is that the process keeps its peak memory. Nothing happens where libc is not glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 << 20))
    return mallopt is not None and all(mallopt(key, value) == 1 for key, value in settings)
