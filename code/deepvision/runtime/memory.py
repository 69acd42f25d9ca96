"""The C library's memory: freed blocks are kept for the next step, unless a process is to fork.

By itself glibc maps each block above 32 MB anew and gives it back when it is freed. A training step
then writes to nothing but new pages, and the kernel zeroes them one by one: 176,000 in a step of
SimpleNet on 64 images, a third of its time. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def retain_freed_memory() -> None:
    """From now on, have this process reuse what it frees."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_MMAP_MAX, 0)
        _libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def give_back_freed() -> None:
    """Before a fork: a child would keep the pages as they are, and the parent write to copies."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
