"""The most memory that was held since one last asked: the GPU's where it works there, else this process's own."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path


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
    """Since the last reset, or since the process began; 0 where it cannot be told.

    Not ru_maxrss, which remembers what went before.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
        return int(found[1]) * 1024 if found else 0
    return 0
