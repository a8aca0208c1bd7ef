"""The sandbox's data types: limits, verdicts, outcomes, and the referee."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Plain = None | bool | int | float | str | list[Any] | tuple[Any, ...] | dict[Any, Any]
"""Values that may be passed between program and referee, bounded in size and depth."""

Verdict = Literal["ok", "wrong", "error", "timeout", "memory", "blocked", "infrastructure"]

T = TypeVar("T")
Referee = Generator[tuple[Plain, ...], Plain, T]
"""A generator: it yields the arguments of the next call, is sent the program's value, and returns its judgement."""

MAX_DETAIL_CHARS = 300
WALL_FACTOR = 10.0


class Wrong(Exception):  # noqa: N818
    """Raised by a referee: what the program returned loses the game."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one program, over all its calls.

    CPU time decides. Wall time only finds programs that hang, so it is ten times the CPU time unless it is set: the
    same program takes three times as long on a busy machine. `memory_mb`: memory beyond the interpreter's own;
    `output_bytes`: each returned value; `input_bytes`: the program, and each call's arguments.
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
    """The outcome of a program. `result`: what the referee returned; None unless the verdict is "ok".

    wrong: the referee rejects its value. error: the program's own exception, or a value that is not plain. timeout,
    memory: beyond a limit. blocked: it tried something forbidden. infrastructure: the machine's fault, never graded.
    `compiled`: False where the program is an error because it does not compile.
    """

    verdict: Verdict
    detail: str = ""
    result: Any = None
    calls: int = 0
    cpu_s: float = 0.0
    compiled: bool = True


def printable(text: str) -> str:
    """Shorten text to one line without control characters, escape sequences or changes of direction."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * MAX_DETAIL_CHARS])
    return " ".join(line.split())[:MAX_DETAIL_CHARS]
