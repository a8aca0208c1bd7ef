"""Read a log that another process writes: each time only the whole lines that were appended since."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

TAIL = 64
"""Bytes before the end of what was read that are compared before more is read: a resumed run writes anew."""


class GrowingFile:
    """Where reading ended, and what stood there. Not safe to use from several threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen, self._tail = 0, b""

    def appended(self, forget: Callable[[], None]) -> Iterator[tuple[int, bytes]]:
        """Yield (where it begins, the line) for each new line that has its end.

        Where the file is another one, or was cut, call `forget` first and yield all of its lines.
        """
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size == self._seen:
            return
        if not size:
            self._seen, self._tail = 0, b""
            forget()
            return
        with self.path.open("rb", buffering=1 << 20) as stream:
            stream.seek(max(0, self._seen - len(self._tail)))
            if size < self._seen or stream.read(len(self._tail)) != self._tail:
                self._seen = 0
                forget()
            stream.seek(self._seen)
            for line in stream:
                if not line.endswith(b"\n"):  # it is just being written
                    break
                yield self._seen, line
                self._seen += len(line)
            stream.seek(max(0, self._seen - TAIL))
            self._tail = stream.read(self._seen - max(0, self._seen - TAIL))
