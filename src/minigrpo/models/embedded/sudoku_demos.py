"""Demonstrations for the embedded coder (`seedling:coder`): programs that play Sudoku, as imperfect teachers write
them.

One line asks for a program; the programs are composed (`sudoku_programs`), and a minority of them win.
"""

from __future__ import annotations

import random

from minigrpo.models.embedded import sudoku_programs
from minigrpo.tasks.builtin.sudoku import prompt_messages
from minigrpo.types import Message

_GAMES_RANGE, _CELLS_RANGE = (1, 5), (10, 55)
"""Ranges of the number of puzzles in a question, and of the number of empty cells of each."""


def sudoku_demonstrations(seed: int, size: int) -> list[tuple[tuple[Message, ...], str]]:
    """Return (question, answer) pairs: questions as the task asks them, without an example, and independent
    programs.
    """
    rng = random.Random(f"questions {seed}")
    return [(_draw_question(rng), shown.text) for shown in sudoku_programs.make_strategies(seed, size)]


def _draw_question(rng: random.Random) -> tuple[Message, ...]:
    return prompt_messages(sorted(rng.randint(*_CELLS_RANGE) for _ in range(rng.randint(*_GAMES_RANGE))))
