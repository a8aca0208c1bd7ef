"""Memory that a step gave back is there for the next one, and goes back to the system when the run ends."""

import json
import resource
import subprocess
import sys
from typing import Any

import pytest

from minigrpo.utils import memory as heap
from minigrpo.utils.memory import keep_freed_memory, return_freed_memory

STEPS = '''
import ctypes, json, resource
from minigrpo.utils.memory import keep_freed_memory, return_freed_memory
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

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def holds(size, pinned):
    """Bytes that stay after 80 MB in blocks of that size; `pinned`: something behind them stays."""
    before = resident()
    blocks = [libc.malloc(size) for _ in range((80 << 20) // size)]
    pin = libc.malloc(64 << 10) if pinned else None
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in reversed(blocks):
        libc.free(block)
    stays = resident() - before
    libc.free(pin)
    return stays

def of_a_step():
    faults()
    found = {"faults": min(faults() for _ in range(5)), "holds": resident() - start}
    libc.malloc_trim(0)
    return found | {"small": holds(100 << 10, False), "large": holds(8 << 20, True)}

start = resident()
told = {"before": of_a_step()}
with keep_freed_memory():
    told["inside"] = of_a_step()
    with keep_freed_memory():
        told["nested"] = of_a_step()
    told["outer"] = of_a_step()
    with return_freed_memory():
        told["returning"] = of_a_step()
    told["keeping again"] = of_a_step()
    faults()
told["end"] = {"holds": resident() - start}
told["after"] = of_a_step()
with return_freed_memory():
    told["returning alone"] = of_a_step()
told["after that"] = of_a_step()
print(json.dumps(told))
'''


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, int]]:
    """Page faults of a step that takes 80 MB, and bytes that the process holds between steps, of a fresh process."""
    run = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(run.stdout)
    return told


@pytest.mark.needs("linux")
@pytest.mark.parametrize("when", ["inside", "nested", "outer", "keeping again"])
def test_a_step_finds_the_memory_of_those_before(steps: dict[str, dict[str, int]], when: str) -> None:
    assert steps[when]["faults"] < (80 << 20) / resource.getpagesize() / 100
    assert steps[when]["holds"] > 70 << 20


@pytest.mark.needs("linux")
@pytest.mark.parametrize("when", ["before", "after", "after that"])
def test_outside_a_run_freed_memory_goes_back_to_the_system(steps: dict[str, dict[str, int]], when: str) -> None:
    assert steps[when]["faults"] > (80 << 20) / resource.getpagesize() / 2
    assert steps[when]["holds"] < 20 << 20


@pytest.mark.needs("linux")
@pytest.mark.parametrize("kind", ["small", "large"])
def test_after_a_run_both_thresholds_are_those_of_before(steps: dict[str, dict[str, int]], kind: str) -> None:
    """`large` before is another thing: there glibc has raised its threshold by itself."""
    assert steps["after"][kind] < 20 << 20
    assert steps["inside"]["small"] > 70 << 20


@pytest.mark.needs("linux")
@pytest.mark.parametrize("when", ["returning", "returning alone"])
def test_a_proof_gives_large_blocks_back_at_once_whatever_lies_behind_them(
    steps: dict[str, dict[str, int]], when: str
) -> None:
    assert steps[when]["large"] < 20 << 20
    assert steps[when]["faults"] > (80 << 20) / resource.getpagesize() / 2


@pytest.mark.needs("linux")
def test_what_a_run_kept_goes_back_when_it_ends(steps: dict[str, dict[str, int]]) -> None:
    assert steps["end"]["holds"] < 20 << 20


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 128 << 10),
        ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, 1_000_000),
        ({"GLIBC_TUNABLES": "glibc.malloc.perturb=1:glibc.malloc.trim_threshold=0x40000"}, 0x40000),
        ({"MALLOC_TRIM_THRESHOLD_": "much"}, 128 << 10),
    ],
)
def test_what_the_environment_asked_of_the_heap_is_given_back(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert heap._initial_threshold("trim_threshold") == expected


def test_another_system_keeps_its_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with keep_freed_memory() as kept, return_freed_memory() as returned:
        assert not kept
        assert not returned
