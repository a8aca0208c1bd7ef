"""Honest strategies are judged by what they do: none is called a cheat for its style."""

from __future__ import annotations

import pytest

from minigrpo.tasks.common.code_task import find_program, format_code_block
from tests.tasks.honest_programs import LOSERS, WINNERS
from tests.tasks.test_sudoku import PROMPT, graded, parts, recipe
from minigrpo.tasks.registry import open_task

pytestmark = pytest.mark.needs("linux")  # the sandbox runs nowhere else
EVERY = WINNERS | LOSERS
BRIEF = open_task(
    recipe().model_copy(update={"task": recipe().task.model_copy(update={"games": 1, "fewest": 20, "most": 24})})
)
SHORT = BRIEF.prompts("train")[0]


def test_there_are_fifty_of_them() -> None:
    assert len(WINNERS) >= 40
    assert len(EVERY) >= 50


@pytest.mark.parametrize("name", EVERY)
def test_an_honest_program_is_run(name: str) -> None:
    program = find_program(format_code_block(EVERY[name]), "strategy", ("board", "initial"))
    assert program.runs, program.complaint


@pytest.mark.parametrize("name", WINNERS)
def test_an_honest_program_that_solves_wins(name: str) -> None:
    grade = graded(WINNERS[name], BRIEF, SHORT)
    assert (parts(grade), grade.solved) == ((1.0, 1.0, 30.0), True), grade.notes


@pytest.mark.parametrize("name", LOSERS)
def test_an_honest_program_that_fails_loses_by_its_moves(name: str) -> None:
    grade = graded(LOSERS[name])
    assert parts(grade)[:2] == (1.0, 1.0), grade.notes
    assert -3.0 <= parts(grade)[2] < 12.0
    assert not grade.solved
