"""Bugs that break a right program. Each function takes the text of a program and returns a broken one."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

_RETURNED = re.compile(r"return \(?(\w+), (\w+), ")


def _without_colon(text: str, rng: random.Random) -> str:
    return _replace_one(text, ":\n", "\n", rng)


def _without_parenthesis(text: str, rng: random.Random) -> str:
    return _replace_one(text, ")", "", rng)


def _replace_one(text: str, what: str, instead: str, rng: random.Random) -> str:
    """Replace one occurrence, drawn at random."""
    pieces = text.split(what)
    place = rng.randrange(1, len(pieces))
    return what.join(pieces[:place]) + instead + what.join(pieces[place:])


def _column_first(text: str, rng: random.Random) -> str:
    return _RETURNED.sub(lambda found: found[0].replace(f"{found[1]}, {found[2]}", f"{found[2]}, {found[1]}"), text)


def _counted_from_one(text: str, rng: random.Random) -> str:
    return _RETURNED.sub(
        lambda found: found[0].replace(f"{found[1]}, {found[2]}", f"{found[1]} + 1, {found[2]} + 1"), text
    )


def _without_return(text: str, rng: random.Random) -> str:
    return text.replace("return ", "")


def _misnamed(text: str, rng: random.Random) -> str:
    """Read the grid under another name, which is not defined."""
    return text.replace("board[", "grid[")


def _without_fences(text: str, rng: random.Random) -> str:
    return text.removeprefix("```python\n").removesuffix("\n```")


def _never_closed(text: str, rng: random.Random) -> str:
    return text.removesuffix("\n```")


def _other_name(text: str, rng: random.Random) -> str:
    return text.replace("def strategy(", "def solve(")


def _in_a_class(text: str, rng: random.Random) -> str:
    return text.replace("def strategy(board, initial):", "class strategy:")


PROGRAM_BUGS: tuple[Callable[[str, random.Random], str], ...] = (
    _without_colon,
    _without_parenthesis,
    _column_first,
    _counted_from_one,
    _without_return,
    _misnamed,
    _without_fences,
    _never_closed,
    _other_name,
    _in_a_class,
)
