"""The sandbox's vocabulary: limits, verdicts, outcomes, and the referee's part in them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Plain = None | bool | int | float | str | list[Any] | tuple[Any, ...] | dict[Any, Any]
"""What may cross the border, bounded in size and depth."""

Verdict = Literal["ok", "wrong", "error", "timeout", "memory", "blocked", "infrastructure"]

T = TypeVar("T")
Referee = Generator[tuple[Plain, ...], Plain, T]
"""Yields the arguments of the next call, is sent what the program returned, and returns its judgement."""

DETAIL = 300
WALL_FACTOR = 10.0


class Wrong(Exception):  # noqa: N818
    """Raised by a referee: what the program returned loses the game."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program, over all its calls.

    CPU time decides. Wall time only finds what hangs, so it is ten times that unless it is set: the same program takes
    three times as long on a busy machine. `memory_mb` counts beyond what the interpreter itself takes, `output_bytes`
    each returned value, `input_bytes` the program and each call's arguments.
    """

    cpu_s: float = 1.0
    wall_s: float | None = None
    memory_mb: int = 64
    output_bytes: int = 65536
    input_bytes: int = 4 * 2**20
    calls: int = 1000

    @property
    def wall(self) -> float:
        return WALL_FACTOR * self.cpu_s if self.wall_s is None else self.wall_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program did. `result` is what the referee returned, and is there with the verdict "ok" alone.

    wrong: the referee says so. error: the program's own exception, or a value that is not plain. timeout, memory:
    beyond a limit. blocked: it tried what it may not. infrastructure: the machine's fault, never to be scored.
    """

    verdict: Verdict
    detail: str = ""
    result: Any = None
    calls: int = 0
    cpu_s: float = 0.0


def printable(text: str) -> str:
    """One short line, whatever the text does: no control characters, no escape sequences, no change of direction."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * DETAIL])
    return " ".join(line.split())[:DETAIL]
