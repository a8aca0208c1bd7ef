"""The C library's heap, told to keep what a step gives back.

A step frees a gigabyte of activations, and the next asks for the same again. glibc hands such memory back to the system
at once, and fetching it anew costs a page fault for every 4 KB: a tenth of a small model's update. Kept, it is no more
than the step's own peak, which the process has had anyway.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1
"""Bytes at the end of the heap beyond which they go back: the most that can be said."""
BLOCK = 1 << 25
"""Larger blocks are not taken from the heap: the most that glibc admits."""


def keep_freed_memory() -> bool:
    """For the whole process, from here on. False where the C library is not glibc: nothing changes there."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(TRIM_THRESHOLD, KEPT)) and bool(mallopt(MMAP_THRESHOLD, BLOCK))
