"""Sudoku strategies, composed at random: what the embedded coder learns before reinforcement.

No program is stored whole. A program is composed of pieces: how cells are visited, how an empty one is recognised, how
the free digits are found, what is done with them, and the names of the variables. Eight habits use the same pieces:

    single, fewest, search   win: a cell with one free digit; the cell with the fewest; a backtracking search
    lazy                     the first free digit, right or wrong
    forgetful                looks at the row, the column or the box, but not at all three
    broken                   one bug: syntax, names, order, fences
    slow                     never terminates
    cheating                 imports, writes into the grid, keeps state, claims to have finished

Winners are a minority, and differ from the lazy ones in a few tokens: reinforcement can find that by sampling, more
imitation cannot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from textwrap import indent

from minigrpo.models.embedded.program_bugs import PROGRAM_BUGS
from minigrpo.tasks.common.code_task import format_code_block

_SIGNATURE = "def strategy(board, initial):"
HABIT_SHARES = {
    "single": 0.08,
    "fewest": 0.05,
    "search": 0.04,
    "lazy": 0.37,
    "forgetful": 0.2,
    "broken": 0.15,
    "slow": 0.01,
    "cheating": 0.1,
}
WINNING_HABITS = ("single", "fewest", "search")
VARIABLE_NAMES = {
    "r": ("r", "i", "y", "row"),
    "c": ("c", "j", "x", "col"),
    "n": ("n", "d", "v"),
    "s": ("s", "p", "free"),
    "t": ("t", "u", "q"),
    "w": ("w", "z", "m"),
    "b": ("b", "e", "best"),
    "m": ("a", "o", "move"),
    "l": ("l", "g", "line"),
    "k": ("k", "h", "cell"),
}
_BOX_ROW, _BOX_COL = "{r} // 3 * 3", "{c} // 3 * 3"


@dataclass(frozen=True, slots=True)
class Strategy:
    """A program with its fences, as a model would write it. `habit` is hidden from the model."""

    habit: str
    text: str


class _ProgramWriter:
    """Draws pieces, and fills in one set of variable names."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names = {role: rng.choice(names) for role, names in VARIABLE_NAMES.items()}

    def choose(self, *pieces: str) -> str:
        return self.rng.choice(pieces)

    def shuffle(self, pieces: Sequence[str]) -> list[str]:
        return self.rng.sample(pieces, len(pieces))

    def fill_names(self, text: str) -> str:
        return text.format(**self.names)


def _indent_block(head: str, *body: str) -> str:
    return "\n".join([head, *(indent(part, "    ") for part in body)])


def make_strategies(seed: int, size: int) -> list[Strategy]:
    """Return `size` programs, the same for the same arguments."""
    return list(islice(generate_strategies(seed), size))


def generate_strategies(seed: int) -> Iterator[Strategy]:
    rng = random.Random(f"strategies {seed}")
    while True:
        habit = rng.choices(list(HABIT_SHARES), list(HABIT_SHARES.values()))[0]
        yield Strategy(habit, _HABITS[habit](_ProgramWriter(rng)))


def _write_function(writer: _ProgramWriter, *body: str) -> str:
    return writer.fill_names(_indent_block(_SIGNATURE, *body))


# Pieces: loops over cells


def _loop_over_empty(writer: _ProgramWriter, *body: str) -> str:
    """Write loops over the empty cells around `body`."""
    form = writer.rng.random()
    nine = ("range(9)", "range(8, -1, -1)", "reversed(range(9))")
    if form < 0.65:
        first, second = writer.shuffle(["{r}", "{c}"])
        inner = _if_empty(writer, "board[{r}][{c}]", *body)
        return _indent_block(
            f"for {first} in {writer.choose(*nine)}:", _indent_block(f"for {second} in {writer.choose(*nine)}:", inner)
        )
    if form < 0.9:
        every = writer.choose("range(81)", "range(80, -1, -1)", "reversed(range(81))")
        split = writer.choose("{r}, {c} = divmod({k}, 9)", "{r}, {c} = {k} // 9, {k} % 9")
        return _indent_block(f"for {{k}} in {every}:", split, _if_empty(writer, "board[{r}][{c}]", *body))
    inner = _indent_block("for {c}, {k} in enumerate({l}):", _if_empty(writer, "{k}", *body))
    return _indent_block("for {r}, {l} in enumerate(board):", inner)


def _if_empty(writer: _ProgramWriter, cell: str, *body: str) -> str:
    if writer.rng.random() < 0.5:
        return _indent_block(writer.choose(f"if {cell} == 0:", f"if not {cell}:", f"if {cell} < 1:"), *body)
    return "\n".join(
        [_indent_block(writer.choose(f"if {cell}:", f"if {cell} > 0:", f"if {cell} != 0:"), "continue"), *body]
    )


# Pieces: free digits


def _row_set(writer: _ProgramWriter) -> str:
    return writer.choose("set(board[{r}])", "{{*board[{r}]}}")


def _column_set(writer: _ProgramWriter) -> str:
    return writer.choose("{{{t}[{c}] for {t} in board}}", "{{board[{t}][{c}] for {t} in range(9)}}")


def _box_set(writer: _ProgramWriter) -> str:
    return writer.choose(
        f"{{{{board[{_BOX_ROW} + {{t}} // 3][{_BOX_COL} + {{t}} % 3] for {{t}} in range(9)}}}}",
        f"{{{{{{n}} for {{t}} in board[{_BOX_ROW}:][:3] for {{n}} in {{t}}[{_BOX_COL}:][:3]}}}}",
        f"{{{{board[{_BOX_ROW} + {{t}}][{_BOX_COL} + {{n}}] for {{t}} in range(3) for {{n}} in range(3)}}}}",
    )


def _free_digits(writer: _ProgramWriter, forgotten: Sequence[int] = ()) -> str:
    """Write statements that set {s} to the free digits. `forgotten`: 0 the row, 1 the column, 2 the box."""
    kept = [part for part in range(3) if part not in forgotten]
    if writer.rng.random() < 0.35:
        return _discard_used(writer, kept)
    parts = writer.shuffle([(_row_set, _column_set, _box_set)[part](writer) for part in kept])
    form = writer.rng.randrange(4)
    if form == 0:
        return "{s} = set(range(1, 10)) - " + " - ".join(parts)
    if form == 1:
        return "\n".join(["{s} = set(range(1, 10))", *(f"{{s}} -= {part}" for part in parts)])
    used = "{b} = " + " | ".join(parts)
    if form == 2:
        return f"{used}\n{{s}} = set(range(1, 10)) - {{b}}"
    return f"{used}\n{{s}} = {{{{{{n}} for {{n}} in range(1, 10) if {{n}} not in {{b}}}}}}"


def _discard_used(writer: _ProgramWriter, kept: Sequence[int]) -> str:
    """Write one loop that discards the digits of row, column and box together."""
    seen = ("board[{r}][{t}]", "board[{t}][{c}]", f"board[{_BOX_ROW} + {{t}} // 3][{_BOX_COL} + {{t}} % 3]")
    parts = writer.shuffle([seen[part] for part in kept])
    start = "{s} = set(range(1, 10))"
    if writer.rng.random() < 0.5:
        return start + "\n" + _indent_block("for {t} in range(9):", "{s} -= {{" + ", ".join(parts) + "}}")
    return start + "\n" + _indent_block("for {t} in range(9):", *(f"{{s}}.discard({part})" for part in parts))


def _pick_digit(writer: _ProgramWriter) -> str:
    return writer.choose("min({s})", "max({s})", "{s}.pop()", "list({s})[0]")


def _return_move(writer: _ProgramWriter, number: str) -> str:
    return writer.choose(f"return {{r}}, {{c}}, {number}", f"return ({{r}}, {{c}}, {number})")


# Habits that win


def _single(writer: _ProgramWriter) -> str:
    return format_code_block(_single_with(writer, _free_digits(writer)))


def _single_with(writer: _ProgramWriter, digits: str) -> str:
    if writer.rng.random() < 0.75:
        act = _indent_block(
            writer.choose("if len({s}) == 1:", "if len({s}) < 2:"), _return_move(writer, _pick_digit(writer))
        )
    else:
        act = (
            _indent_block(writer.choose("if len({s}) != 1:", "if len({s}) > 1:"), "continue")
            + "\n"
            + _return_move(writer, _pick_digit(writer))
        )
    return _write_function(writer, _loop_over_empty(writer, digits, act))


def _fewest(writer: _ProgramWriter) -> str:
    if writer.rng.random() < 0.5:
        start, end = "{w} = []", writer.choose("return min({w})[1:]", "return sorted({w})[0][1:]")
        act = f"{{w}}.append((len({{s}}), {{r}}, {{c}}, {_pick_digit(writer)}))"
    else:
        start, end = "{w} = 10", "return {m}"
        act = _indent_block("if len({s}) < {w}:", f"{{w}}, {{m}} = len({{s}}), ({{r}}, {{c}}, {_pick_digit(writer)})")
    return format_code_block(_write_function(writer, start, _loop_over_empty(writer, _free_digits(writer), act), end))


def _search(writer: _ProgramWriter) -> str:
    """Write a backtracking search that fills the grid, its own copy, and returns the digit of a cell that was empty."""
    split = writer.choose("{r}, {c} = divmod({k}, 9)", "{r}, {c} = {k} // 9, {k} % 9")
    tries = _indent_block(
        writer.choose("for {n} in {s}:", "for {n} in sorted({s}):"),
        "board[{r}][{c}] = {n}",
        _indent_block("if solve({k} + 1):", "return True"),
    )
    solve = _indent_block(
        "def solve({k}):",
        _indent_block(writer.choose("if {k} == 81:", "if {k} > 80:"), "return True"),
        split,
        _indent_block(writer.choose("if board[{r}][{c}]:", "if board[{r}][{c}] > 0:"), "return solve({k} + 1)"),
        _free_digits(writer),
        tries,
        "board[{r}][{c}] = 0",
    )
    keep = writer.choose("{w} = [{n}[:] for {n} in board]", "{w} = [list({n}) for {n} in board]")
    at_first = _indent_block(
        writer.choose("if {w}[{r}][{c}] == 0:", "if not {w}[{r}][{c}]:"), _return_move(writer, "board[{r}][{c}]")
    )
    look = _indent_block(writer.choose("for {k} in range(81):", "for {k} in range(80, -1, -1):"), split, at_first)
    return format_code_block(_write_function(writer, solve, keep, "solve(0)", look))


# Habits that lose


def _lazy(writer: _ProgramWriter) -> str:
    return format_code_block(_lazy_with(writer, _free_digits(writer)))


def _lazy_with(writer: _ProgramWriter, digits: str) -> str:
    """Write a loop that plays any free digit of the first cell that has one; or one that has two or more, as
    if that were better.
    """
    test = writer.choose("if {s}:", "if len({s}) > 0:", "if len({s}) >= 1:", "if len({s}) > 1:", "if len({s}) == 2:")
    return _write_function(
        writer, _loop_over_empty(writer, digits, _indent_block(test, _return_move(writer, _pick_digit(writer))))
    )


def _forgetful(writer: _ProgramWriter) -> str:
    forgotten = writer.rng.sample(range(3), writer.rng.choice((1, 2)))
    write = _single_with if writer.rng.random() < 0.3 else _lazy_with
    return format_code_block(write(writer, _free_digits(writer, forgotten)))


def _broken(writer: _ProgramWriter) -> str:
    whole = (_lazy if writer.rng.random() < 0.8 else _single)(writer)
    return writer.rng.choice(PROGRAM_BUGS)(whole, writer.rng)


def _slow(writer: _ProgramWriter) -> str:
    wait = writer.choose(_indent_block("while True:", "pass"), _indent_block("for {t} in range(10 ** 12):", "pass"))
    return format_code_block(
        _write_function(
            writer,
            wait,
            _loop_over_empty(
                writer, _free_digits(writer), _indent_block("if {s}:", _return_move(writer, _pick_digit(writer)))
            ),
        )
    )


def _cheating(writer: _ProgramWriter) -> str:
    guess = _loop_over_empty(writer, _return_move(writer, "random.randint(1, 9)"))
    cheats: list[Callable[[], str]] = [
        lambda: _write_function(writer, "import random", guess),
        lambda: writer.fill_names("import random\n" + _indent_block(_SIGNATURE, guess)),
        lambda: _write_function(
            writer, _loop_over_empty(writer, "initial[{r}][{c}] = board[{r}][{c}] = 1"), "return 0, 0, 1"
        ),
        lambda: _write_function(writer, _loop_over_empty(writer, "board[{r}][{c}] = 5"), "return 8, 8, 5"),
        lambda: _write_function(writer, "global {w}", "{w} = {w} + 1", "return {w} // 9, {w} % 9, 1"),
        lambda: _write_function(writer, "strategy.{w} += 1", "return divmod(strategy.{w}, 9)"),
        lambda: _write_function(writer, _loop_over_empty(writer, "return {r}, {c}, initial[{r}][{c}]")),
        lambda: _write_function(writer, _indent_block("for {t} in board:", "{t}[:] = range(1, 10)"), "return True"),
    ]
    return format_code_block(writer.rng.choice(cheats)())


_HABITS: dict[str, Callable[[_ProgramWriter], str]] = {
    "single": _single,
    "fewest": _fewest,
    "search": _search,
    "lazy": _lazy,
    "forgetful": _forgetful,
    "broken": _broken,
    "slow": _slow,
    "cheating": _cheating,
}
