"""The C library's heap, told to keep what a step gives back while a run goes on.

A step frees a gigabyte of activations, and the next asks for the same again. glibc hands such memory back to the system
at once, and fetching it anew costs a page fault for every 4 KB: a tenth of a small model's update. Kept, it is no more
than the step's own peak, which the process has had anyway.

Afterwards both thresholds are those that glibc begins with, and what is free goes back to the system. One thing cannot
be given back: until they are set for the first time, glibc raises the thresholds by itself when large blocks are freed,
and it has no way to make it begin again. A process that goes on fetches large blocks from the system each time.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1
"""Bytes at the end of the heap beyond which they go back: the most that can be said."""
BLOCK = 1 << 25
"""Larger blocks are not taken from the heap: the most that glibc admits."""
DEFAULT = 128 << 10
"""What glibc begins with, for both."""

_blocks_open = 0


@contextmanager
def keep_freed_memory() -> Iterator[bool]:
    """Keeps freed memory until the outermost such block ends. Yields False where the C library is not glibc."""
    global _blocks_open
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield False
        return
    kept = bool(libc.mallopt(TRIM_THRESHOLD, KEPT)) and bool(libc.mallopt(MMAP_THRESHOLD, BLOCK))
    _blocks_open += 1
    try:
        yield kept
    finally:
        _blocks_open -= 1
        if not _blocks_open:
            _give_back(libc)


def _give_back(libc: Any) -> None:
    libc.mallopt(TRIM_THRESHOLD, _began_with("trim_threshold"))
    libc.mallopt(MMAP_THRESHOLD, _began_with("mmap_threshold"))
    libc.malloc_trim(0)


def _began_with(name: str) -> int:
    """What the environment asked of glibc, or its default."""
    tunable = re.search(rf"glibc\.malloc\.{name}=(\w+)", os.environ.get("GLIBC_TUNABLES", ""))
    asked = tunable[1] if tunable else os.environ.get(f"MALLOC_{name.upper()}_", "")
    try:
        return int(asked, 0)
    except ValueError:
        return DEFAULT
