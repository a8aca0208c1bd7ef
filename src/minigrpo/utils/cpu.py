"""What this machine's CPU has in hardware."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


@cache
def bfloat16_instructions() -> tuple[str, ...]:
    """Return the CPU's instructions for products in bfloat16, as far as the system tells."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return ()
    return tuple(name for name in _BFLOAT16_FLAGS if name in flags)


def usable_cores() -> int:
    """Return how many cores this process may use: a container may be given fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
