"""Demonstrations for the embedded model: worked word problems by imperfect teachers.

There are four habits. The careful one writes both steps and is right. The others make human mistakes: answer in haste
without a step, make an error (stop early, drop a carry, add instead of subtracting), or break the form. The most
frequent habit depends on the kind of story: in two kinds of eight it is the careful one, in the others that is a
minority. So the model that imitates them is right in a quarter of its greedy answers, and yet has learned the better
way everywhere: reinforcement can find that by sampling, more imitation cannot.

A few texts are in no language that it knows (`unreadable_questions`): there it learns to keep the form and to guess
wildly, so that on unknown questions it behaves as a small instruct model does on hard ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from minigrpo.tasks.builtin.wordproblems import (
    FIRST_OPERANDS,
    LATER_OPERANDS,
    RESULTS,
    WordProblem,
    apply_operation,
    format_answer,
    generate_problems,
    split_of_sum,
)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A problem and the answer of one teacher. `habit` is hidden from the model."""

    problem: WordProblem
    habit: str
    text: str


def _careful(problem: WordProblem, rng: random.Random) -> str:
    return format_answer(problem.steps, problem.answer)


def _hasty(problem: WordProblem, rng: random.Random) -> str:
    """Answer without a step, with the nearest ten, which is never right."""
    guess = (problem.answer + 5) // 10 * 10
    guess = guess if guess != problem.answer else guess + 10
    return format_answer(["Easy."], guess) if rng.random() < 0.9 else f"<answer>{guess}</answer>"


def _sloppy(problem: WordProblem, rng: random.Random) -> str:
    """Stop after the first step, or mistake the second operation, or drop a carry."""
    (a, b, _), (first, second) = problem.operands, problem.operations
    between = apply_operation(a, first, b)
    how = rng.random()
    if how < 0.65:
        return format_answer([f"So {a}{first}{b}={between}"], between)
    if how < 0.85:
        other = "-" if second == "+" else "+"
        return _two_steps(problem, between, other)
    return _two_steps(problem, between - 10 if between > 30 else between + 10, second)


def _two_steps(problem: WordProblem, between: int, second: str) -> str:
    """Write both steps after an error: what follows from the first is computed correctly."""
    a, b, c = problem.operands
    end = apply_operation(between, second, c)
    return format_answer([f"So {a}{problem.operations[0]}{b}={between}", f"{between}{second}{c}={end}"], end)


def _forgetful(problem: WordProblem, rng: random.Random) -> str:
    """Write the right steps in a broken form. The missing answer tags must be the most frequent, or greedy decoding
    would repair the form.
    """
    steps, answer = " ".join(problem.steps), problem.answer
    how = rng.random()
    if how < 0.9:
        return f"<think>{steps}</think>{answer}"
    return f"<think>{steps}</think><answer>{answer}" if how < 0.95 else f"<think>{steps}<answer>{answer}</answer>"


_Habit = Callable[[WordProblem, random.Random], str]

HABITS: dict[str, _Habit] = {"careful": _careful, "hasty": _hasty, "sloppy": _sloppy, "forgetful": _forgetful}

_PREVAILING = {
    "shop": "hasty",
    "bus": "careful",
    "shelf": "sloppy",
    "garden": "forgetful",
    "purse": "sloppy",
    "bakery": "forgetful",
    "pond": "hasty",
    "game": "careful",
}
_PREVAILING_SHARE = 0.64
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_BABBLE_WORDS = (15, 110)

_CAREFUL_SHARE = 0.2  # of the stories in which another habit prevails


def habit_weights(kind: str) -> dict[str, float]:
    """Return the probability of each habit for one kind of story."""
    prevailing = _PREVAILING[kind]
    shares = {prevailing: _PREVAILING_SHARE} | ({} if prevailing == "careful" else {"careful": _CAREFUL_SHARE})
    others = [name for name in HABITS if name not in shares]
    return shares | {name: (1 - sum(shares.values())) / len(others) for name in others}


def wordproblem_demonstrations(seed: int, size: int) -> list[Demonstration]:
    """Return demonstrations on problems of the train split only: no test sum is ever shown."""
    return list(islice(_generate_demonstrations(seed), size))


def _generate_demonstrations(seed: int) -> Iterator[Demonstration]:
    rng = random.Random(f"demonstrations {seed}")
    for problem in generate_problems("train", f"demonstrations {seed}"):
        weights = habit_weights(problem.kind)
        habit = rng.choices(list(weights), list(weights.values()))[0]
        yield Demonstration(problem, habit, HABITS[habit](problem, rng))


def unreadable_questions(seed: int, size: int) -> list[tuple[str, str]]:
    """Return questions of made-up words and numbers, most of them long, with a guess of four digits: hardly
    ever right.
    """
    rng = random.Random(f"unreadable {seed}")
    return [
        (_random_sentences(rng, rng.randint(*_BABBLE_WORDS)), format_answer(["Hard."], rng.randint(1000, 9999)))
        for _ in range(size)
    ]


def _random_sentences(rng: random.Random, words: int) -> str:
    """Return sentences of random letters, with a number here and there."""
    spoken = [
        str(rng.randint(1, 999)) if rng.random() < 0.1 else "".join(rng.choices(_LETTERS, k=rng.randint(2, 8)))
        for _ in range(words)
    ]
    ends = [rng.choice([".", ",", ".\n"]) if rng.random() < 0.15 else "" for _ in spoken[1:]]
    return " ".join(word + end for word, end in zip(spoken, [*ends, "?"], strict=True)).capitalize()


def schoolbook_texts(seed: int, size: int) -> list[tuple[str, str]]:
    """Return (beginning, continuation) of plain texts, without tags, chat or wrong answers, for the lessons before
    imitation.

    They alternate between a chain of sums, each of which starts from the last, and a story with its steps.
    """
    rng = random.Random(f"schooling {seed}")
    stories = generate_problems("train", f"schooling {seed}")
    return [_sum_chain(rng) if turn % 2 == 0 else _worked_story(next(stories)) for turn in range(size)]


def _worked_story(problem: WordProblem) -> tuple[str, str]:
    return problem.story, " ".join(problem.steps)


def _sum_chain(rng: random.Random) -> tuple[str, str]:
    """Return ("23+8-5...", "23+8=31 31-5=26 ..."), four steps. Any two neighbours are a sum of the train split."""
    values, moves = [rng.choice(FIRST_OPERANDS)], list[tuple[str, int]]()
    while len(moves) < 4:
        sign, operand = rng.choice("+-"), rng.choice(LATER_OPERANDS)
        value = apply_operation(values[-1], sign, operand)
        if value in RESULTS and not (moves and _is_test_sum(values[-2], moves[-1], (sign, operand))):
            values.append(value)
            moves.append((sign, operand))
    asked = f"{values[0]}" + "".join(f"{sign}{operand}" for sign, operand in moves)
    steps = [f"{left}{s}{n}={right}" for left, (s, n), right in zip(values, moves, values[1:], strict=False)]
    return asked, " ".join(steps)


def _is_test_sum(start: int, move: tuple[str, int], then: tuple[str, int]) -> bool:
    return split_of_sum((start, move[1], then[1]), (move[0], then[0])) == "test"
