"""Call what may never end: a program of a stranger's, such as a chat template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _Stopped(SystemExit):
    """Raised inside of a call that took too long. SystemExit is the kind that ends a thread without a traceback."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what the call returns, or raise what it raises; raise TimeoutError after so many seconds.

    It runs in a daemon thread, which is stopped then, at its next line of Python. Not covered: a call that hangs inside
    of a C extension goes on.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            returned.append(call())
        except BaseException as fault:  # it belongs to whoever waits
            raised.append(fault)

    thread = threading.Thread(target=work, name="call with a deadline", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped))
        raise TimeoutError(f"not done within {seconds:g} s")
    if raised:
        raise raised[0]
    return returned[0]
