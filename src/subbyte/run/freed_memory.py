"""Memory that tensors give back, kept for the next ones.

Calibration makes and drops activations of many megabytes all the time. The C library of Linux (glibc) hands blocks above 32 MiB back to the
system at once and asks for new ones, which the system clears page by page; where that is slow, as in some virtual machines, a forward pass
on the CPU takes more than twice as long (`benchmarks/freed_memory.py`). PyTorch's tuning guide recommends another allocator, jemalloc or
TCMalloc, which has to be loaded before the program.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """Tell this process's C library to keep what is freed, until the process ends. The command line does so; a program of yours may.

    The process then goes on holding what it needed at its peak, rather than what it needs at the moment.

    Returns:
        Whether it was done: with glibc it is, elsewhere nothing happens.

    Source:
        mallopt(3).

    Example:
        >>> isinstance(keep_freed_memory(), bool)
        True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER)))
