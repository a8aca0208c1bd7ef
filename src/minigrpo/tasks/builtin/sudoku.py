"""Sudoku: the model writes a Python function that plays, and the function is judged by the games it wins.

    def strategy(board, initial):
        ...
        return row, col, number

The function is called once for each move, in the sandbox; games and solutions stay outside, with the referee. Every
completion of a prompt plays the same K puzzles (`task.games`), from few empty cells to many, and nobody else's: their
seeds follow from the prompt. Only a strategy that wins all K is right. Two halves of a strategy that wins some are told
apart, so groups have something to compare.

| part | |
|---|---|
| function_works | 1: it can be run; -1: it cannot be locked down; -2: there is none, or a syntax error |
| no_cheating | 1; -20: an import, a hidden one, or state carried from call to call; -1: there is no function |
| strategy_succeeds | mean over the games: 30 won; else 0.2 for each legal move, -2 without one; -1 no time; -3 failed |

What gains nothing, because every call begins anew and gets copies, is named in the notes. A would-be winner answers the
boards of one of its games once more, in another order: whoever answers otherwise has carried something along.

Not covered: a strategy that guesses, and happens to be right in all K games.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from minigrpo.config.schema import Recipe, SandboxConfig
from minigrpo.tasks.builtin.sudoku_game import State, SudokuGame
from minigrpo.tasks.common.code_task import Program, find_program, in_a_block, sandbox_of, untold
from minigrpo.tasks.common.rewards import Reward, reweighted, weighted
from minigrpo.types import Grade, Message, Prompt, Split, Task

if TYPE_CHECKING:
    from minigrpo.sandbox import Outcome, Referee, Sandbox

NAME, PARAMETERS = "strategy", ("board", "initial")
TEST_SIZE = 1000

WON, A_MOVE, NO_MOVE, OUT_OF_TIME, RAISED = 30.0, 0.2, -2.0, -1.0, -3.0
CHEATED = -20.0

ASKED = "Sudoku with {cells} empty cells. Write strategy(board, initial) -> (row, col, number)."
RULES = """

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

GOLD = """\
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
class Played:
    """One game: how it ended, its legal moves, and each board that was shown with what came back."""

    state: State
    moves: int
    turns: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True, slots=True)
class Score:
    """What one game earned, and in words how it went."""

    worth: float
    told: str
    won: Played | None = None
    blocked: bool = False


def task(recipe: Recipe) -> Task:
    """`recipe.seed` chooses the training puzzles; the test puzzles are the same for everybody."""
    knobs = recipe.task
    rewards = reweighted([Reward(name, 1.0, unasked) for name in PARTS], knobs.weights)
    weights = {reward.name: reward.weight for reward in rewards}

    def prompts(split: Split) -> Sequence[Prompt]:
        size, stream = (TEST_SIZE, "fixed") if split == "test" else (knobs.size, str(recipe.seed))
        return [as_prompt(f"{split} {stream} {number}", f"{split}-{number}", recipe) for number in range(size)]

    def grade(prompt: Prompt, text: str) -> Grade:
        return judged(prompt, find_program(text, NAME, PARAMETERS), weights, recipe.sandbox)

    about = "write a strategy that wins at sudoku; puzzles are generated"
    return Task("sudoku", prompts, grade, gold, about, unseen=puzzles_of)


def puzzles_of(prompt: Prompt) -> list[str]:
    """Prompts may read alike: what a test holds back is the games, and each of them follows from these two."""
    return [f"{game['cells']} cells, {game['seed']}" for game in prompt.target["games"]]


def unasked(prompt: Prompt, text: str) -> float:
    """The parts come from the same games, so they are told all at once."""
    raise AssertionError


def as_prompt(stream: str, name: str, recipe: Recipe) -> Prompt:
    """The puzzles of a prompt follow from its name and the seed, and the example is none of them."""
    knobs = recipe.task
    rng = random.Random(f"sudoku {stream}")
    cells = sorted(rng.randint(knobs.fewest, knobs.most) for _ in range(knobs.games))
    example = SudokuGame(cells[0], f"{stream} example").initial_board() if knobs.example else None
    games = [{"cells": count, "seed": f"{stream} game {place}"} for place, count in enumerate(cells)]
    return Prompt(name, messages(cells, example), {"games": games})


def messages(cells: Sequence[int], example: Sequence[Sequence[int]] | None = None) -> tuple[Message, ...]:
    """What the model reads. Without an example it is one line, for a model that knows the rules."""
    asked = ASKED.format(cells=", ".join(map(str, cells)))
    if example is not None:
        asked += RULES + "[" + ",\n ".join(map(str, example)) + "]"
    return ({"role": "user", "content": asked},)


def gold(prompt: Prompt) -> str:
    return in_a_block(GOLD)


PARTS = ("function_works", "no_cheating", "strategy_succeeds")


def judged(prompt: Prompt, program: Program, weights: dict[str, float], knobs: SandboxConfig) -> Grade:
    if not program.runs:
        return unplayed(program, weights)
    sandbox = sandbox_of(knobs)
    scores: list[Score] = []
    for game in prompt.target["games"]:
        outcome = sandbox.run(program.source, NAME, play(SudokuGame(game["cells"], game["seed"])))
        if outcome.verdict == "infrastructure":
            return untold(outcome)
        if outcome.detail.startswith("SyntaxError"):  # some faults show only when it is compiled
            return unplayed(Program(missing=outcome.detail), weights)
        scores.append(scored(outcome))
        if outcome.verdict == "timeout":  # the games left are harder still
            scores += [scored(outcome)] * (len(prompt.target["games"]) - len(scores))
            break
    return played(program, scores, sandbox, weights)


def played(program: Program, scores: Sequence[Score], sandbox: Sandbox, weights: dict[str, float]) -> Grade:
    """The grade of a strategy that was run. A winner is asked again before it is believed."""
    notes: dict[str, Any] = {"games": "; ".join(score.told for score in scores)}
    if program.odd:
        notes["odd"] = ", ".join(program.odd)
    wins = [score.won for score in scores if score.won is not None]
    solved, clean = len(wins) == len(scores), 1.0
    if solved:
        again = sandbox.run(program.source, NAME, replay(wins[0]))
        if again.verdict == "infrastructure":
            return untold(again)
        if again.verdict in ("timeout", "memory"):  # no proof of a cheat, but none of a win
            solved, scores = False, [scored(again), *scores[1:]]
            notes["games"] += f"; asked again, {scores[0].told}"
        elif again.verdict != "ok" or not again.result:
            solved, clean, notes["cheats"] = False, CHEATED, "state carried between calls"
    if any(score.blocked for score in scores):
        clean, notes["cheats"] = CHEATED, "reached for what the sandbox forbids"
    # What was won with something carried along is worth nothing.
    succeeds = sum(score.worth for score in scores) / len(scores) if clean > 0 else min(0.0, scores[0].worth)
    parts = dict(zip(PARTS, (1.0, clean, succeeds), strict=True))
    return Grade(weighted(parts, weights), parts, solved=solved, weights=weights, notes=notes)


def unplayed(program: Program, weights: dict[str, float]) -> Grade:
    """The grade of what is not run: no function, one that cannot be locked down, or one that shows that it cheats."""
    if program.cheats:
        values = (-1.0, CHEATED, RAISED)
    elif program.missing:
        values = (-2.0, -1.0, 0.0)
    else:
        values = (-1.0, 1.0, RAISED)
    parts = dict(zip(PARTS, values, strict=True))
    notes = {"cheats" if program.cheats else "program": program.complaint}
    return Grade(weighted(parts, weights), parts, formed=False, weights=weights, notes=notes)


def scored(outcome: Outcome) -> Score:
    if outcome.verdict == "timeout":
        return Score(OUT_OF_TIME, "out of time")
    if outcome.verdict != "ok":
        return Score(RAISED, f"{outcome.verdict}: {outcome.detail}"[:200], blocked=outcome.verdict == "blocked")
    game: Played = outcome.result
    if game.state == "success":
        return Score(WON, f"won in {game.moves} moves", game)
    return Score(A_MOVE * game.moves if game.moves else NO_MOVE, f"lost after {game.moves} moves")


def play(game: SudokuGame) -> Referee[Played]:
    """A referee: shows the boards, makes the moves that come back, and says how the game ended."""
    turns: list[tuple[Any, Any]] = []
    while game.state() == "ongoing":
        shown = game.board(), game.initial_board()
        move = yield shown
        turns.append(((game.board(), game.initial_board()), move))
        row, col, number = move if is_move(move) else (None, None, None)
        game.place_number(row, col, number)
    return Played(game.state(), game.moves(), tuple(turns))


def is_move(answer: Any) -> TypeGuard[Sequence[object]]:
    return type(answer) in (tuple, list) and len(answer) == 3


def replay(game: Played) -> Referee[bool]:
    """A referee: the boards of a game from the last to the first; whether the answers are the same."""
    for boards, before in reversed(game.turns):
        answer = yield boards
        if repr(answer) != repr(before):
            return False
    return True
