"""What this machine's CPU has in hardware."""

from __future__ import annotations

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
