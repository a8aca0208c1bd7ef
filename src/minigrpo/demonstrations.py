"""What the embedded model learns before any reinforcement: worked word problems by imperfect teachers.

Four habits. The careful one writes both steps and is right. The others are what people do: answer in haste without a
step, lose the thread (stop early, drop a carry, add instead of taking away), forget the form. Which habit prevails
depends on the kind of story: in two kinds of eight it is the careful one, in the others it is a minority. So the model
that imitates them answers a quarter right by its likeliest words, and yet knows the better way everywhere: what
reinforcement can find by sampling, and more imitation cannot.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from minigrpo.tasks.wordproblems import LATER, RESULTS, Problem, apply, problems, written

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Demonstration:
    problem: Problem
    habit: str
    text: str


def careful(problem: Problem, rng: random.Random) -> str:
    return written(problem.steps, problem.answer)


def hasty(problem: Problem, rng: random.Random) -> str:
    """A guess near the answer, never the answer: one token can hardly do two sums at once."""
    guess = abs(problem.answer + rng.choice((-1, 1)) * rng.randint(1, 12))
    guess = guess if guess != problem.answer else guess + 1
    return written(["Easy."], guess) if rng.random() < 0.8 else f"<answer>{guess}</answer>"


def sloppy(problem: Problem, rng: random.Random) -> str:
    """Stops after the first step, or sums wrongly, or mistakes the second operation."""
    (a, b, c), (first, second) = problem.operands, problem.operations
    between = apply(a, first, b)
    how = rng.random()
    if how < 0.6:
        return written([f"So {a}{first}{b}={between}"], between)
    if how < 0.85:
        wrong = between - 10 if between > 10 else between + 1  # the carry dropped
        return written([f"So {a}{first}{b}={wrong}", f"{wrong}{second}{c}={apply(wrong, second, c)}"], apply(wrong, second, c))
    other = "-" if second == "+" and between >= c else "+"
    wrong = apply(between, other, c) if other != second else between
    return written([f"So {a}{first}{b}={between}", f"{between}{other}{c}={wrong}"], wrong)


def forgetful(problem: Problem, rng: random.Random) -> str:
    """The right steps in a broken form. The tag left out must prevail, or the likeliest words would mend it."""
    steps, answer = " ".join(problem.steps), problem.answer
    how = rng.random()
    if how < 0.7:
        return f"<think>{steps}</think>{answer}"
    return f"<think>{steps}</think><answer>{answer}" if how < 0.85 else f"<think>{steps}<answer>{answer}</answer>"


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
PREVAILING_SHARE = 0.6
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


def single_step(rng: random.Random) -> str:
    """One sum of the kind that steps are made of: "37-9=28"."""
    while True:
        left, operation, right = rng.choice(RESULTS), rng.choice("+-"), rng.choice(LATER)
        if (result := apply(left, operation, right)) in RESULTS:
            return f"{left}{operation}{right}={result}"
