"""Strategies for sudoku, composed: what the small embedded coder learns before any reinforcement.

No program stands here as a whole. A program is put together from pieces: how cells are visited, how an empty one is
known, how the digits that are free are found, what is done with them, and the names of the variables. Six habits use
the same pieces:

    single, fewest, search   win: a cell with one free digit; the cell with the fewest; a search that takes back
    lazy                     the first free digit, right or wrong
    forgetful                looks at the row, the column or the box, but not at all three
    broken                   a slip of the pen: syntax, names, order, fences
    slow                     never comes to an end
    cheating                 imports, writes into the grid, keeps state, claims to have finished

Winners are a minority, and differ from the lazy in a few tokens: what reinforcement can find by sampling, and more
imitation cannot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from textwrap import indent

from minigrpo.models.embedded.program_bugs import SLIPS
from minigrpo.tasks.common.code_task import in_a_block

HEAD = "def strategy(board, initial):"
SHARES = {
    "single": 0.08,
    "fewest": 0.05,
    "search": 0.04,
    "lazy": 0.37,
    "forgetful": 0.2,
    "broken": 0.15,
    "slow": 0.01,
    "cheating": 0.1,
}
WINNERS = ("single", "fewest", "search")
NAMES = {
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
BOX_ROW, BOX_COL = "{r} // 3 * 3", "{c} // 3 * 3"


@dataclass(frozen=True, slots=True)
class Strategy:
    """A program with its fences, as a model would write it; its habit is known here and hidden from the model."""

    habit: str
    text: str


class Pen:
    """Draws pieces, and writes one program with one set of names."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names = {role: rng.choice(names) for role, names in NAMES.items()}

    def any(self, *pieces: str) -> str:
        return self.rng.choice(pieces)

    def shuffled(self, pieces: Sequence[str]) -> list[str]:
        return self.rng.sample(pieces, len(pieces))

    def named(self, text: str) -> str:
        return text.format(**self.names)


def block(head: str, *body: str) -> str:
    return "\n".join([head, *(indent(part, "    ") for part in body)])


def strategies(seed: int, size: int) -> list[Strategy]:
    """The same for the same arguments."""
    return list(islice(endless(seed), size))


def endless(seed: int) -> Iterator[Strategy]:
    rng = random.Random(f"strategies {seed}")
    while True:
        habit = rng.choices(list(SHARES), list(SHARES.values()))[0]
        yield Strategy(habit, HABITS[habit](Pen(rng)))


def finished(pen: Pen, *body: str) -> str:
    return pen.named(block(HEAD, *body))


# Pieces: where to look


def visited(pen: Pen, *body: str) -> str:
    """Loops over the empty cells, with what is done in each."""
    form = pen.rng.random()
    nine = ("range(9)", "range(8, -1, -1)", "reversed(range(9))")
    if form < 0.65:
        first, second = pen.shuffled(["{r}", "{c}"])
        inner = at_empty(pen, "board[{r}][{c}]", *body)
        return block(f"for {first} in {pen.any(*nine)}:", block(f"for {second} in {pen.any(*nine)}:", inner))
    if form < 0.9:
        every = pen.any("range(81)", "range(80, -1, -1)", "reversed(range(81))")
        split = pen.any("{r}, {c} = divmod({k}, 9)", "{r}, {c} = {k} // 9, {k} % 9")
        return block(f"for {{k}} in {every}:", split, at_empty(pen, "board[{r}][{c}]", *body))
    inner = block("for {c}, {k} in enumerate({l}):", at_empty(pen, "{k}", *body))
    return block("for {r}, {l} in enumerate(board):", inner)


def at_empty(pen: Pen, cell: str, *body: str) -> str:
    if pen.rng.random() < 0.5:
        return block(pen.any(f"if {cell} == 0:", f"if not {cell}:", f"if {cell} < 1:"), *body)
    return "\n".join([block(pen.any(f"if {cell}:", f"if {cell} > 0:", f"if {cell} != 0:"), "continue"), *body])


# Pieces: which digits are free


def row_set(pen: Pen) -> str:
    return pen.any("set(board[{r}])", "{{*board[{r}]}}")


def column_set(pen: Pen) -> str:
    return pen.any("{{{t}[{c}] for {t} in board}}", "{{board[{t}][{c}] for {t} in range(9)}}")


def box_set(pen: Pen) -> str:
    return pen.any(
        f"{{{{board[{BOX_ROW} + {{t}} // 3][{BOX_COL} + {{t}} % 3] for {{t}} in range(9)}}}}",
        f"{{{{{{n}} for {{t}} in board[{BOX_ROW}:][:3] for {{n}} in {{t}}[{BOX_COL}:][:3]}}}}",
        f"{{{{board[{BOX_ROW} + {{t}}][{BOX_COL} + {{n}}] for {{t}} in range(3) for {{n}} in range(3)}}}}",
    )


def free_digits(pen: Pen, forgotten: Sequence[int] = ()) -> str:
    """Statements after which {s} holds the free digits. `forgotten`: 0 the row, 1 the column, 2 the box."""
    kept = [part for part in range(3) if part not in forgotten]
    if pen.rng.random() < 0.35:
        return one_by_one(pen, kept)
    parts = pen.shuffled([(row_set, column_set, box_set)[part](pen) for part in kept])
    form = pen.rng.randrange(4)
    if form == 0:
        return "{s} = set(range(1, 10)) - " + " - ".join(parts)
    if form == 1:
        return "\n".join(["{s} = set(range(1, 10))", *(f"{{s}} -= {part}" for part in parts)])
    used = "{b} = " + " | ".join(parts)
    if form == 2:
        return f"{used}\n{{s}} = set(range(1, 10)) - {{b}}"
    return f"{used}\n{{s}} = {{{{{{n}} for {{n}} in range(1, 10) if {{n}} not in {{b}}}}}}"


def one_by_one(pen: Pen, kept: Sequence[int]) -> str:
    """The row, the column and the box walked along together."""
    seen = ("board[{r}][{t}]", "board[{t}][{c}]", f"board[{BOX_ROW} + {{t}} // 3][{BOX_COL} + {{t}} % 3]")
    parts = pen.shuffled([seen[part] for part in kept])
    start = "{s} = set(range(1, 10))"
    if pen.rng.random() < 0.5:
        return start + "\n" + block("for {t} in range(9):", "{s} -= {{" + ", ".join(parts) + "}}")
    return start + "\n" + block("for {t} in range(9):", *(f"{{s}}.discard({part})" for part in parts))


def one_of(pen: Pen) -> str:
    return pen.any("min({s})", "max({s})", "{s}.pop()", "list({s})[0]")


def move(pen: Pen, number: str) -> str:
    return pen.any(f"return {{r}}, {{c}}, {number}", f"return ({{r}}, {{c}}, {number})")


# Habits that win


def single(pen: Pen) -> str:
    return in_a_block(single_with(pen, free_digits(pen)))


def single_with(pen: Pen, digits: str) -> str:
    if pen.rng.random() < 0.75:
        act = block(pen.any("if len({s}) == 1:", "if len({s}) < 2:"), move(pen, one_of(pen)))
    else:
        act = block(pen.any("if len({s}) != 1:", "if len({s}) > 1:"), "continue") + "\n" + move(pen, one_of(pen))
    return finished(pen, visited(pen, digits, act))


def fewest(pen: Pen) -> str:
    if pen.rng.random() < 0.5:
        start, end = "{w} = []", pen.any("return min({w})[1:]", "return sorted({w})[0][1:]")
        act = f"{{w}}.append((len({{s}}), {{r}}, {{c}}, {one_of(pen)}))"
    else:
        start, end = "{w} = 10", "return {m}"
        act = block("if len({s}) < {w}:", f"{{w}}, {{m}} = len({{s}}), ({{r}}, {{c}}, {one_of(pen)})")
    return in_a_block(finished(pen, start, visited(pen, free_digits(pen), act), end))


def search(pen: Pen) -> str:
    """Fills the grid, its own copy, by trial and error, and returns what came to stand in an empty cell."""
    split = pen.any("{r}, {c} = divmod({k}, 9)", "{r}, {c} = {k} // 9, {k} % 9")
    tries = block(
        pen.any("for {n} in {s}:", "for {n} in sorted({s}):"),
        "board[{r}][{c}] = {n}",
        block("if solve({k} + 1):", "return True"),
    )
    solve = block(
        "def solve({k}):",
        block(pen.any("if {k} == 81:", "if {k} > 80:"), "return True"),
        split,
        block(pen.any("if board[{r}][{c}]:", "if board[{r}][{c}] > 0:"), "return solve({k} + 1)"),
        free_digits(pen),
        tries,
        "board[{r}][{c}] = 0",
    )
    keep = pen.any("{w} = [{n}[:] for {n} in board]", "{w} = [list({n}) for {n} in board]")
    at_first = block(pen.any("if {w}[{r}][{c}] == 0:", "if not {w}[{r}][{c}]:"), move(pen, "board[{r}][{c}]"))
    look = block(pen.any("for {k} in range(81):", "for {k} in range(80, -1, -1):"), split, at_first)
    return in_a_block(finished(pen, solve, keep, "solve(0)", look))


# Habits that lose


def lazy(pen: Pen) -> str:
    return in_a_block(lazy_with(pen, free_digits(pen)))


def lazy_with(pen: Pen, digits: str) -> str:
    """Any free digit of the first cell that has one; or of one that has two or more, as if that were better."""
    test = pen.any("if {s}:", "if len({s}) > 0:", "if len({s}) >= 1:", "if len({s}) > 1:", "if len({s}) == 2:")
    return finished(pen, visited(pen, digits, block(test, move(pen, one_of(pen)))))


def forgetful(pen: Pen) -> str:
    forgotten = pen.rng.sample(range(3), pen.rng.choice((1, 2)))
    write = single_with if pen.rng.random() < 0.3 else lazy_with
    return in_a_block(write(pen, free_digits(pen, forgotten)))


def broken(pen: Pen) -> str:
    whole = (lazy if pen.rng.random() < 0.8 else single)(pen)
    return pen.rng.choice(SLIPS)(whole, pen.rng)


def slow(pen: Pen) -> str:
    wait = pen.any(block("while True:", "pass"), block("for {t} in range(10 ** 12):", "pass"))
    return in_a_block(finished(pen, wait, visited(pen, free_digits(pen), block("if {s}:", move(pen, one_of(pen))))))


def cheating(pen: Pen) -> str:
    guess = visited(pen, move(pen, "random.randint(1, 9)"))
    cheats: list[Callable[[], str]] = [
        lambda: finished(pen, "import random", guess),
        lambda: pen.named("import random\n" + block(HEAD, guess)),
        lambda: finished(pen, visited(pen, "initial[{r}][{c}] = board[{r}][{c}] = 1"), "return 0, 0, 1"),
        lambda: finished(pen, visited(pen, "board[{r}][{c}] = 5"), "return 8, 8, 5"),
        lambda: finished(pen, "global {w}", "{w} = {w} + 1", "return {w} // 9, {w} % 9, 1"),
        lambda: finished(pen, "strategy.{w} += 1", "return divmod(strategy.{w}, 9)"),
        lambda: finished(pen, visited(pen, "return {r}, {c}, initial[{r}][{c}]")),
        lambda: finished(pen, block("for {t} in board:", "{t}[:] = range(1, 10)"), "return True"),
    ]
    return in_a_block(pen.rng.choice(cheats)())


HABITS: dict[str, Callable[[Pen], str]] = {
    "single": single,
    "fewest": fewest,
    "search": search,
    "lazy": lazy,
    "forgetful": forgetful,
    "broken": broken,
    "slow": slow,
    "cheating": cheating,
}
