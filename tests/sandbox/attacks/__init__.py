"""Programs that mean harm, as data: what each tries, its source, and which verdicts are an honest answer to it.

Every source defines `attack(number, place)`: `number` is harmless, `place` the path of a planted file. A referee keeps
the solution, and anything returned but the solution is "wrong". So "ok" is an escape, whoever it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import dedent

STOPPED = frozenset({"blocked", "error", "wrong"})
SPENT = frozenset({"timeout", "memory", "error", "blocked"})


@dataclass(frozen=True, slots=True)
class Attack:
    name: str
    tries: str
    source: str
    verdicts: frozenset[str] = STOPPED


def body(name: str, tries: str, lines: str, verdicts: frozenset[str] = STOPPED) -> Attack:
    """An attack inside the function."""
    inner = "\n".join("    " + line for line in dedent(lines).strip().splitlines())
    return Attack(name, tries, f"def attack(number, place):\n{inner}\n", verdicts)


def whole(name: str, tries: str, text: str, verdicts: frozenset[str] = STOPPED) -> Attack:
    """An attack that is a whole program."""
    return Attack(name, tries, dedent(text), verdicts)


def calls(kind: str, rows: dict[str, str], verdicts: frozenset[str] = STOPPED) -> tuple[Attack, ...]:
    """One attack for each expression, which is returned as text."""
    return tuple(
        body(name, f"{kind}: {line.splitlines()[0]}", "import os, sys\nreturn str(" + line + ")", verdicts)
        for name, line in rows.items()
    )


def every() -> tuple[Attack, ...]:
    from tests.sandbox.attacks import detours, inputs, lies, reach, resources, walks

    return tuple(attack for part in (reach, resources, walks, lies, inputs, detours) for attack in part.ATTACKS)
