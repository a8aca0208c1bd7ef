"""Sudoku: puzzles have one solution, and the game enforces its rules whatever it is passed."""

from __future__ import annotations

import enum
import random
from typing import Any

import pytest

from minigrpo.errors import TaskError
from minigrpo.tasks.builtin import sudoku_game
from minigrpo.tasks.builtin.sudoku_game import SudokuGame, generate_puzzle, solutions

Move = tuple[Any, Any, Any]


class Loud(int):
    """An int that equals whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class Digit(enum.IntEnum):
    ONE = 1


def game(difficulty: int = 38, seed: int = 1) -> SudokuGame:
    return SudokuGame(difficulty, seed)


def empty_cells(board: list[list[int]]) -> list[tuple[int, int]]:
    return [(row, col) for row in range(9) for col in range(9) if not board[row][col]]


def flat(played: SudokuGame) -> list[int]:
    return [cell for row in played.board() for cell in row]


def right_move(played: SudokuGame) -> tuple[int, int, int]:
    row, col = empty_cells(played.board())[0]
    return row, col, played.solution()[row][col]


def test_a_thousand_puzzles_have_one_solution_and_the_asked_for_empty_cells() -> None:
    cells = [35 + seed % 6 for seed in range(1000)]
    found = [SudokuGame(count, seed) for seed, count in enumerate(cells)]
    assert [len(empty_cells(one.board())) for one in found] == cells
    assert sum(solutions(one.board()) == [one.solution()] for one in found) == 1000
    assert len({str(one.board()) for one in found}) == 1000


@pytest.mark.parametrize("difficulty", [1, 2, 20, 50, 53])
def test_easy_and_hard_puzzles_have_one_solution_too(difficulty: int) -> None:
    one = game(difficulty)
    assert len(empty_cells(one.board())) == difficulty
    assert solutions(one.board()) == [one.solution()]


def test_a_puzzle_follows_from_its_difficulty_and_seed() -> None:
    generate_puzzle.cache_clear()
    first = [generate_puzzle(38, seed) for seed in range(5)]
    generate_puzzle.cache_clear()
    random.seed(4)
    assert [generate_puzzle(38, seed) for seed in range(5)] == first
    assert len({*first, generate_puzzle(39, 0)}) == 6


@pytest.mark.parametrize("difficulty", [0, -1, 56, 81, True, 3.0, "38", None])
def test_a_difficulty_that_cannot_be_is_refused(difficulty: Any) -> None:
    with pytest.raises(TaskError, match=r"cells removed\. Choose from 1 to 55"):
        SudokuGame(difficulty)


def test_every_solution_is_found_and_a_board_with_a_clash_has_none() -> None:
    assert solutions([[1, 1, *[0] * 7], *[[0] * 9 for _ in range(8)]]) == []
    nothing = [[0] * 9 for _ in range(9)]
    assert len(solutions(nothing)) == 2
    assert len(solutions(nothing, limit=5)) == 5
    full = game().solution()
    assert solutions(full) == [full]


@pytest.mark.parametrize("board", [[], [[0] * 9] * 8, [[0] * 8] * 9, [[0] * 8 + [10]] * 9, [["1"] * 9] * 9])
def test_solving_anything_but_a_board_is_refused(board: Any) -> None:
    with pytest.raises(ValueError, match="a board is 9 rows"):
        solutions(board)


def test_right_moves_in_any_order_win() -> None:
    played = game()
    cells = empty_cells(played.board())
    random.Random(0).shuffle(cells)
    states = [played.place_number(row, col, played.solution()[row][col]) for row, col in cells]
    assert states == ["ongoing"] * 37 + ["success"]
    assert (played.moves(), played.board()) == (38, played.solution())


def test_a_game_that_has_ended_stays_as_it_is() -> None:
    won = game(1)
    won.place_number(*right_move(won))
    before = won.board()
    assert won.place_number(0, 0, 10) == "success"
    lost = game()
    lost.place_number(9, 0, 1)
    assert lost.place_number(*right_move(lost)) == "failed"
    assert (won.board(), lost.moves(), lost.board()) == (before, 0, lost.initial_board())


def bad_moves() -> dict[str, Move]:
    played = game()
    row, col, number = right_move(played)
    board = played.board()
    filled = next((r, c) for r in range(9) for c in range(9) if board[r][c])
    wrong: dict[str, Move] = {
        "row below": (-1, col, number),
        "row above": (9, col, number),
        "column below": (row, -1, number),
        "column above": (row, 9, number),
        "zero": (row, col, 0),
        "ten": (row, col, 10),
        "negative digit": (row, col, -number),
        "huge": (row, col, 10**5000),
        "filled cell": (*filled, board[filled[0]][filled[1]]),
        "in its row": (row, col, next(digit for digit in board[row] if digit)),
        "in its column": (row, col, next(line[col] for line in board if line[col])),
        "in its box": (row, col, next(d for line in board[row // 3 * 3 :][:3] for d in line[col // 3 * 3 :][:3] if d)),
    }
    kinds: list[Any] = [None, True, False, 1.0, float("nan"), float("inf"), 1j, "1", b"1", [], (1,), {}, object()]
    kinds += [Loud(number), Digit.ONE, range(3), int]
    for place in range(3):
        for kind in kinds:
            move: list[Any] = [row, col, number]
            move[place] = kind
            wrong[f"{place} {type(kind).__name__} {str(kind)[:5]}"] = (move[0], move[1], move[2])
    return wrong


@pytest.mark.parametrize("name", bad_moves())
def test_an_illegal_move_ends_the_game_and_changes_nothing(name: str) -> None:
    played = game()
    assert played.place_number(*bad_moves()[name]) == "failed"
    assert (played.board(), played.moves()) == (played.initial_board(), 0)


def test_a_legal_digit_that_is_wrong_goes_on_until_no_move_is_left() -> None:
    """Play by always taking the first legal digit."""
    ends = set()
    for seed in range(20):
        played = game(45, seed)
        while played.state() == "ongoing":
            legal = sudoku_game.legal_digits(flat(played))
            place = next(cell for cell in range(81) if legal[cell])
            digit = next(digit for digit in range(1, 10) if legal[place] >> digit & 1)
            played.place_number(place // 9, place % 9, digit)
        ends.add(played.state())
        assert played.moves() > 0
        if played.state() == "failed":
            assert not any(sudoku_game.legal_digits(flat(played)))
    assert "failed" in ends


def test_a_hundred_moves_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the limit with a smaller number, because no puzzle has a hundred cells."""
    monkeypatch.setattr(sudoku_game, "MAX_MOVES", 3)
    played = game()
    assert [played.place_number(*right_move(played)) for _ in range(3)] == ["ongoing", "ongoing", "failed"]
    short = game(3)
    assert [short.place_number(*right_move(short)) for _ in range(3)][-1] == "success"
    assert sudoku_game.MAX_MOVES == 3


def test_boards_that_are_shown_are_copies() -> None:
    played = game()
    for shown in (played.board(), played.initial_board(), played.solution()):
        for line in shown:
            line[:] = [5] * 9
    fresh = game()
    assert (played.board(), played.initial_board(), played.solution()) == (
        fresh.board(),
        fresh.initial_board(),
        fresh.solution(),
    )


def test_a_board_can_be_read_with_and_without_colours() -> None:
    played = game()
    played.place_number(*right_move(played))
    plain = played.pretty(colour=False)
    assert [len(line) for line in plain.splitlines()] == [25] * 13
    assert plain.count(".") == 37
    assert "\033[32m" in played.pretty()
    assert "\033[31m" not in played.pretty()
    assert "\033" not in plain
