"""The most memory held, since one last asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minigrpo.highwater import peak_bytes, reset_peak
from minigrpo.metrics import Clock

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through /proc")
MB = 1 << 20


def test_the_peak_forgets_what_was_before_its_reset() -> None:
    ballast = bytearray(200 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    high = peak_bytes()
    del ballast
    reset_peak()
    assert peak_bytes() < high - (150 << 20)


def test_each_phase_of_a_step_tells_its_own_peak() -> None:
    clock = Clock()
    torch.ones(200 * MB, dtype=torch.uint8)
    clock.lap("rollout")
    clock.lap("update")
    told = clock.metrics([])
    assert told["memory_gb/update"] > 0
    assert told["memory_gb/rollout"] > told["memory_gb/update"] + 0.15


def test_a_system_that_cannot_count_anew_tells_no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", refused)
    assert not reset_peak()
    clock = Clock()
    clock.lap("rollout")
    assert not [name for name in clock.metrics([]) if name.startswith("memory")]


def refused(*_: object) -> None:
    raise OSError
