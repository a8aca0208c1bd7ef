"""Memory that a step gave back is there for the next one."""

import resource
import subprocess
import sys

import pytest

from minigrpo.heap import keep_freed_memory

STEPS = """
import resource, sys
from minigrpo.heap import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
import torch

def step():
    held = [torch.ones(1 << 20) for _ in range(20)]
    return len(held)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
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
