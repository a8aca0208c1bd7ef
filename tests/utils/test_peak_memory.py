"""The most memory held, since one last asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minigrpo.training.metrics import Clock
from minigrpo.utils.memory import peak_bytes, reset_peak, resident_bytes

pytestmark = pytest.mark.needs("clear_refs")


def in_a_fresh_process(program: str) -> dict[str, float]:
    """What the program prints as JSON: in this one, a new block may fit into what earlier tests freed."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told: dict[str, float] = json.loads(run.stdout)
    return told


BALLAST = """
import json
from minigrpo.utils.memory import peak_bytes, reset_peak
ballast = bytearray(200 << 20)
ballast[::4096] = b"x" * len(ballast[::4096])
high = peak_bytes()
del ballast
reset_peak()
print(json.dumps({"high": high, "later": peak_bytes()}))
"""


def test_the_peak_forgets_what_was_before_its_reset() -> None:
    peaks = in_a_fresh_process(BALLAST)
    assert peaks["later"] < peaks["high"] - (150 << 20)


PHASES = """
import json, torch
from minigrpo.training.metrics import Clock
clock = Clock()
torch.ones(200 << 20, dtype=torch.uint8)
clock.lap("rollout")
clock.lap("update")
print(json.dumps({name: value for name, value in clock.metrics([]).items() if name.startswith("memory")}))
"""


def test_each_phase_of_a_step_tells_its_own_peak() -> None:
    told = in_a_fresh_process(PHASES)
    assert told["memory_gb/update"] > 0
    assert told["memory_gb/rollout"] > told["memory_gb/update"] + 0.15


def test_a_system_that_cannot_count_anew_tells_no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", refused)
    assert not reset_peak()
    clock = Clock()
    clock.lap("rollout")
    assert not [name for name in clock.metrics([]) if name.startswith("memory")]


def refused(*_: object, **__: object) -> None:
    raise OSError


def test_where_the_system_tells_no_peak_of_its_own_the_largest_size_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < resident_bytes() <= peak_bytes()
    monkeypatch.setattr(Path, "read_text", refused)
    assert resident_bytes() == 0
    assert peak_bytes() > 0
