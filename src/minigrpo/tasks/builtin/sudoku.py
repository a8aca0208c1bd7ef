"""Sudoku: the model writes a Python function that plays, and the function is graded by the games it wins.

    def strategy(board, initial):
        ...
        return row, col, number

The function is called once for each move, in the sandbox; games and solutions stay outside, in the trainer's process.
All completions of a prompt play the same K puzzles (`task.games`), from few empty cells to many, and no other prompt
has them: their seeds follow from the prompt. A completion is solved only if it wins all K games. Strategies that win
some games get different rewards, so that the siblings of a group can be compared.

| part | |
|---|---|
| function_works | 1: it can be run; -1: it cannot be locked down; -2: there is none, or a syntax error |
| no_cheating | 1; -20: a forbidden import, a hidden one, or state carried from call to call; -1: there is no function |
| strategy_succeeds | mean over the games: 30 won; else 0.2 for each legal move, -2 without one; -3 failed; -4 no time |

Attempts that gain nothing, because every call starts fresh and gets copies, are named in the notes. A strategy that won
every game is asked about the boards of one game again, in reverse order: if its answers are others, and wrong, it has
kept state. Other right answers are no sign of it: sets of objects come in another order in every process.

Not covered: a strategy that guesses, and happens to be right in all K games.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from minigrpo.config.schema import Recipe, SandboxConfig, TaskConfig
from minigrpo.tasks.builtin.sudoku_game import GameState, SudokuGame
from minigrpo.tasks.common.code_task import (
    ParsedProgram,
    find_program,
    format_code_block,
    grade_sandbox_failure,
    longest_grading,
    open_sandbox,
)
from minigrpo.tasks.common.rewards import Reward, reweighted, weighted_sum
from minigrpo.types import Grade, Message, Prompt, Split, Task

if TYPE_CHECKING:
    from minigrpo.sandbox import Outcome, Referee, Sandbox

_FUNCTION_NAME, _PARAMETERS = "strategy", ("board", "initial")
_TEST_SIZE = 1000

_WIN_REWARD, _MOVE_REWARD, _NO_MOVE_REWARD, _ERROR_REWARD = 30.0, 0.2, -2.0, -3.0
_TIMEOUT_REWARD = -4.0  # below all others: a strategy that tries is never worth less than one that hangs
_CHEAT_REWARD = -20.0

_QUESTION = "Sudoku with {cells} empty cells. Write strategy(board, initial) -> (row, col, number)."
_RULES = """

strategy is a Python function that plays by itself. It is called for one move after the other until the sudoku is full:
- board is the grid as it stands, initial the grid at the beginning: 9 lists of 9 numbers, in which 0 is an empty cell.
- It returns one move: row and col from 0 to 8, and the number from 1 to 9 that belongs there.
- A move onto a filled cell, or a number that its row, column or 3x3 box already has, loses the game. Nothing is taken
  back, so a number that is allowed but wrong loses it in the end.
- It must win on grids that it has never seen.

Nothing is remembered between calls. Write exactly one fenced block (```python ... ```) with exactly one function, def
strategy(board, initial). Put every helper inside it, and import nothing.

One such grid, as an example:
"""

GOLD_PROGRAM = """\
def strategy(board, initial):
    def free(r, c):
        used = set(board[r]) | {row[c] for row in board}
        for row in board[r // 3 * 3 : r // 3 * 3 + 3]:
            used |= set(row[c // 3 * 3 : c // 3 * 3 + 3])
        return [n for n in range(1, 10) if n not in used]

    def solve():
        empty = [(r, c) for r in range(9) for c in range(9) if board[r][c] == 0]
        if not empty:
            return True
        r, c = min(empty, key=lambda cell: len(free(*cell)))
        for n in free(r, c):
            board[r][c] = n
            if solve():
                return True
        board[r][c] = 0
        return False

    empty = [(r, c) for r in range(9) for c in range(9) if board[r][c] == 0]
    r, c = min(empty, key=lambda cell: len(free(*cell)))
    if len(free(r, c)) > 1:
        solve()
        return r, c, board[r][c]
    return r, c, free(r, c)[0]
"""


@dataclass(frozen=True, slots=True)
class _GameRecord:
    """One finished game: its final state, its number of legal moves, and each call as (boards shown, answer)."""

    state: GameState
    moves: int
    calls: tuple[tuple[Any, Any], ...]
    solution: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class _GameScore:
    """The reward of one game and a short summary of how it went."""

    reward: float
    summary: str
    won_game: _GameRecord | None = None
    blocked: bool = False


def sudoku_task(recipe: Recipe) -> Task:
    """Build the task. `recipe.seed` chooses the training puzzles; the test puzzles are always the same."""
    config = recipe.task
    rewards = reweighted([Reward(name, 1.0, _never_called) for name in _PARTS], config.weights)
    weights = {reward.name: reward.weight for reward in rewards}

    def prompts(split: Split) -> Sequence[Prompt]:
        size, stream = (_TEST_SIZE, "fixed") if split == "test" else (config.size, str(recipe.seed))
        return [_make_prompt(f"{split} {stream} {number}", f"{split}-{number}", config) for number in range(size)]

    def grade(prompt: Prompt, text: str) -> Grade:
        return grade_strategy(prompt, find_program(text, _FUNCTION_NAME, _PARAMETERS), weights, recipe.sandbox)

    about = "write a strategy that wins at sudoku; puzzles are generated"
    return Task(
        "sudoku",
        prompts,
        grade,
        _gold_answer,
        about,
        unseen=_puzzle_keys,
        grading_seconds=lambda side_by_side: longest_grading(recipe.sandbox, config.games + 1, side_by_side),
    )


def _puzzle_keys(prompt: Prompt) -> list[str]:
    """Return what identifies the puzzles of a prompt: two prompts may have the same text and different games."""
    return [f"{game['cells']} cells, {game['seed']}" for game in prompt.target["games"]]


def _never_called(prompt: Prompt, text: str) -> float:
    """Stand in for the reward functions of the parts, which all come from the same games and are computed together."""
    raise AssertionError


def _make_prompt(stream: str, name: str, config: TaskConfig) -> Prompt:
    """Build a prompt. Its puzzles follow from its name and the seed; the example is none of them."""
    rng = random.Random(f"sudoku {stream}")
    cells = sorted(rng.randint(config.fewest, config.most) for _ in range(config.games))
    example = SudokuGame(cells[0], f"{stream} example").initial_board() if config.example else None
    games = [{"cells": count, "seed": f"{stream} game {place}"} for place, count in enumerate(cells)]
    return Prompt(name, prompt_messages(cells, example), {"games": games})


def prompt_messages(cells: Sequence[int], example: Sequence[Sequence[int]] | None = None) -> tuple[Message, ...]:
    """Return the messages of a prompt: one line, or with an example also the rules, for a model that does not know
    them.
    """
    asked = _QUESTION.format(cells=", ".join(map(str, cells)))
    if example is not None:
        asked += _RULES + "[" + ",\n ".join(map(str, example)) + "]"
    return ({"role": "user", "content": asked},)


def _gold_answer(prompt: Prompt) -> str:
    return format_code_block(GOLD_PROGRAM)


_PARTS = ("function_works", "no_cheating", "strategy_succeeds")


def grade_strategy(prompt: Prompt, program: ParsedProgram, weights: dict[str, float], config: SandboxConfig) -> Grade:
    if not program.runs:
        return _grade_unplayed(program, weights)
    sandbox = open_sandbox(config)
    scores: list[_GameScore] = []
    for game in prompt.target["games"]:
        outcome = sandbox.run(program.source, _FUNCTION_NAME, _play_referee(SudokuGame(game["cells"], game["seed"])))
        if outcome.verdict == "infrastructure":
            return grade_sandbox_failure(outcome)
        if not outcome.compiled:  # some errors show only then
            return _grade_unplayed(ParsedProgram(missing=outcome.detail), weights)
        scores.append(_score_game(outcome))
        if outcome.verdict == "timeout":  # the remaining games are harder
            scores += [_score_game(outcome)] * (len(prompt.target["games"]) - len(scores))
            break
    return _grade_games(program, scores, sandbox, weights)


def _grade_games(
    program: ParsedProgram, scores: Sequence[_GameScore], sandbox: Sandbox, weights: dict[str, float]
) -> Grade:
    """Grade a strategy that was run; one that won every game is first checked for state kept between calls."""
    notes: dict[str, Any] = {"games": "; ".join(score.summary for score in scores)}
    if program.odd:
        notes["odd"] = ", ".join(program.odd)
    wins = [score.won_game for score in scores if score.won_game is not None]
    solved, clean = len(wins) == len(scores), 1.0
    if solved:
        again = sandbox.run(program.source, _FUNCTION_NAME, _replay_referee(wins[0]))
        if again.verdict == "infrastructure":
            return grade_sandbox_failure(again)
        if again.verdict in ("timeout", "memory"):  # proves neither cheating nor a win
            solved, scores = False, [_score_game(again), *scores[1:]]
            notes["games"] += f"; asked again, {scores[0].summary}"
        elif again.verdict != "ok" or not again.result:
            solved, clean, notes["cheats"] = False, _CHEAT_REWARD, "state carried between calls"
    if any(score.blocked for score in scores):
        clean, notes["cheats"] = _CHEAT_REWARD, "reached for what the sandbox forbids"
    # Games won with state carried between calls earn nothing.
    succeeds = sum(score.reward for score in scores) / len(scores) if clean > 0 else min(0.0, scores[0].reward)
    parts = dict(zip(_PARTS, (1.0, clean, succeeds), strict=True))
    return Grade(weighted_sum(parts, weights), parts, solved=solved, weights=weights, notes=notes)


def _grade_unplayed(program: ParsedProgram, weights: dict[str, float]) -> Grade:
    """Grade a program that is not run: no function, one that cannot be locked down, or one whose text shows that it
    cheats.
    """
    if program.cheats:
        values = (-1.0, _CHEAT_REWARD, _ERROR_REWARD)
    elif program.missing:
        values = (-2.0, -1.0, 0.0)
    else:
        values = (-1.0, 1.0, _ERROR_REWARD)
    parts = dict(zip(_PARTS, values, strict=True))
    notes = {"cheats" if program.cheats else "program": program.complaint}
    return Grade(weighted_sum(parts, weights), parts, formed=False, weights=weights, notes=notes)


def _score_game(outcome: Outcome) -> _GameScore:
    if outcome.verdict == "timeout":
        return _GameScore(_TIMEOUT_REWARD, "out of time")
    if outcome.verdict != "ok":
        return _GameScore(
            _ERROR_REWARD, f"{outcome.verdict}: {outcome.detail}"[:200], blocked=outcome.verdict == "blocked"
        )
    game: _GameRecord = outcome.result
    if game.state == "success":
        return _GameScore(_WIN_REWARD, f"won in {game.moves} moves", game)
    return _GameScore(_MOVE_REWARD * game.moves if game.moves else _NO_MOVE_REWARD, f"lost after {game.moves} moves")


def _play_referee(game: SudokuGame) -> Referee[_GameRecord]:
    """Show the boards, make the moves that come back, and return the record of the game."""
    calls: list[tuple[Any, Any]] = []
    while game.state() == "ongoing":
        shown = game.board(), game.initial_board()
        move = yield shown
        calls.append(((game.board(), game.initial_board()), move))
        row, col, number = move if _is_move(move) else (None, None, None)
        game.place_number(row, col, number)
    return _GameRecord(game.state(), game.moves(), tuple(calls), game.solution())


def _is_move(answer: Any) -> TypeGuard[Sequence[object]]:
    return type(answer) in (tuple, list) and len(answer) == 3


def _replay_referee(game: _GameRecord) -> Referee[bool]:
    """Show the boards of a game from the last to the first; return whether the answers are right, or those of then."""
    for boards, before in reversed(game.calls):
        answer = yield boards
        if repr(answer) != repr(before) and not _is_right(answer, boards[0], game.solution):
            return False
    return True


def _is_right(answer: Any, board: Sequence[Sequence[int]], solution: Sequence[Sequence[int]]) -> bool:
    """Return whether an answer fills an empty cell with its digit."""
    if not _is_move(answer) or not all(type(part) is int for part in answer):
        return False
    empty = ((row, col) for row in range(9) for col in range(9) if not board[row][col])
    return any(tuple(answer) == (row, col, solution[row][col]) for row, col in empty)
