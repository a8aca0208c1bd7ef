"""What the embedded coder (`seedling:coder`) learns: to write programs that play Sudoku, as imperfect teachers do.

One line asks for a program; the programs are composed (`tasks.strategies`), and a minority of them win. Its tokenizer
keeps names apart from what stands between them, so that a program is some hundred tokens, and one name is one token
wherever it stands: a small model can keep to the names that it began with.
"""

from __future__ import annotations

import random

from minigrpo.models.embedded import sudoku_programs
from minigrpo.tasks.builtin.sudoku import prompt_messages
from minigrpo.types import Message

_GAMES_RANGE, _CELLS_RANGE = (1, 5), (10, 55)
"""How many puzzles a question names, and how many empty cells each of them has."""


def name_pattern() -> str:
    """Of the pieces that no merge may cross: a line's beginning, a name. What stands between them may grow."""
    names = sorted(
        {name for names in sudoku_programs.VARIABLE_NAMES.values() for name in names},
        key=lambda name: (-len(name), name),
    )
    return rf"\n *|\b(?:{'|'.join(names)})\b"


def sudoku_demonstrations(seed: int, size: int) -> list[tuple[tuple[Message, ...], str]]:
    """Questions as the task asks them, without an example, and how the teachers answer. The two are independent."""
    rng = random.Random(f"questions {seed}")
    return [(_draw_question(rng), shown.text) for shown in sudoku_programs.make_strategies(seed, size)]


def _draw_question(rng: random.Random) -> tuple[Message, ...]:
    return prompt_messages(sorted(rng.randint(*_CELLS_RANGE) for _ in range(rng.randint(*_GAMES_RANGE))))
