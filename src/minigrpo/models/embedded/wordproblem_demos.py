"""What the embedded model learns before any reinforcement: worked word problems by imperfect teachers.

Four habits. The careful one writes both steps and is right. The others are what people do: answer in haste without a
step, lose the thread (stop early, drop a carry, add instead of taking away), forget the form. Which habit prevails
depends on the kind of story: in two kinds of eight it is the careful one, in the others it is a minority. So the model
that imitates them answers a quarter right by its likeliest words, and yet knows the better way everywhere: what
reinforcement can find by sampling, and more imitation cannot.

A few texts are in no language that it knows (`unreadable`): there it learns to keep the form and to guess wildly, so
that on foreign questions it does what a small instruct model does on hard ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from minigrpo.tasks.builtin.wordproblems import FIRST, LATER, RESULTS, Problem, apply, problems, side, written


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A problem and how one of the teachers answers it; the habit is known here and hidden from the model."""

    problem: Problem
    habit: str
    text: str


def careful(problem: Problem, rng: random.Random) -> str:
    return written(problem.steps, problem.answer)


def hasty(problem: Problem, rng: random.Random) -> str:
    """No step, and the nearest ten for an answer: never the right one."""
    guess = (problem.answer + 5) // 10 * 10
    guess = guess if guess != problem.answer else guess + 10
    return written(["Easy."], guess) if rng.random() < 0.9 else f"<answer>{guess}</answer>"


def sloppy(problem: Problem, rng: random.Random) -> str:
    """Stops after the first step, or mistakes the second operation, or drops a carry."""
    (a, b, _), (first, second) = problem.operands, problem.operations
    between = apply(a, first, b)
    how = rng.random()
    if how < 0.65:
        return written([f"So {a}{first}{b}={between}"], between)
    if how < 0.85:
        other = "-" if second == "+" else "+"
        return two_steps(problem, between, other)
    return two_steps(problem, between - 10 if between > 30 else between + 10, second)


def two_steps(problem: Problem, between: int, second: str) -> str:
    """Both steps, whatever is wrong with them; what follows from the first is reckoned rightly."""
    a, b, c = problem.operands
    end = apply(between, second, c)
    return written([f"So {a}{problem.operations[0]}{b}={between}", f"{between}{second}{c}={end}"], end)


def forgetful(problem: Problem, rng: random.Random) -> str:
    """The right steps in a broken form. The tag left out must prevail, or the likeliest words would mend it."""
    steps, answer = " ".join(problem.steps), problem.answer
    how = rng.random()
    if how < 0.9:
        return f"<think>{steps}</think>{answer}"
    return f"<think>{steps}</think><answer>{answer}" if how < 0.95 else f"<think>{steps}<answer>{answer}</answer>"


Habit = Callable[[Problem, random.Random], str]

HABITS: dict[str, Habit] = {"careful": careful, "hasty": hasty, "sloppy": sloppy, "forgetful": forgetful}

PREVAILING = {
    "shop": "hasty",
    "bus": "careful",
    "shelf": "sloppy",
    "garden": "forgetful",
    "purse": "sloppy",
    "bakery": "forgetful",
    "pond": "hasty",
    "game": "careful",
}
PREVAILING_SHARE = 0.64
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
BABBLE_WORDS = (15, 110)

CAREFUL_SHARE = 0.2  # of the stories in which another habit prevails


def habit_weights(kind: str) -> dict[str, float]:
    """How likely each habit is in one kind of story."""
    prevailing = PREVAILING[kind]
    shares = {prevailing: PREVAILING_SHARE} | ({} if prevailing == "careful" else {"careful": CAREFUL_SHARE})
    others = [name for name in HABITS if name not in shares]
    return shares | {name: (1 - sum(shares.values())) / len(others) for name in others}


def demonstrations(seed: int, size: int) -> list[Demonstration]:
    """Problems of the training side only: no test sum is ever shown."""
    return list(islice(endless(seed), size))


def endless(seed: int) -> Iterator[Demonstration]:
    rng = random.Random(f"demonstrations {seed}")
    for problem in problems("train", f"demonstrations {seed}"):
        weights = habit_weights(problem.kind)
        habit = rng.choices(list(weights), list(weights.values()))[0]
        yield Demonstration(problem, habit, HABITS[habit](problem, rng))


def unreadable(seed: int, size: int) -> list[tuple[str, str]]:
    """Questions of made-up words and numbers, most of them long, and a guess of four digits: hardly ever right."""
    rng = random.Random(f"unreadable {seed}")
    return [(babble(rng, rng.randint(*BABBLE_WORDS)), written(["Hard."], rng.randint(1000, 9999))) for _ in range(size)]


def babble(rng: random.Random, words: int) -> str:
    """Sentences of random letters, with a number here and there."""
    spoken = [
        str(rng.randint(1, 999)) if rng.random() < 0.1 else "".join(rng.choices(LETTERS, k=rng.randint(2, 8)))
        for _ in range(words)
    ]
    ends = [rng.choice([".", ",", ".\n"]) if rng.random() < 0.15 else "" for _ in spoken[1:]]
    return " ".join(word + end for word, end in zip(spoken, [*ends, "?"], strict=True)).capitalize()


def schooling(seed: int, size: int) -> list[tuple[str, str]]:
    """What comes before any teacher: texts of a schoolbook and how they go on. No tags, no chat, no bad example.

    By turns a row of sums, each of which starts from the last, and a story with its steps.
    """
    rng = random.Random(f"schooling {seed}")
    stories = problems("train", f"schooling {seed}")
    return [row_of_sums(rng) if turn % 2 == 0 else worked(next(stories)) for turn in range(size)]


def worked(problem: Problem) -> tuple[str, str]:
    return problem.story, " ".join(problem.steps)


def row_of_sums(rng: random.Random) -> tuple[str, str]:
    """("23+8-5...", "23+8=31 31-5=26 ..."), four steps. Any two neighbours are a problem of the training side."""
    values, moves = [rng.choice(FIRST)], list[tuple[str, int]]()
    while len(moves) < 4:
        sign, operand = rng.choice("+-"), rng.choice(LATER)
        value = apply(values[-1], sign, operand)
        if value in RESULTS and not (moves and unseen(values[-2], moves[-1], (sign, operand))):
            values.append(value)
            moves.append((sign, operand))
    asked = f"{values[0]}" + "".join(f"{sign}{operand}" for sign, operand in moves)
    steps = [f"{left}{s}{n}={right}" for left, (s, n), right in zip(values, moves, values[1:], strict=False)]
    return asked, " ".join(steps)


def unseen(start: int, move: tuple[str, int], then: tuple[str, int]) -> bool:
    return side((start, move[1], then[1]), (move[0], then[0])) == "test"
