"""Slips of the pen: what makes a right program a broken one. Each takes the text of a program and gives another."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

RETURNED = re.compile(r"return \(?(\w+), (\w+), ")


def without_colon(text: str, rng: random.Random) -> str:
    return without_one(text, ":\n", "\n", rng)


def without_parenthesis(text: str, rng: random.Random) -> str:
    return without_one(text, ")", "", rng)


def without_one(text: str, what: str, instead: str, rng: random.Random) -> str:
    """One of its places, drawn at random, replaced."""
    pieces = text.split(what)
    place = rng.randrange(1, len(pieces))
    return what.join(pieces[:place]) + instead + what.join(pieces[place:])


def column_first(text: str, rng: random.Random) -> str:
    return RETURNED.sub(lambda found: found[0].replace(f"{found[1]}, {found[2]}", f"{found[2]}, {found[1]}"), text)


def counted_from_one(text: str, rng: random.Random) -> str:
    return RETURNED.sub(
        lambda found: found[0].replace(f"{found[1]}, {found[2]}", f"{found[1]} + 1, {found[2]} + 1"), text
    )


def without_return(text: str, rng: random.Random) -> str:
    return text.replace("return ", "")


def misnamed(text: str, rng: random.Random) -> str:
    """A grid by another name, which nobody has defined."""
    return text.replace("board[", "grid[")


def without_fences(text: str, rng: random.Random) -> str:
    return text.removeprefix("```python\n").removesuffix("\n```")


def never_closed(text: str, rng: random.Random) -> str:
    return text.removesuffix("\n```")


def other_name(text: str, rng: random.Random) -> str:
    return text.replace("def strategy(", "def solve(")


def in_a_class(text: str, rng: random.Random) -> str:
    return text.replace("def strategy(board, initial):", "class strategy:")


SLIPS: tuple[Callable[[str, random.Random], str], ...] = (
    without_colon,
    without_parenthesis,
    column_first,
    counted_from_one,
    without_return,
    misnamed,
    without_fences,
    never_closed,
    other_name,
    in_a_class,
)
