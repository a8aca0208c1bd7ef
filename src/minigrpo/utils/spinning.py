"""Idle threads spin where cores are free, and sleep at once where other programs need them.

GNU's OpenMP, which torch uses on Linux, lets a thread that has to wait spin for a while before it sleeps. To wake a
sleeper costs some microseconds, and a decoded token has a thousand waits: on an idle machine spinning is quicker.
Beside a busy program the spinning thread holds the core that the last of the others needs, and a step takes many times
as long.

How long a thread spins is fixed when torch is loaded (GOMP_SPINCOUNT, in minigrpo/__init__.py). But while a process has
more OpenMP threads than cores, the library spins hardly at all. So this module asks the kernel twice a second how long
threads of this process had to wait for a core; where that is long, it keeps further threads, which only sleep. No bit
of a result changes: how work is cut depends on the number of threads alone.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minigrpo.utils.cpu import usable_cores

SPIN_COUNT = "20000"
"""What minigrpo/__init__.py sets GOMP_SPINCOUNT to where nobody has set it."""
TICK_SECONDS = 0.5
LEAST_WORK_SECONDS = 0.05
"""Work of this process in one tick below which the tick says nothing."""
CROWDED = 0.1
"""Seconds of waiting for a core, for each second of work, from which threads stop spinning. Measured on two cores: up
to 0.02 on an idle machine, 0.43 and more beside one busy program, whether threads spin or sleep.
"""

_watching = threading.Lock()


@contextmanager
def spin_while_free() -> Iterator[None]:
    """Let idle threads spin only while no other program needs their cores, until the block ends.

    A second block inside does nothing. So does any block where the system does not tell how long threads wait, where
    torch has another OpenMP, and where the user has said how threads wait (GOMP_SPINCOUNT, OMP_WAIT_POLICY).
    """
    watchable = Path("/proc/self/schedstat").exists() and spinning_is_ours()
    if not watchable or not _watching.acquire(blocking=False):
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="minigrpo-spinning", daemon=True)
    try:
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()
    finally:
        _watching.release()


def spinning_is_ours() -> bool:
    """Tell whether the user has left it to this package how long threads spin."""
    return "OMP_WAIT_POLICY" not in os.environ and os.environ.get("GOMP_SPINCOUNT") == SPIN_COUNT


def _watch(ended: threading.Event) -> None:
    sleepers: Sleepers | None = None
    before = Waiting.now()
    while not ended.wait(TICK_SECONDS):
        before, share = (now := Waiting.now()), now.share_since(before)
        if share is None or not _uses_gnu_openmp():
            continue
        if share >= CROWDED and sleepers is None:
            sleepers = Sleepers.enough()
        elif share < CROWDED and sleepers is not None:
            sleepers.end()
            sleepers = None
    if sleepers is not None:
        sleepers.end()


@dataclass(frozen=True, slots=True)
class Waiting:
    """Seconds that this process has worked, and that its threads have waited for a core while they could have."""

    worked: float
    waited: float

    @classmethod
    def now(cls) -> Waiting:
        waited = 0
        for file in Path("/proc/self/task").glob("*/schedstat"):
            try:
                waited += int(file.read_text(encoding="ascii").split()[1])
            except OSError:  # the thread has just ended
                continue
        return cls(time.process_time(), waited / 1e9)

    def share_since(self, before: Waiting) -> float | None:
        """Return seconds of waiting for each second of work; None where there was too little of it to tell."""
        worked = self.worked - before.worked
        return None if worked < LEAST_WORK_SECONDS else max(0.0, self.waited - before.waited) / worked


def _uses_gnu_openmp() -> bool:
    """Tell whether torch is loaded, and with it GNU's OpenMP."""
    return "torch" in sys.modules and "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")


class Sleepers:
    """Threads that sleep until `end`. Each has a team of OpenMP threads, as every thread that computes has."""

    def __init__(self, count: int) -> None:
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._sleep, name="minigrpo-sleeper", daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def enough(cls) -> Sleepers:
        """Make as many as it takes for this process to have more OpenMP threads than cores; none where the control
        group admits too few threads: GNU's OpenMP ends the process where it can't start one.
        """
        import torch

        team = torch.get_num_threads()
        count = sleepers_needed(usable_cores(), team)
        return cls(count if (count + 1) * team <= threads_left() else 0)

    def _sleep(self) -> None:
        import torch

        torch.zeros(1 << 17).add_(1)  # long enough to be shared out: OpenMP makes a team for this thread
        self._over.wait()

    def end(self) -> None:
        """End them; OpenMP ends their teams with them."""
        self._over.set()
        for thread in self._threads:
            thread.join()


def threads_left(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many threads this control group may still start; infinity where it has no limit."""
    try:
        most, now = ((group / name).read_text(encoding="ascii").strip() for name in ("pids.max", "pids.current"))
    except OSError:
        return math.inf
    return math.inf if most == "max" else int(most) - int(now)


def sleepers_needed(cores: int, team: int) -> int:
    """Return how many threads with teams of that size make, beside one at work, more OpenMP threads than cores.

    0 where a team is a single thread, which waits for nobody.
    """
    return 0 if team < 2 else max(1, -(-(cores + 1 - team) // (team - 1)))
