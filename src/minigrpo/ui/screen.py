"""Print to streams that may be full, closed, gone, or unable to encode a text: no display is worth what it shows.

`Lenient` is a stream that never fails, `lenient_streams` makes stdout and stderr of a command such streams, and
`Screen` is the console that everything is printed with, in notebooks and scripts too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.console import Group as Stack
from rich.text import Text

from minigrpo.errors import MinigrpoError

PLAINER = str.maketrans(
    {"→": "->", "·": "-", "…": "...", "±": "+-", "×": "x", "≤": "<=", "≥": ">=", "–": "-", "—": "-", "’": "'"}
    | dict.fromkeys("▁▂▃▄▅▆▇█━╸╺", "#")
)
"""What stands for a character of ours where a terminal has it not."""


class Lenient:
    """A text stream that never fails. What it cannot encode is written plainer; what it cannot take is dropped, and
    `fault` says why, the first time. All else is the stream's own. `told`: the user knows of the fault."""

    def __init__(self, stream: IO[Any], faults: list[Exception] | None = None) -> None:
        self.stream = stream
        self.told = False
        self._faults: list[Exception] = [] if faults is None else faults

    @property
    def fault(self) -> Exception | None:
        return next(iter(self._faults), None)

    @property
    def buffer(self) -> Lenient:
        """The stream of bytes below, as lenient: typer's help goes to it where the encoding is ASCII."""
        return Lenient(self.stream.buffer, self._faults)  # type: ignore[attr-defined]

    def write(self, text: Any) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(encodable(text, getattr(self.stream, "encoding", None) or "ascii"))
        except (OSError, ValueError) as fault:  # ValueError: the stream is closed
            self._note(fault)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as fault:
            self._note(fault)

    def _note(self, fault: Exception) -> None:
        if not self._faults:
            self._faults.append(fault)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def encodable(text: str, encoding: str) -> str:
    """Write a text in the characters of an encoding; those that have no plainer form, as escapes: \\u4f60."""
    return text.translate(PLAINER).encode(encoding, "backslashreplace").decode(encoding)


def stdout_encodes(text: str) -> bool:
    """Return whether stdout can encode the text as it is."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


NARROWEST, USUAL = 20, 80
"""Columns below which a table shows nothing that can be read, and what is taken instead: where nobody knows the width,
COLUMNS is 0 or 1."""


class Screen(Console):
    """A console whose display never ends a command."""

    @property
    def size(self) -> ConsoleDimensions:
        told = super().size
        return told if told.width >= NARROWEST else ConsoleDimensions(USUAL, told.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    @property
    def file(self) -> IO[str]:
        found: Any = super().file
        lenient: Any = found if isinstance(found, Lenient) else Lenient(found)
        return lenient

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def show(self, part: RenderableType) -> None:
        """Print tables to the width of the terminal, and texts without breaking their lines: commands are copied."""
        if isinstance(part, Stack):
            for each in part.renderables:
                self.show(each)
        else:
            self.print(part, soft_wrap=isinstance(part, Text))


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Let nothing that is printed in the block fail. Afterwards say once, on stderr, what stdout could not take.

    The exit code then tells what the command did, not what became of its display.
    """
    _open_standard_handles()
    before = sys.stdout, sys.stderr
    out, err = (Lenient(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115 (the process's own)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        if out.fault is not None and not out.told and not isinstance(out.fault, BrokenPipeError):
            err.write(f"Not everything could be printed to stdout: {_reason(out.fault)}. The work itself was done.\n")
        err.flush()
        sys.stdout, sys.stderr = before
        for each in (out, err):
            _discard_rest(each)


def print_result(text: str, end: str = "\n") -> None:
    """Print what a command is called for, to stdout. Raise MinigrpoError where that cannot take it.

    A reader that has gone (`| head`) wants no more, which is no fault.
    """
    print(text, end=end)
    sys.stdout.flush()
    stream: Any = sys.stdout
    fault = getattr(stream, "fault", None)
    if fault is not None and not isinstance(fault, BrokenPipeError):
        stream.told = True
        raise MinigrpoError(f"The result could not be written to stdout: {_reason(fault)}. Send it to another place.")


def _reason(fault: Exception) -> str:
    return str(getattr(fault, "strerror", None) or fault)


def _open_standard_handles() -> None:
    """Open the null device where a standard handle is closed: the next file would get its number, and whatever a
    library prints would be written into that file."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == handle:
                os.set_inheritable(handle, True)


def _discard_rest(lenient: Lenient) -> None:
    """Send what a stream still holds, and cannot deliver, to nowhere: Python would end with exit code 120 for it."""
    with suppress(OSError, ValueError):
        try:
            lenient.stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, lenient.stream.fileno())
            os.close(null)
            lenient.stream.flush()
