"""The training programs of the embedded coder: many different ones, of which a minority win."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.models.embedded.sudoku_programs import (
    HABIT_SHARES,
    VARIABLE_NAMES,
    WINNING_HABITS,
    Strategy,
    generate_strategies,
    make_strategies,
)
from minigrpo.tasks.registry import open_task

KNOWN = re.compile(rf"\b(?:{'|'.join(name for names in VARIABLE_NAMES.values() for name in names)})\b")


def shape(text: str) -> str:
    """Return the text with names numbered in order of appearance: programs that differ only in names are equal."""
    seen: dict[str, str] = {}
    return KNOWN.sub(lambda found: seen.setdefault(found[0], f"v{len(seen)}"), text)


def count_wins(shown: list[Strategy]) -> Counter[str]:
    """Count wins by habit, in the sandbox, on puzzles like those of the recipe."""
    puzzles = {"name": "sudoku", "games": 2, "fewest": 26, "most": 32}
    task = open_task(Recipe.model_validate({"task": puzzles, "sandbox": {"cpu_seconds": 0.3}}))
    prompts = task.prompts("test")[:50]
    won: Counter[str] = Counter()
    for place, one in enumerate(shown):
        won[one.habit] += task.grade(prompts[place % len(prompts)], one.text).solved
    return won


def test_more_than_ten_thousand_programs_differ_in_more_than_names() -> None:
    whole = (one for one in generate_strategies(0) if one.habit != "broken")
    assert len({shape(one.text) for one in islice(whole, 15_000)}) >= 10_000


def test_renaming_alone_makes_no_new_program() -> None:
    one, other = "for r in range(9):\n    return r, board", "for row in range(9):\n    return row, board"
    assert shape(one) == shape(other)
    assert shape(one) != shape(one.replace("r, board", "board, r"))


def test_the_same_seed_gives_the_same_programs() -> None:
    assert make_strategies(3, 50) == make_strategies(3, 50)
    assert make_strategies(3, 50) != make_strategies(4, 50)


def test_habits_come_in_their_shares_and_winners_are_a_minority() -> None:
    counts = Counter(one.habit for one in make_strategies(0, 5000))
    assert counts.keys() == HABIT_SHARES.keys()
    assert all(abs(counts[habit] / 5000 - share) < 0.03 for habit, share in HABIT_SHARES.items())
    assert sum(HABIT_SHARES[habit] for habit in WINNING_HABITS) < 0.2


def test_every_winning_habit_wins_in_the_sandbox_and_broken_programs_do_not() -> None:
    shown = make_strategies(1, 400)
    few = [
        one for habit in (*WINNING_HABITS, "broken", "cheating") for one in [s for s in shown if s.habit == habit][:4]
    ]
    won = count_wins(few)
    assert {habit: won[habit] for habit in WINNING_HABITS} == dict.fromkeys(WINNING_HABITS, 4)
    assert won["broken"] == won["cheating"] == 0


@pytest.mark.long
def test_at_most_a_fifth_of_the_programs_win_in_the_sandbox() -> None:
    assert count_wins(make_strategies(0, 400)).total() <= 80
