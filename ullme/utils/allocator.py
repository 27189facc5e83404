"""glibc's allocator on a CPU: keep the memory that tensors free for the next ones."""

from __future__ import annotations

import ctypes
import os
import sys

# The parameters of mallopt(3), with the largest value that an int has, and 1 GiB.
_M_TRIM_THRESHOLD, _KEPT = -1, 2**31 - 1
_M_MMAP_THRESHOLD, _ON_HEAP = -3, 2**30


def keep_freed_memory(device: str) -> bool:
    """Let the process keep up to 2 GiB that it has freed, instead of giving it back to the system each time.

    PyTorch asks for a tensor's memory anew in every operation. By its defaults glibc gives larger blocks back at once,
    and the system clears the same pages again and again: measured in benchmarks/README.md. Results do not change, nor
    does the peak of memory.

    Args:
        device: what the process computes on; only a CPU is concerned.

    Returns:
        Whether it was set: not off Linux, with another C library, or where the environment sets MALLOC_* itself.
    """
    if (
        not device.startswith("cpu")
        or sys.platform != "linux"
        or any(name.startswith("MALLOC_") for name in os.environ)
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT) and mallopt(_M_MMAP_THRESHOLD, _ON_HEAP))
