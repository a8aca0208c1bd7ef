"""Print a line while long work is silent, so that whoever reads a log sees that it goes on, and at what."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

FIRST_S, EVERY_S = 4.0, 10.0
"""Seconds of silence before the first line, and before each further one."""


class Heartbeat:
    """Calls `show` from a thread of its own after some silence, until the block ends.

    `touch`: call it after printing anything else, which ends the silence.
    """

    def __init__(self, show: Callable[[], None], *, first: float = FIRST_S, every: float = EVERY_S) -> None:
        self._show, self._wait, self._every = show, first, every
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def touch(self) -> None:
        self._last, self._wait = time.monotonic(), self._every

    def _beat(self) -> None:
        while not self._over.wait(max(0.0, self._last + self._wait - time.monotonic())):
            if time.monotonic() >= self._last + self._wait:
                self._show()
                self.touch()
