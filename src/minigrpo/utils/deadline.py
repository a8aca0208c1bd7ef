"""Call what may never end: a program of a stranger's, such as a chat template.

Thousands of prompts are rendered one after the other, so a call costs no thread of its own: it runs in the caller's,
and one watchdog for the whole process raises an exception there when a call is late. The watchdog looks at the clock
as long as calls come; nobody wakes it.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

TICK_S = 0.1
"""Seconds between two looks of the watchdog: a call may be late by as much before it is stopped."""
IDLE_S = 5.0
"""Seconds without a call after which the watchdog ends; the next call starts another."""


class _Stopped(SystemExit):
    """Raised in a call that took too long; no `except Exception` of a library swallows a SystemExit."""


@dataclass(eq=False, slots=True)
class _Call:
    """A call in a thread, until `end` of the monotonic clock. `late`: it was stopped, or will be at its next line."""

    thread: int
    end: float
    late: bool = False


_lock = threading.Lock()
_open: set[_Call] = set()
_watched = False


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what the call returns, or raise what it raises; raise TimeoutError after so many seconds.

    It is stopped at its next line of Python. Not covered: a call that hangs inside of a C extension goes on.
    """
    one = _Call(threading.get_ident(), time.monotonic() + seconds)
    try:
        try:
            _begin(one)
            return call()
        finally:
            _end(one)
    except _Stopped:
        if not one.late:  # but one that encloses it
            raise
        _end(one)  # again: the stop may have come while it was ended
        raise TimeoutError(f"not done within {seconds:g} s") from None


def _begin(one: _Call) -> None:
    global _watched
    with _lock:
        _open.add(one)
        if not _watched:
            threading.Thread(target=_watch, name="deadlines", daemon=True).start()
            _watched = True


def _end(one: _Call) -> None:
    """Close a call: nothing is raised for it afterwards, not even what the watchdog has sent already."""
    with _lock:
        _open.discard(one)
        if one.late:
            _raise_in(one.thread, None)


def _watch() -> None:
    """Stop late calls until none has come for a while."""
    global _watched
    used = time.monotonic()
    while True:
        time.sleep(TICK_S)
        with _lock:
            now = time.monotonic()
            used = now if _open else used
            if now - used > IDLE_S:
                _watched = False
                return
            _stop_late(now)


def _stop_late(now: float) -> None:
    """Stop late calls, again at every tick: the exception may be lost (in a `__del__`), or cleared by the end of a call
    inside."""
    for one in [one for one in _open if now > one.end]:
        one.late = True
        if not _raise_in(one.thread, _Stopped):  # the thread is gone: a fork took only its own along
            _open.discard(one)


def _raise_in(thread: int, kind: type[BaseException] | None) -> int:
    """Have a thread raise an exception at its next line of Python, None for no longer; return how many threads that
    is."""
    wanted = ctypes.py_object(kind) if kind else None
    return int(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), wanted))


def _forked() -> None:
    """Begin anew in a child process, where no watchdog runs and its lock may be held for ever."""
    global _lock, _watched
    _lock, _watched = threading.Lock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
