"""Let Ctrl-C and SIGTERM ask a run to stop: it finishes and saves its step first. A second signal stops at once.

`is_alive` asks the system about another process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def finish_first() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether somebody asked to stop. Outside the main thread, leave signals alone.

    A signal that is ignored stays ignored: a shell script starts its background jobs with SIGINT ignored, so that
    Ctrl-C for what runs in the foreground does not stop them; SIGTERM does.
    """
    asked: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        # The signal may have come in the middle of a write to the same stream, or its terminal may be gone.
        with suppress(RuntimeError, OSError, ValueError):
            print("\nStopping: this step is finished and saved first. Once more to stop at once.", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handled = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in handled}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine has that number; True where asking would do harm."""
    if os.name == "nt":
        return True  # os.kill(pid, 0) would send it Ctrl-C there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
