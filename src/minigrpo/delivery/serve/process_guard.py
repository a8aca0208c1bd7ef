"""Supervise one server process and end it when the process that started it is gone: no server is left behind.

    python -P serve/process_guard.py PROGRAM ...     run a program and exit with its code

The parent holds our stdin open and never writes to it; the pipe closes when the parent lets go or dies, in whatever
way. Then the program is asked to end (SIGINT, then SIGTERM), and what is left of its process group is killed. Ctrl-C in
a terminal reaches a whole process group: that is why we lead one of our own. Started by path, so this file imports
nothing of the package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

STOP_TIMEOUT_S = 10.0
"""Seconds for a program to end by itself after each signal."""
PR_SET_PDEATHSIG = 1
"""Linux: option of prctl by which the kernel kills a child when its parent dies."""


def supervise(program: list[str]) -> int:
    """Run the program until it ends or stdin closes; return its exit code."""
    child = subprocess.Popen(program, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent())
    ending = threading.Event()

    def end(*_: object) -> None:
        if not ending.is_set():
            ending.set()
            threading.Thread(target=_ask_to_end, args=(child,), daemon=True).start()

    def follow() -> None:
        while os.read(0, 4096):  # not through Python's stdin, whose lock would block the exit
            pass
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=follow, daemon=True).start()
    code = child.wait()
    if ending.is_set() and os.name != "nt":
        os.killpg(os.getpgrp(), signal.SIGKILL)  # what the program left running, and ourselves
    return 128 - code if code < 0 else code


def _die_with_parent() -> Callable[[], None] | None:
    """Return a function for the child to run before exec: it then dies with us even if we are killed. None where the
    system has no such option."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _ask_to_end(child: subprocess.Popen[bytes]) -> None:
    """Send SIGINT, then SIGTERM, then kill."""
    ways = (child.terminate,) if os.name == "nt" else (lambda: child.send_signal(signal.SIGINT), child.terminate)
    for way in ways:
        with suppress(OSError):
            way()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_TIMEOUT_S)
            return
    child.kill()


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
