"""Memory that a step gave back is there for the next one."""

import resource
import subprocess
import sys

import pytest

from minigrpo.heap import keep_freed_memory

STEPS = """
import ctypes, resource, sys
from minigrpo.heap import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(10)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in reversed(blocks):  # as a backward pass lets go
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(int(kept), min(faults() for _ in range(5)))
"""


def faults(how: str) -> int:
    """Page faults of a step that takes 80 MB, where others went before it."""
    run = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
    kept, count = map(int, run.stdout.split())
    assert kept == (how == "kept")
    return count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_step_finds_the_memory_of_those_before() -> None:
    pages = (80 << 20) // resource.getpagesize()
    assert faults("kept") < pages / 100
    assert faults("given back") > pages / 2


def test_another_system_keeps_its_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
