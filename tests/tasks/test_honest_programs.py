"""Honest strategies are judged by what they do: none is called a cheat for its style."""

from __future__ import annotations

import pytest

from minigrpo.config.schema import Recipe, SandboxConfig
from minigrpo.tasks.builtin.sudoku import grade_strategy
from minigrpo.tasks.common.code_task import ParsedProgram, find_program, format_code_block
from minigrpo.tasks.registry import open_task
from tests.tasks import honest_habits, honest_programs
from tests.tasks.honest_programs import SOLVE
from tests.tasks.test_sudoku import graded, parts

pytestmark = pytest.mark.needs("linux")  # the sandbox runs nowhere else
WINNERS = honest_programs.WINNERS | honest_habits.WINNERS
LOSERS = honest_programs.LOSERS | honest_habits.LOSERS
EVERY = WINNERS | LOSERS
EASY = {"task": {"name": "sudoku", "size": 1, "games": 1, "fewest": 20, "most": 24}, "sandbox": {"cpu_seconds": 2.0}}
TASK = open_task(Recipe.model_validate(EASY))
PROMPT = TASK.prompts("train")[0]


def test_there_are_seventy_of_them() -> None:
    assert len(WINNERS) >= 60
    assert len(EVERY) >= 70


@pytest.mark.parametrize("name", EVERY)
def test_an_honest_program_is_run(name: str) -> None:
    program = find_program(format_code_block(EVERY[name]), "strategy", ("board", "initial"))
    assert program.runs, program.complaint


@pytest.mark.parametrize("name", WINNERS)
def test_an_honest_program_that_solves_wins(name: str) -> None:
    grade = graded(WINNERS[name], TASK, PROMPT)
    assert (parts(grade), grade.solved) == ((1.0, 1.0, 30.0), True), grade.notes


@pytest.mark.parametrize("name", LOSERS)
def test_an_honest_program_that_fails_loses_by_its_moves(name: str) -> None:
    grade = graded(LOSERS[name])
    assert parts(grade)[:2] == (1.0, 1.0), grade.notes
    assert -3.0 <= parts(grade)[2] < 12.0
    assert not grade.solved


BY_ADDRESS = """
def strategy(board, initial):
    class Cell:
        def __init__(self, r, c):
            self.place = r, c
    cells = {Cell(r, c) for r in range(9) for c in range(9) if not board[r][c]}
    import builtins
    builtins.calls = calls = getattr(builtins, "calls", 0) + 1
    cell = sorted(cells, key=lambda cell: cell.place)[calls % len(cells)]
    solve(board)
    r, c = cell.place
    return r, c, {number}
"""


@pytest.mark.parametrize(
    ("number", "clean"),
    [
        ("board[r][c]", 1.0),
        ("board[r][c] if calls > 1 or len(cells) > 10 else board[r][c] % 9 + 1", -20.0),
        ("board[r][c] if calls > 1 or len(cells) > 10 else None", -20.0),
        ("board[r][c] if calls > 1 or len(cells) > 10 else float(board[r][c])", -20.0),
    ],
)
def test_another_answer_to_the_same_board_may_differ_if_it_is_right(number: str, clean: float) -> None:
    """A counter stands in for the order of addresses, so that the answers differ for sure."""
    program = ParsedProgram(SOLVE + BY_ADDRESS.replace("{number}", number))
    grade = grade_strategy(PROMPT, program, {}, SandboxConfig(cpu_seconds=2.0))
    assert (grade.parts["no_cheating"], grade.solved) == (clean, clean > 0), grade.notes
