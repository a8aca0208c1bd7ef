"""Idle threads sleep while other programs need the cores, and spin again afterwards."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.types import Sampling
from minigrpo.utils import spinning
from minigrpo.utils.spinning import (
    CROWDED,
    SPIN_COUNT,
    Sleepers,
    Waiting,
    sleepers_needed,
    spin_while_free,
    threads_left,
)
from tests.helpers.models import make_policy, rendered


@pytest.fixture(autouse=True)
def spinning_left_to_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", SPIN_COUNT)


def named(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def until(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Wait for it while this process works."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not holds():
        torch.ones(100_000).sum()
    return holds()


@pytest.mark.needs("procfs")
def test_threads_sleep_while_they_wait_for_cores_and_spin_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    share = [0.0]

    class Told(Waiting):
        def share_since(self, before: Waiting) -> float | None:
            return share[0]

    monkeypatch.setattr(spinning, "Waiting", Told)
    monkeypatch.setattr(spinning, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(spinning, "_uses_gnu_openmp", lambda: True)
    monkeypatch.setattr(spinning, "sleepers_needed", lambda cores, team: 2)
    with spin_while_free():
        time.sleep(0.1)
        assert named("minigrpo-sleeper") == 0
        share[0] = CROWDED
        assert until(lambda: named("minigrpo-sleeper") == 2)
        with spin_while_free():
            assert named("minigrpo-spinning") == 1
        assert named("minigrpo-sleeper") == 2
        share[0] = 0.9 * CROWDED
        assert until(lambda: named("minigrpo-sleeper") == 0)
        share[0] = 1.0
        assert until(lambda: named("minigrpo-sleeper") == 2)
    assert named("minigrpo-sleeper") == named("minigrpo-spinning") == 0


def test_a_process_that_does_nothing_changes_nothing() -> None:
    before = Waiting(worked=10.0, waited=1.0)
    assert Waiting(10.04, 1.5).share_since(before) is None
    assert Waiting(12.0, 2.0).share_since(before) == pytest.approx(0.5)
    assert Waiting(12.0, 0.5).share_since(before) == 0  # a thread that had waited has ended


@pytest.mark.needs("procfs")
def test_the_kernel_tells_how_long_threads_waited() -> None:
    rivals = 2 * len(os.sched_getaffinity(0))
    with busy(rivals):
        assert until(lambda: (share_of_a_second() or 0.0) > CROWDED)  # rivals start when they get a core


def share_of_a_second() -> float | None:
    """Work for a second; return seconds of waiting for each second of work."""
    before, end = Waiting.now(), time.monotonic() + 1
    while time.monotonic() < end:
        pass
    return Waiting.now().share_since(before)


class busy(ExitStack):
    """Keep so many other processes busy inside the block."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            self.callback(process.wait)
            self.callback(process.kill)


@pytest.mark.parametrize(("cores", "team"), [(2, 2), (64, 64), (64, 32), (64, 16), (8, 2), (3, 4)])
def test_as_many_threads_sleep_as_it_takes_to_have_more_than_cores(cores: int, team: int) -> None:
    count = sleepers_needed(cores, team)
    assert count >= 1
    assert team + count * (team - 1) > cores
    assert count == 1 or team + (count - 1) * (team - 1) <= cores


def test_a_single_thread_waits_for_nobody() -> None:
    assert sleepers_needed(8, 1) == 0


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.needs("procfs")
@pytest.mark.usefixtures("two_threads")
def test_each_sleeper_has_a_team_which_ends_with_it() -> None:
    def tasks() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    torch.zeros(1 << 17).add_(1)
    before = tasks()
    sleepers = Sleepers(2)
    assert until(lambda: tasks() == before + 4)
    sleepers.end()
    assert until(lambda: tasks() == before)


@pytest.mark.parametrize(("given", "expected"), [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_how_long_threads_spin_is_set_before_torch_is_loaded_unless_it_is_set_already(
    given: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    code = "import minigrpo, os, sys; assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == expected


@pytest.mark.needs("procfs")
@pytest.mark.parametrize(
    "given", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": SPIN_COUNT}, {}]
)
def test_how_threads_wait_is_left_to_a_user_who_has_said_so(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with spin_while_free():
        assert named("minigrpo-spinning") == 0
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", SPIN_COUNT)
    with spin_while_free():
        assert named("minigrpo-spinning") == 1


@pytest.mark.needs("procfs")
def test_sampling_is_watched_outside_of_a_command_too() -> None:
    seen = []
    engine = NativeEngine(make_policy(), stop_ids=[3], rows=8)
    engine.generate(rendered(), 2, Sampling(1.0, 4, 1), progress=lambda *_: seen.append(named("minigrpo-spinning")))
    assert set(seen) == {1}
    assert named("minigrpo-spinning") == 0


@pytest.mark.needs("procfs")
def test_a_watch_that_cannot_start_leaves_the_next_one_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"), spin_while_free():
            pass
    with spin_while_free():
        assert named("minigrpo-spinning") == 1


@pytest.mark.parametrize(("most", "now", "left"), [("max", "12", math.inf), ("100", "12", 88)])
def test_a_control_group_tells_how_many_threads_may_start(tmp_path: Path, most: str, now: str, left: float) -> None:
    (tmp_path / "pids.max").write_text(f"{most}\n")
    (tmp_path / "pids.current").write_text(f"{now}\n")
    assert threads_left(tmp_path) == left


def test_without_a_limit_to_be_read_threads_may_start(tmp_path: Path) -> None:
    assert threads_left(tmp_path) == math.inf


@pytest.mark.usefixtures("two_threads")
def test_no_thread_sleeps_where_too_few_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinning, "sleepers_needed", lambda cores, team: 1)
    monkeypatch.setattr(spinning, "threads_left", lambda: 3)
    sleepers = Sleepers.enough()
    assert named("minigrpo-sleeper") == 0
    sleepers.end()
    monkeypatch.setattr(spinning, "threads_left", lambda: 4)
    sleepers = Sleepers.enough()
    assert named("minigrpo-sleeper") == 1
    sleepers.end()


@pytest.mark.long  # it asks for a machine on which nothing else works
@pytest.mark.needs("procfs")
@pytest.mark.usefixtures("two_threads")
def test_beside_a_busy_program_threads_sleep_and_alone_they_spin() -> None:
    with spin_while_free():
        with busy(len(os.sched_getaffinity(0)) - 1):
            assert until(lambda: named("minigrpo-sleeper") > 0)
        assert until(lambda: named("minigrpo-sleeper") == 0)
