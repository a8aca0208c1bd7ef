"""Memory of this process: read its peak since the last reset, and keep freed memory for the next step.

A peak is the GPU's where the work is done there, else the process's own.

A training step frees a gigabyte of activations, and the next asks for the same again. glibc hands such memory back to
the system at once, and fetching it anew costs a page fault for every 4 KB: a tenth of a small model's update. What is
kept is no more than the step's own peak, which the process has reached anyway.
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
    """Begin a new peak. Return False where the system cannot do that: on a CPU, only Linux can."""
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
    """Read ru_maxrss, which no reset lowers: only for systems that have nothing better."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAX_KEPT_BYTES = 2**31 - 1
"""Free bytes at the end of the heap beyond which glibc gives them back to the system: the largest value it takes."""
MAX_HEAP_BLOCK_BYTES = 1 << 25
"""Size in bytes beyond which a block is not taken from the heap: the largest value that glibc admits."""
DEFAULT_BYTES = 128 << 10
"""glibc's own default for both."""

RETURNED_BYTES = 1 << 22
"""Size beyond which `return_freed_memory` has a block given back as soon as it is freed: that of most weights, not of
what flows through a layer, which would cost a page fault for every 4 KB of it."""

_blocks_open = 0


@contextmanager
def keep_freed_memory() -> Iterator[bool]:
    """Keep freed memory until the outermost such block ends. Yield False where the C library is not glibc."""
    global _blocks_open
    libc = _glibc()
    if libc is None:
        yield False
        return
    kept = _set_to_keep(libc)
    _blocks_open += 1
    try:
        yield kept
    finally:
        _blocks_open -= 1
        if not _blocks_open:
            _restore_thresholds(libc)


@contextmanager
def return_freed_memory() -> Iterator[bool]:
    """Give every block of more than 4 MiB back to the system as soon as it is freed, also inside `keep_freed_memory`,
    until this block ends. Yield False where the C library is not glibc.

    With each mapped block that is freed glibc raises the size from which it maps blocks, up to 32 MB. Tensors of a
    layer then come from the heap, where small objects between them keep what is freed: comparing the weights of a model
    of 0.6 billion, 50 MB at a time, held 4 GB.
    """
    libc = _glibc()
    if libc is None:
        yield False
        return
    libc.malloc_trim(0)
    returned = bool(libc.mallopt(MMAP_THRESHOLD, RETURNED_BYTES)) and bool(libc.mallopt(TRIM_THRESHOLD, DEFAULT_BYTES))
    try:
        yield returned
    finally:
        if _blocks_open:
            _set_to_keep(libc)
        else:
            _restore_thresholds(libc)


def _glibc() -> Any:
    """Return the C library, if its heap has rules that can be set; else None."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "mallopt") else None


def _set_to_keep(libc: Any) -> bool:
    trims_never = libc.mallopt(TRIM_THRESHOLD, MAX_KEPT_BYTES)
    return bool(trims_never) and bool(libc.mallopt(MMAP_THRESHOLD, MAX_HEAP_BLOCK_BYTES))


def _restore_thresholds(libc: Any) -> None:
    libc.mallopt(TRIM_THRESHOLD, _initial_threshold("trim_threshold"))
    libc.mallopt(MMAP_THRESHOLD, _initial_threshold("mmap_threshold"))
    libc.malloc_trim(0)


def _initial_threshold(name: str) -> int:
    """Return the threshold that the environment set for glibc, or its default."""
    tunable = re.search(rf"glibc\.malloc\.{name}=(\w+)", os.environ.get("GLIBC_TUNABLES", ""))
    value = tunable[1] if tunable else os.environ.get(f"MALLOC_{name.upper()}_", "")
    try:
        return int(value, 0)
    except ValueError:
        return DEFAULT_BYTES
