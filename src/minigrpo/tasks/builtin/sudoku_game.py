"""Sudoku: a game to play move by move, puzzles with exactly one solution, and the solver that proves it.

    game = SudokuGame(difficulty=38, seed=1)
    while game.state() == "ongoing":
        game.place_number(*my_move(game.board(), game.initial_board()))

`difficulty` is the number of cells removed from a full board. A board is 9 rows of 9 numbers; 0 is an empty cell.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Literal

from minigrpo.errors import TaskError

GameState = Literal["ongoing", "success", "failed"]
_Board = Sequence[Sequence[int]]

_MIN_REMOVED, _MAX_REMOVED = 1, 55
"""Limits of removed cells. Beyond 55 so many boards have a second solution that the search for a unique one is slow."""
MAX_MOVES = 100

_HOUSES = tuple((cell // 9, 9 + cell % 9, 18 + cell // 27 * 3 + cell % 9 // 3) for cell in range(81))
"""The row, the column and the box of each cell, as indices into one list of 27 houses."""
_ALL_DIGITS = 0b1111111110  # a bit for each digit; bit 0 stays empty


class SudokuGame:
    """One puzzle and how far it is solved. The solution is never shown to the player.

    An illegal move ends the game: out of range, not an int (bool does not count as one), onto a filled cell, or a digit
    that its row, column or box has already. A legal but wrong digit does not end it until no legal move is left.
    """

    def __init__(self, difficulty: int, seed: int | str = 0) -> None:
        self.difficulty, self.seed = difficulty, seed
        self._initial, self._solution = generate_puzzle(difficulty, seed)
        self._cells = list(self._initial)
        self._moves = 0
        self._state: GameState = "ongoing"

    def board(self) -> list[list[int]]:
        """Return a copy of the current board."""
        return _to_rows(self._cells)

    def initial_board(self) -> list[list[int]]:
        return _to_rows(self._initial)

    def solution(self) -> list[list[int]]:
        return _to_rows(self._solution)

    def state(self) -> GameState:
        return self._state

    def moves(self) -> int:
        """Return the number of legal moves so far."""
        return self._moves

    def place_number(self, row: Any, col: Any, number: Any) -> GameState:
        """Make a move and return the new state. A game that has ended does not change."""
        if self._state != "ongoing":
            return self._state
        if not self.is_legal(row, col, number):
            self._state = "failed"
            return self._state
        self._cells[row * 9 + col] = number
        self._moves += 1
        if 0 not in self._cells:
            self._state = "success"
        elif self._moves >= MAX_MOVES or not any(legal_digits(self._cells)):
            self._state = "failed"
        return self._state

    def is_legal(self, row: Any, col: Any, number: Any) -> bool:
        # `type`, not isinstance: a subclass of int may define == and hash in any way.
        if not all(type(part) is int for part in (row, col, number)):
            return False
        if not (0 <= row < 9 and 0 <= col < 9 and 1 <= number <= 9):
            return False
        return not self._cells[row * 9 + col] and bool(legal_digits(self._cells)[row * 9 + col] >> number & 1)

    def pretty(self, colour: bool = True) -> str:
        """Return the board as text for a terminal: given digits bold, right ones green, wrong ones red."""
        return "\n".join(self._lines(colour))

    def _lines(self, colour: bool) -> Iterator[str]:
        bar = "+-------+-------+-------+"
        for row in range(9):
            if row % 3 == 0:
                yield bar
            cells = [self._shown(row * 9 + col, colour) for col in range(9)]
            yield "| " + " | ".join(" ".join(cells[box : box + 3]) for box in (0, 3, 6)) + " |"
        yield bar

    def _shown(self, cell: int, colour: bool) -> str:
        digit = self._cells[cell]
        if not digit:
            return "."
        if not colour:
            return str(digit)
        code = "1" if self._initial[cell] else "32" if digit == self._solution[cell] else "31"
        return f"\033[{code}m{digit}\033[0m"


def _to_rows(cells: Sequence[int]) -> list[list[int]]:
    return [list(cells[start : start + 9]) for start in range(0, 81, 9)]


def legal_digits(cells: Sequence[int]) -> list[int]:
    """Return for each empty cell its legal digits as a bit mask; 0 for a filled cell."""
    used = _used_digits(cells) or [_ALL_DIGITS] * 27
    return [
        0 if digit else _ALL_DIGITS & ~(used[row] | used[col] | used[box])
        for digit, (row, col, box) in zip(cells, _HOUSES, strict=True)
    ]


def _used_digits(cells: Sequence[int]) -> list[int] | None:
    """Return the digits of each house (row, column or box) as a bit mask; None where a house has a digit twice."""
    used = [0] * 27
    for digit, houses in zip(cells, _HOUSES, strict=True):
        for house in houses if digit else ():
            if used[house] >> digit & 1:
                return None
            used[house] |= 1 << digit
    return used


def solutions(board: _Board, limit: int = 2) -> list[list[list[int]]]:
    """Return up to `limit` completions of the board; none where a house has a digit twice.

    Raise ValueError for anything but 9 rows of 9 numbers from 0 to 9.
    """
    cells = list(chain.from_iterable(board))
    if len(board) != 9 or any(len(row) != 9 for row in board) or not all(cell in range(10) for cell in cells):
        raise ValueError("a board is 9 rows of 9 numbers from 0 to 9")
    return [_to_rows(solved) for solved in islice(_iterate_solutions(cells), limit)]


def _iterate_solutions(cells: Sequence[int], rng: random.Random | None = None) -> Iterator[list[int]]:
    """Yield every way to fill the empty cells, always trying the cell with the fewest choices.

    With `rng`, digits are tried in a random order.
    """
    used = _used_digits(cells)
    if used is None:
        return
    filled = list(cells)
    yield from _search_solutions(filled, [cell for cell in range(81) if not filled[cell]], used, rng)


def _search_solutions(
    cells: list[int], empty: list[int], used: list[int], rng: random.Random | None
) -> Iterator[list[int]]:
    """Yield every solution; the arguments are changed during the search and restored afterwards."""
    if not empty:
        yield list(cells)
        return
    fewest, best, legal = 10, 0, 0
    for place, cell in enumerate(empty):
        row, col, box = _HOUSES[cell]
        free = _ALL_DIGITS & ~(used[row] | used[col] | used[box])
        count = free.bit_count()
        if count < fewest:
            fewest, best, legal = count, place, free
            if count < 2:
                break
    cell = empty[best]
    rest = empty[:best] + empty[best + 1 :]
    for digit in _list_digits(legal, rng):
        for house in _HOUSES[cell]:
            used[house] ^= 1 << digit
        cells[cell] = digit
        yield from _search_solutions(cells, rest, used, rng)
        cells[cell] = 0
        for house in _HOUSES[cell]:
            used[house] ^= 1 << digit


def _list_digits(legal: int, rng: random.Random | None) -> list[int]:
    digits = [digit for digit in range(1, 10) if legal >> digit & 1]
    if rng is not None:
        rng.shuffle(digits)
    return digits


@lru_cache(maxsize=4096, typed=True)
def generate_puzzle(difficulty: int, seed: int | str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (cells of a puzzle with exactly one solution, cells of that solution), the same for the same arguments."""
    if type(difficulty) is not int or not _MIN_REMOVED <= difficulty <= _MAX_REMOVED:
        raise TaskError(
            f"A sudoku cannot have {difficulty!r} cells removed. Choose from {_MIN_REMOVED} to {_MAX_REMOVED}."
        )
    rng = random.Random(f"sudoku {difficulty} {seed}")
    while True:
        full = next(_iterate_solutions([0] * 81, rng))
        cells = _remove_cells(full, difficulty, rng)
        if cells is not None:
            return tuple(cells), tuple(full)


def _remove_cells(full: Sequence[int], difficulty: int, rng: random.Random) -> list[int] | None:
    """Return the board with `difficulty` cells removed and still one solution; None where this board does
    not allow it.
    """
    cells, waiting = list(full), rng.sample(range(81), 81)
    missing = difficulty
    size = min(missing, 32)
    while missing and len(waiting) >= missing:
        # Remove many at once: most boards stay unique, and one proof covers all of them.
        size = min(size, missing)
        tried = list(cells)
        for cell in waiting[:size]:
            tried[cell] = 0
        if _has_one_solution(tried):
            cells, waiting, missing = tried, waiting[size:], missing - size
        elif size > 1:
            size = (size + 1) // 2
        else:
            waiting = waiting[1:]
    return None if missing else cells


def _has_one_solution(cells: Sequence[int]) -> bool:
    return len(list(islice(_iterate_solutions(cells), 2))) == 1
