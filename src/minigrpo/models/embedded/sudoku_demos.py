"""Demonstrations for the embedded coder (`seedling:coder`): programs that play Sudoku, as imperfect teachers write
them.

One line asks for a program; the programs are composed (`sudoku_programs`), and a minority of them win. The tokenizer
splits names from what is between them, so that a program is about a hundred tokens, and one name is the same token
everywhere: that way a small model can keep to the names that it began with.
"""

from __future__ import annotations

import random

from minigrpo.models.embedded import sudoku_programs
from minigrpo.tasks.builtin.sudoku import prompt_messages
from minigrpo.types import Message

_GAMES_RANGE, _CELLS_RANGE = (1, 5), (10, 55)
"""Ranges of the number of puzzles in a question, and of the number of empty cells of each."""


def name_pattern() -> str:
    """Return the pattern of pieces that no merge may cross: a line's beginning, a name.

    Text between them may be merged.
    """
    names = sorted(
        {name for names in sudoku_programs.VARIABLE_NAMES.values() for name in names},
        key=lambda name: (-len(name), name),
    )
    return rf"\n *|\b(?:{'|'.join(names)})\b"


def sudoku_demonstrations(seed: int, size: int) -> list[tuple[tuple[Message, ...], str]]:
    """Return (question, answer) pairs: questions as the task asks them, without an example, and independent
    programs.
    """
    rng = random.Random(f"questions {seed}")
    return [(_draw_question(rng), shown.text) for shown in sudoku_programs.make_strategies(seed, size)]


def _draw_question(rng: random.Random) -> tuple[Message, ...]:
    return prompt_messages(sorted(rng.randint(*_CELLS_RANGE) for _ in range(rng.randint(*_GAMES_RANGE))))
