"""The command line as a user meets it: called in this process or in one of its own, with what it printed.

`called` and `started` hold every call to the promise of the command line: no traceback, no hang, and an exit code that
means something. An error of ours escapes `called` as itself, with its own traceback.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from minigrpo.cli.main import main

LONGEST_S = 60
"""Seconds that no command of these tests may take."""
DONE, UNFIT, REFUSED = 0, 1, 2
"""Exit codes: all is well; it was looked at and is not fit for use; a user's mistake, told in a sentence."""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def refused(self) -> str:
        """Return the sentence of a refusal. Fails where the command did anything else."""
        assert self.code == REFUSED, f"ended with {self.code}:\n{self.out}\n{self.err}"
        assert "error: " in self.err or "Usage: " in self.err, self.err  # lines of progress may stand before it
        return self.err


class TookTooLong(BaseException):
    """A command ran for LONGEST_S. No `except Exception` may swallow it."""


def called(*args: str | Path) -> Ended:
    """Run a command line in this process."""
    # Streams with bytes below them, as a terminal's are: half a character cannot be written to them.
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    code: object = None
    with redirect_stdout(out), redirect_stderr(err), _own_import_path(), _at_most(LONGEST_S):
        try:
            main([str(arg) for arg in args])
        except SystemExit as ended:
            code = ended.code
    return kept_promise(Ended(int(str(code or 0)), *(_text_of(stream) for stream in (out, err))))


def started(*args: str | Path, cwd: Path, **environment: str) -> Ended:
    """Run a command line in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "minigrpo", *map(str, args)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        timeout=LONGEST_S,
        check=False,
    )
    return kept_promise(Ended(ended.returncode, ended.stdout, ended.stderr))


def kept_promise(ended: Ended) -> Ended:
    """Return what ended. Fails where it shows a traceback, a code that means nothing, or a refusal without words."""
    assert "Traceback" not in ended.out + ended.err, ended.err
    assert ended.code in (DONE, UNFIT, REFUSED), f"ended with {ended.code}:\n{ended.out}\n{ended.err}"
    assert ended.code != REFUSED or ended.err.strip()
    return ended


def _text_of(stream: io.TextIOWrapper) -> str:
    stream.flush()
    bytes_below = stream.buffer
    assert isinstance(bytes_below, io.BytesIO)
    return bytes_below.getvalue().decode("utf-8")


@contextmanager
def _own_import_path() -> Iterator[None]:
    """Forget the folders of users' files, which the command appends: a process has one, and a test hundreds."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the block after so many seconds; where there is no SIGALRM, pytest's own limit has to do."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TookTooLong(f"{seconds:g} seconds")

    handler, began = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of pytest's own limit, which goes on afterwards
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3) if left else 0)
