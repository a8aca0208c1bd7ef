"""Strategies for Sudoku: which win, which earn less, and which earn nothing however they are written."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.evaluation.check_task import check_task
from minigrpo.tasks.builtin import sudoku_game
from minigrpo.tasks.builtin.sudoku import GOLD_PROGRAM, grade_strategy
from minigrpo.tasks.common.code_task import ParsedProgram, format_code_block
from minigrpo.tasks.registry import open_task
from minigrpo.types import Grade, Prompt, Task

pytestmark = pytest.mark.needs("linux")  # the sandbox runs nowhere else
HEAD = "def strategy(board, initial):\n"
LAZY = HEAD + "    r, c = next((r, c) for r in range(9) for c in range(9) if not board[r][c])\n    return r, c, 1"
LEGAL = HEAD + (
    "    for r in range(9):\n"
    "        for c in range(9):\n"
    "            if board[r][c] == 0:\n"
    "                box = [n for row in board[r // 3 * 3:][:3] for n in row[c // 3 * 3:][:3]]\n"
    "                for n in range(1, 10):\n"
    "                    if n not in board[r] + [row[c] for row in board] + box:\n"
    "                        return r, c, n\n"
)


def recipe(**sandbox: Any) -> Recipe:
    return Recipe.model_validate({"task": {"name": "sudoku", "size": 4}, "sandbox": {"cpu_seconds": 2.0, **sandbox}})


TASK = open_task(recipe())
PROMPT = TASK.prompts("train")[0]


def graded(source: str, task: Task = TASK, prompt: Prompt = PROMPT) -> Grade:
    return task.grade(prompt, format_code_block(source))


def returning(value: str) -> str:
    return f"{HEAD}    return {value}"


def after(extra: str) -> str:
    """Return the winning program with these lines at its beginning."""
    return GOLD_PROGRAM.replace(HEAD, HEAD + "".join(f"    {line}\n" for line in extra.splitlines()))


def parts(grade: Grade) -> tuple[float, ...]:
    return tuple(grade.parts.values())


def test_the_winner_wins_every_game_of_every_prompt() -> None:
    for split in ("train", "test"):
        for prompt in TASK.prompts(split)[:3]:  # type: ignore[arg-type]
            grade = graded(GOLD_PROGRAM, TASK, prompt)
            assert (parts(grade), grade.reward, grade.solved) == ((1.0, 1.0, 30.0), 32.0, True)


def test_a_strategy_of_legal_but_unplanned_moves_earns_its_moves_and_loses() -> None:
    grade = graded(LEGAL)
    assert not grade.solved
    assert grade.formed
    assert parts(grade)[:2] == (1.0, 1.0)
    assert 0.2 <= parts(grade)[2] < 8.0
    assert grade.notes["games"].count("lost after") == 3


def test_a_strategy_without_a_legal_move_earns_what_the_table_says() -> None:
    assert parts(graded(returning("0, 0, 0"))) == (1.0, 1.0, -2.0)


def test_games_are_the_same_for_all_siblings_and_other_than_those_of_other_prompts() -> None:
    again = open_task(recipe()).prompts("train")
    assert [prompt.target for prompt in again] == [prompt.target for prompt in TASK.prompts("train")]
    assert graded(LEGAL) == graded(LEGAL)
    seeds = [game["seed"] for split in ("train", "test") for p in TASK.prompts(split) for game in p.target["games"]]  # type: ignore[arg-type]
    assert len(set(seeds)) == len(seeds) == 3 * (4 + 1000)
    for prompt in again:
        cells = [game["cells"] for game in prompt.target["games"]]
        assert cells == sorted(cells)
        assert all(35 <= count <= 40 for count in cells)


def test_the_seed_of_the_recipe_changes_training_puzzles_alone() -> None:
    other = open_task(recipe().model_copy(update={"seed": 1}))
    assert other.prompts("train")[0].target != PROMPT.target
    assert other.prompts("test") == TASK.prompts("test")


def test_a_strategy_that_memorised_one_board_is_not_solved() -> None:
    first = PROMPT.target["games"][0]
    game = sudoku_game.SudokuGame(first["cells"], first["seed"])
    source = HEAD + (
        f"    known = {game.solution()}\n"
        "    r, c = next((r, c) for r in range(9) for c in range(9) if not board[r][c])\n    return r, c, known[r][c]"
    )
    grade = graded(source)
    assert not grade.solved
    assert grade.notes["games"].startswith("won in")
    assert 8.0 < parts(grade)[2] < 15.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no fenced block"),
        (GOLD_PROGRAM, "no fenced block"),
        ("```python\n" + GOLD_PROGRAM, "block not closed"),
        (format_code_block(GOLD_PROGRAM) + "\n" + format_code_block(GOLD_PROGRAM), "more than one block defines"),
        (format_code_block("1") + "\n" + format_code_block("2"), "no block defines"),
        (format_code_block(GOLD_PROGRAM).replace("python", "javascript"), "another language"),
        ("Here: " + format_code_block(GOLD_PROGRAM), "not on a line of its own"),
        (format_code_block(GOLD_PROGRAM.replace("strategy", "player")), "no function strategy"),
        (format_code_block("class strategy:\n    pass"), "a class in place of"),
        (format_code_block("async " + GOLD_PROGRAM), "an async function in place of"),
        (format_code_block("strategy = lambda board, initial: (0, 0, 1)"), "no function strategy"),
        (format_code_block(HEAD + "    return ("), "syntax error"),
        (format_code_block(GOLD_PROGRAM.replace("return", "retrun")), "syntax error"),
        (format_code_block(HEAD + "    break"), "SyntaxError"),
        (format_code_block(returning("'\0'")), "yntax error|does not read"),
        (format_code_block(returning("'\ud800'")), "does not read"),
        (format_code_block("x" * 2**20), "more than 20000 characters"),
        ("x" * 2**20, "no fenced block"),
        ("`" * 10_002, "no block defines"),
        ("`" * 9_999, "block not closed"),
    ],
)
def test_a_text_without_the_function_earns_what_the_table_says(text: str, told: str) -> None:
    grade = TASK.grade(PROMPT, text)
    assert (parts(grade), grade.formed) == ((-2.0, -1.0, 0.0), False)
    assert any(one in grade.notes["program"] for one in told.split("|"))


@pytest.mark.parametrize(
    "deep",
    [
        "(" * 10_000,
        "(" * 9_000 + ")" * 9_000,
        "[" * 9_000,
        "-" * 19_000 + "1",
        "not " * 4_900 + "1",
        "1" + "+1" * 9_000,
        "a" + ".a" * 9_000,
        "a" + "()" * 9_000,
        "lambda: " * 2_400 + "1",
        "1 if 1 else " * 1_600 + "1",
        "f'{" * 3_000,
    ],
    ids=lambda deep: deep[:8],
)
def test_deep_nesting_is_a_loss_and_no_crash(deep: str) -> None:
    """Grade in a thread, as training does: the limit is the thread's stack."""
    grades: list[Grade] = []
    asking = threading.Thread(target=lambda: grades.append(graded(returning(deep))))
    asking.start()
    asking.join()
    assert not grades[0].solved
    assert grades[0].reward <= 0


HELPERS = """
SIZE, BOX = 9, [3, -3]

def free(board, r, c=0, *, seen=[]):
    rows = {*board[r], *(row[c] for row in board)}
    return [n for n in range(1, SIZE + 1) if n not in rows]
"""


@pytest.mark.parametrize(
    "source",
    [
        '"""How to win."""\n' + GOLD_PROGRAM,
        "from typing import List, Tuple\n"
        + GOLD_PROGRAM.replace("board, initial)", "board: List[List[int]], initial)", 1),
        "import typing\n" + GOLD_PROGRAM.replace("initial):", "initial) -> 'typing.Tuple[int, int, int]':", 1),
        GOLD_PROGRAM.replace("board, initial)", "board: print(1), /, initial)", 1),
        GOLD_PROGRAM.replace("initial):", "initial) -> print(1):", 1),
        HELPERS + GOLD_PROGRAM,
        GOLD_PROGRAM + "\nif __name__ == '__main__':\n    import os\n    os.system('date')\n",
        GOLD_PROGRAM + "\nboard = [[0] * 9 for _ in range(9)]\nresult = strategy(board, board)\nprint(result)\n",
        "print(1)\nwhile True:\n    pass\n" + GOLD_PROGRAM,
        "import os, sys as system\nfrom numpy import zeros\n"
        + GOLD_PROGRAM
        + "\ndef main():\n    os.system(input())\n    system.exit()\n",
        "def help():\n    return other()\ndef other(): return exec\n@print\nclass Game:\n    play = other()\n"
        + GOLD_PROGRAM,
    ],
    ids=lambda source: source[:12],
)
def test_a_habit_that_gains_nothing_costs_nothing(source: str) -> None:
    grade = graded(source)
    assert (parts(grade), grade.solved) == ((1.0, 1.0, 30.0), True)


def test_of_several_blocks_the_one_that_defines_the_function_is_graded() -> None:
    text = (
        f"The grid:\n```\n[[0]]\n```\nNow\n{format_code_block(GOLD_PROGRAM)}\nCall it:\n```python\nstrategy(a, b)\n```"
    )
    grade = TASK.grade(PROMPT, text)
    assert grade.solved


def test_what_is_left_out_is_not_run_and_helps_nobody() -> None:
    """A name that only left-out code binds is missing when the function needs it."""
    needy = GOLD_PROGRAM.replace("def strategy", "if True:\n    moves = [1]\ndef strategy", 1).replace(
        "    def free", "    moves.pop()\n\n    def free", 1
    )
    grade = graded(needy)
    assert parts(grade)[2] == -3.0
    assert "NameError" in grade.notes["games"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("@print\n" + GOLD_PROGRAM, "decorator"),
        (GOLD_PROGRAM.replace("initial)", "initial=print(1))", 1), "default arguments"),
        (GOLD_PROGRAM.replace("initial)", "initial=[])", 1), "default arguments"),
        (GOLD_PROGRAM.replace("initial)", "*initial)", 1), "parameters other than"),
        (GOLD_PROGRAM.replace("board, initial", "grid, initial", 1), "parameters other than"),
        ("@print\nclass Board: pass\n" + after("Board()"), "code outside"),
        ("class Board:\n    print(1)\n" + after("Board()"), "code outside"),
        ("@print\ndef help(): pass\n" + after("help()"), "code outside"),
        ("def help(seen=print(1)): return seen\n" + after("help()"), "code outside"),
        (GOLD_PROGRAM + "\n" + GOLD_PROGRAM, "defined twice"),
        (GOLD_PROGRAM.replace("return r, c, free", "yield r, c, free"), "generator"),
    ],
)
def test_a_program_that_cannot_be_locked_down_is_not_run(source: str, told: str) -> None:
    grade = graded(source)
    assert parts(grade) == (-1.0, 1.0, -3.0)
    assert told in grade.notes["program"]


@pytest.mark.parametrize(
    "value",
    [
        *("None", "7", "'0,0,1'", "[]", "(0, 0)", "(0, 0, 1, 1)", "{0: 0}", "(0.0, 0.0, 1.0)", "(True, True, True)"),
        *("('0', '0', '1')", "(float('nan'),) * 3", "(float('inf'), 0, 1)", "(10 ** 400, 0, 1)", "(None, None, None)"),
        *("(1 << 10 ** 6, 0, 1)", "(-10 ** 30,) * 3", "[[0], [0], [1]]", "(n for n in (0, 0, 1))", "print", "object()"),
        *("{0, 1, 2}", "range(3)", "'x' * 10 ** 6", "(1j, 0, 1)", "strategy", "...", "b'abc'"),
    ],
)
def test_an_answer_that_is_no_move_makes_no_move(value: str) -> None:
    grade = graded(returning(value))
    assert parts(grade)[:2] == (1.0, 1.0)
    assert parts(grade)[2] in (-2.0, -3.0)


LIAR = HEAD + (
    "    class Liar(int):\n"
    "        def __eq__(self, other): return True\n"
    "        def __hash__(self): return 0\n"
    "        def __index__(self): return 1\n"
    "    return Liar(0), Liar(0), Liar(1)"
)


def test_objects_that_fake_equality_earn_nothing_and_are_named() -> None:
    grade = graded(LIAR)
    assert parts(grade)[2] in (-2.0, -3.0)
    assert grade.notes["odd"] == "a class of its own"


def test_boards_are_copies_and_writing_into_them_is_named() -> None:
    filled = after("for row in initial:\n    row[:] = [5] * 9\ninitial[0][0] = 7")
    grade = graded(filled)
    assert (grade.solved, grade.notes["odd"]) == (True, "writes into initial")
    cheap = HEAD + "    for row in board:\n        row[:] = [1] * 9\n    return 0, 0, 1"
    assert parts(graded(cheap))[2] < 0.3


def test_state_kept_in_globals_and_on_the_function_is_gone_at_the_next_call() -> None:
    """Play a winner that would stop at its second call if state survived."""
    for kept in (
        "global n\ntry:\n    n += 1\nexcept NameError:\n    n = 1\nif n > 1:\n    return 9, 9, 9",
        "try:\n    strategy.n += 1\nexcept AttributeError:\n    strategy.n = 1\nif strategy.n > 1:\n    return 9, 9, 9",
    ):
        grade = graded(after(kept))
        assert grade.solved
        assert grade.notes["odd"] in ("global variables", "state kept on the function")


def grade_unchecked(source: str) -> Grade:
    """Run a program although its text shows that it cheats, to test the second line of defence on its own."""
    return grade_strategy(PROMPT, ParsedProgram(source), {}, recipe().sandbox)


def test_a_winner_whose_answers_differ_when_replayed_is_a_cheat() -> None:
    memo = "import builtins\nn = builtins.n = getattr(builtins, 'n', 0) + 1\n"
    bomb = memo + "if n == 1 and sum(row.count(0) for row in board) < 30:\n    return 9, 9, 9"
    for source in (after(bomb), after(bomb.replace("builtins", "sys"))):
        grade = grade_unchecked(source)
        assert (parts(grade), grade.solved) == ((1.0, -20.0, 0.0), False)
        assert grade.notes["cheats"] == "state carried between calls"
    stalls = grade_unchecked(after(bomb.replace("return 9, 9, 9", "while True: pass")))
    assert not stalls.solved
    assert "asked again, out of time" in stalls.notes["games"]
    assert not grade_unchecked(after(memo + "if n > 20:\n    return 9, 9, 9")).solved


def test_what_the_sandbox_blocks_is_a_cheat() -> None:
    grade = grade_unchecked(after("import os\nos.fork()"))
    assert not grade.solved
    assert parts(grade)[1:] == (-20.0, -3.0)
    assert grade.notes["cheats"] == "reached for what the sandbox forbids"


def test_endless_programs_time_out_and_those_that_need_too_much_memory_fail() -> None:
    brief = open_task(recipe(cpu_seconds=0.2))
    assert parts(graded(HEAD + "    while True: pass", brief)) == (1.0, 1.0, -4.0)
    assert parts(graded(HEAD + "    return strategy(board, initial)", brief)) == (1.0, 1.0, -3.0)
    greedy = graded(HEAD + "    x = [0] * 10 ** 9\n    return 0, 0, 1", brief)
    assert parts(greedy) == (1.0, 1.0, -3.0)
    assert "memory" in greedy.notes["games"].lower()


BY_WORTH = [
    "while True: pass",
    "for n in iter(int, 1): board[0][0] = n",
    "return max(len(str(9 ** (9 ** 7 + n))) for n in range(10 ** 6)), 0, 0",
    "raise ValueError",
    "return board[9][9]",
    "return [0] * 10 ** 9",
    "return 0, 0, 0",
    "return 'no move'",
    "return",
]
"""Strategies without a legal move: three that hang, three that fail, three that move illegally."""


@pytest.mark.parametrize("moves", [0, 1, 5])
def test_a_strategy_that_tries_is_never_worth_less_than_one_that_hangs(moves: int) -> None:
    brief = open_task(recipe(cpu_seconds=0.2))
    counted = f"    if {moves} <= made(board) - made(initial):\n        "
    made = "def made(board):\n    return sum(n > 0 for row in board for n in row)\n"
    worth = [parts(graded(made + LEGAL.replace(HEAD, HEAD + counted + line + "\n"), brief))[2] for line in BY_WORTH]
    hang, fail, illegal = worth[:3], worth[3:6], worth[6:]
    assert set(hang) == {-4.0}
    assert set(fail) == {-3.0}
    assert illegal == [pytest.approx(0.2 * moves or -2.0)] * 3


NAMED_LIKE = {
    "a subclass": "class SyntaxErrors(PermissionError): pass\ntry:\n    os.fork()\n"
    "except OSError as e:\n    raise SyntaxErrors(1, 'x')",
    "a subclass that cannot be shown": "class Mute(PermissionError):\n    def __str__(self): return 1 / 0\n"
    "try:\n    os.fork()\nexcept OSError:\n    raise Mute(1, 'x')",
    "another in its place": "try:\n    os.fork()\nexcept OSError:\n    raise SyntaxError('invalid')",
    "another from it": "try:\n    os.fork()\nexcept OSError as e:\n    raise MemoryError from e",
    "another from none": "try:\n    os.fork()\nexcept OSError as e:\n    raise ValueError from None",
    "a group": "try:\n    os.fork()\nexcept OSError as e:\n    raise ExceptionGroup('SyntaxError', [e])",
    "one that lies about its number": "class Lie(PermissionError):\n    errno = 2\ntry:\n    os.fork()\n"
    "except OSError:\n    raise Lie(1, 'SyntaxError')",
}


@pytest.mark.parametrize("lines", NAMED_LIKE.values(), ids=NAMED_LIKE)
def test_a_blocked_program_that_raises_under_another_name_is_a_cheat(lines: str) -> None:
    grade = grade_unchecked(after("import os\n" + lines))
    assert parts(grade)[1:] == (-20.0, -3.0)
    assert grade.notes["cheats"] == "reached for what the sandbox forbids"


@pytest.mark.parametrize(
    "line",
    [
        "raise type('SyntaxErrorOfMine', (Exception,), {})()",
        "raise SyntaxError('invalid')",
        "raise IndentationError",
        "raise ValueError('blocked: SyntaxError')",
    ],
)
def test_only_a_program_that_does_not_compile_has_a_syntax_error(line: str) -> None:
    assert parts(graded(HEAD + "    " + line)) == (1.0, 1.0, -3.0)
    assert parts(graded(HEAD + "    break\n    " + line)) == (-2.0, -1.0, 0.0)


def test_a_failure_of_the_machine_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the winner on a machine whose processes are killed while they play."""
    import os
    import signal

    from minigrpo.tasks.common.code_task import open_sandbox

    opened = open_sandbox(recipe().sandbox)
    play = sudoku_game.SudokuGame.board

    def killing(game: sudoku_game.SudokuGame) -> list[list[int]]:
        for worker in list(opened._busy):
            os.kill(worker.process.pid, signal.SIGKILL)
        return play(game)

    monkeypatch.setattr(sudoku_game.SudokuGame, "board", killing)
    grade = graded(GOLD_PROGRAM)
    monkeypatch.undo()
    assert grade.scored is (not math.isnan(grade.reward))
    assert math.isnan(grade.reward)
    assert "could not run it" in grade.notes["grader"]
    assert graded(GOLD_PROGRAM).solved


def test_weights_reach_each_part() -> None:
    weights = {"task": {"name": "sudoku", "size": 1, "games": 1, "weights": {"strategy_succeeds": 0.1}}}
    task = open_task(Recipe.model_validate(weights))
    assert graded(GOLD_PROGRAM, task, task.prompts("train")[0]).reward == 5.0


def test_the_recipe_for_ministral_fits_its_context_and_its_task() -> None:
    found = load_recipe("sudoku-ministral")
    task = open_task(found)
    train = task.prompts("train")
    assert len(train) == 1000
    text = str(train[0].messages[0]["content"])
    assert "strategy(board, initial)" in text
    board = text.rpartition("example:")[2]
    # A digit, comma or blank of the board is a token each at worst, prose has three characters a token or more, and the
    # words that the published template puts in where a task has none are about 560 tokens.
    assert len(board) // 2 + len(text.removesuffix(board)) // 3 + 560 + found.rollout.max_tokens <= 4096
    assert found.task.system is None
    assert (found.lora.rank, found.lora.alpha, found.train.lr, found.train.warmup) == (32, 64, 5e-5, 0.1)
    assert task.grade(train[0], task.gold(train[0])).solved  # type: ignore[misc]


def test_the_task_is_fit_to_train_on() -> None:
    shown = Recipe.model_validate({"task": {"name": "sudoku", "size": 4, "example": True}})
    found = check_task(open_task(shown), shown.task, limit=4)
    assert found.ok, found.faults
    assert {kind.name: kind.solved for kind in found.kinds}["gold"] == 1.0
