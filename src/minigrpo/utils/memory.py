"""Memory of this process: what is free, its peak since the last reset, and whether it ran out.

A peak is the GPU's where the work is done there, else the process's own. On a GPU torch keeps freed memory for its next
tensors: that counts as free, though no other program can have it before `empty_cache`.

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
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int:
    """Return free bytes of the GPU, or of main memory (within the container's limit)."""
    if device.type != "cuda":
        return min(_available(), _cgroup_room())
    from torch import cuda

    return cuda.mem_get_info(device)[0] + cuda.memory_reserved(device) - cuda.memory_allocated(device)


def free_before_kill(device: torch.device) -> int:
    """Return the free bytes beyond which the kernel kills this process. A GPU with memory of its own has no such limit:
    its allocator says no."""
    if device.type == "cuda":
        from torch import cuda

        if not cuda.get_device_properties(device).is_integrated:
            return 1 << 70
    return free_memory(device)


VMSTAT, BOOT_ID = Path("/proc/vmstat"), Path("/proc/sys/kernel/random/boot_id")


def count_memory_kills() -> tuple[str, int] | None:
    """Return this boot of the machine, and how many processes its kernel has killed for their memory since.

    Containers are counted in. None where the system does not tell.
    """
    try:
        found = re.search(r"^oom_kill (\d+)$", VMSTAT.read_text(encoding="ascii"), re.MULTILINE)
        return (BOOT_ID.read_text(encoding="ascii").strip(), int(found[1])) if found else None
    except OSError:
        return None


def empty_cache() -> None:
    """Give back what torch keeps on a GPU for its next tensors: another program may have it, and gaps in it close."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch and torch.backends.mps.is_available():
        torch.mps.empty_cache()


ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables that set torch's allocator on a GPU. torch takes the first that is set."""


EXPANDABLE = "expandable_segments:True"
_was_expandable = False


@contextmanager
def expandable_segments() -> Iterator[None]:
    """Let torch's allocator on a GPU grow its blocks, so that lengths that change at every step leave no gaps.

    What the environment sets already is kept. torch reads it once, before its first tensor on a GPU: where that comes
    inside the block, it holds for the process, although the environment is given back.
    """
    global _was_expandable
    name = ALLOCATOR_VARIABLES[-1]
    added = sys.platform.startswith("linux") and not any(each in os.environ for each in ALLOCATOR_VARIABLES)
    if added:
        os.environ[name] = EXPANDABLE
        _was_expandable = True
    try:
        yield
    finally:
        if added:
            os.environ.pop(name, None)


def expandable_setting() -> str | None:
    """Return what makes torch's allocator grow its blocks in this process, or None where nothing does."""
    from torch import cuda

    for name in ALLOCATOR_VARIABLES:
        if EXPANDABLE in os.environ.get(name, ""):
            return f"{name}={os.environ[name]}"
    return (
        f"{EXPANDABLE}, with which an earlier run of this process began"
        if _was_expandable and cuda.is_initialized()
        else None
    )


GPU_RAN_OUT = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
CPU_RAN_OUT = ("can't allocate memory", "not enough memory")
"""Words of torch's errors that have no class of their own."""


def ran_out(fault: BaseException) -> Literal["GPU", "CPU", ""]:
    """Return whose allocator ran out of memory, or "" where the fault is another one."""
    from torch import OutOfMemoryError

    words = str(fault) if isinstance(fault, RuntimeError) else ""
    if isinstance(fault, OutOfMemoryError) or any(each in words for each in GPU_RAN_OUT):
        return "GPU"
    return "CPU" if isinstance(fault, MemoryError) or any(each in words for each in CPU_RAN_OUT) else ""


def first_line(fault: BaseException) -> str:
    """Return the first line of what an allocator says, which goes on for many."""
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__


def _available() -> int:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        import psutil

        return int(psutil.virtual_memory().available)
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:"))


def _cgroup_room() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)


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
