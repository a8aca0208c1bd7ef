"""Memory of this process: the most that it held since one last asked, and freed memory kept for the next step.

Peaks are the GPU's where the work is done there, else the process's own.

A training step frees a gigabyte of activations, and the next asks for the same again. glibc hands such memory back to
the system at once, and fetching it anew costs a page fault for every 4 KB: a tenth of a small model's update. Kept, it
is no more than the step's own peak, which the process has had anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def reset_peak(device: str = "cpu") -> bool:
    """From here on the peak counts anew. False where the system cannot do that: on a CPU, only Linux can."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_bytes(device: str = "cpu") -> int:
    """Read the peak since the last reset, or since the process began; 0 where it cannot be told."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or _largest()


def resident_bytes() -> int:
    """Read how much of main memory this process holds now; 0 where the system does not tell."""
    return _status("VmRSS")


def _status(name: str) -> int:
    with contextlib.suppress(OSError):
        found = re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
        return int(found[1]) * 1024 if found else 0
    return 0


def _largest() -> int:
    """Read ru_maxrss, which no reset makes forget: only for systems that have no other."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
