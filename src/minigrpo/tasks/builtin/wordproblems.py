"""Small word problems, generated: three numbers, two operations, eight kinds of story.

    Mia has 23 apples, buys 8 and gives 5 away. How many apples are left?

The splits are disjoint by construction: a problem's *sum*, its signed numbers in any order, decides by a hash to which
split it belongs. 23 + 8 - 5 is in the test split if and only if 23 - 5 + 8 is, in every kind of story and for every
seed; training prompts and the warm start of the embedded model draw from the train split (`split_of_sum`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from minigrpo.config.schema import Recipe
from minigrpo.errors import TaskError
from minigrpo.tasks.common.answers import TaggedAnswer, find_answer, parse_number, same_number
from minigrpo.tasks.common.rewards import Reward, graded, reweighted
from minigrpo.types import Grade, Prompt, Split, Task

TEST_SIZE = 1000
_TEST_ONE_IN = 5  # one sum in five is in the test split
_MAX_DRAWS = 100  # draws until a new problem must be found

FIRST_OPERANDS = range(11, 90)
LATER_OPERANDS = range(2, 10)
RESULTS = range(10, 100)  # of both steps: two digits, so that a small model learns the sums quickly

SYSTEM_PROMPT = "Reason in <think></think>, then answer in <answer></answer>."
_NAMES = ("Mia", "Tom", "Ana", "Ben", "Zoe", "Sam", "Eva", "Leo")
_THINGS = ("apples", "pens", "shells", "stamps", "beads", "cards")


@dataclass(frozen=True, slots=True)
class Story:
    """One kind of story; its verbs fix the two operations."""

    name: str
    operations: tuple[str, str]
    story: str


STORIES = (
    Story("shop", ("+", "-"), "{name} has {a} {thing}, buys {b} and gives {c} away. How many {thing} are left?"),
    Story("bus", ("-", "+"), "A bus carries {a} people. At a stop {b} get off and {c} get on. How many ride now?"),
    Story("shelf", ("-", "-"), "A shelf holds {a} books. {name} lends {b} and sells {c}. How many books remain?"),
    Story("garden", ("+", "+"), "{name} plants {a} roses in May, {b} in June and {c} in July. How many in all?"),
    Story("purse", ("-", "+"), "{name} saves {a} coins, spends {b} and then finds {c}. How many coins now?"),
    Story("bakery", ("+", "-"), "A baker makes {a} rolls, then {b} more, and sells {c}. How many rolls are there?"),
    Story("pond", ("-", "-"), "There are {a} ducks in a pond. {b} fly off, later {c} swim off. How many stay?"),
    Story("game", ("+", "+"), "{name} scores {a} points, then {b} and {c}. What is the score of {name}?"),
)


@dataclass(frozen=True, slots=True)
class WordProblem:
    """A story with its sum, computed from left to right."""

    kind: str
    story: str
    operands: tuple[int, int, int]
    operations: tuple[str, str]

    @property
    def steps(self) -> tuple[str, str]:
        """Return both steps written out: ("23+8=31", "31-5=26")."""
        (a, b, c), (first, second) = self.operands, self.operations
        between = apply_operation(a, first, b)
        return f"{a}{first}{b}={between}", f"{between}{second}{c}={self.answer}"

    @property
    def answer(self) -> int:
        (a, b, c), (first, second) = self.operands, self.operations
        return apply_operation(apply_operation(a, first, b), second, c)

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        return question_messages(self.story)


def question_messages(question: str) -> tuple[dict[str, str], ...]:
    return {"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}


def apply_operation(left: int, operation: str, right: int) -> int:
    return left + right if operation == "+" else left - right


def split_of_sum(operands: Sequence[int], operations: Sequence[str]) -> Split:
    """Return the split of a sum: the same numbers with the same signs, in any order, always share one."""
    signed = sorted(f"{sign}{number}" for sign, number in zip(("+", *operations), operands, strict=True))
    return "test" if hashlib.sha256(" ".join(signed).encode()).digest()[0] % _TEST_ONE_IN == 0 else "train"


def generate_problems(split: Split, seed: int | str) -> Iterator[WordProblem]:
    """Yield problems of one split without end, cycling through the stories, so that any number of problems
    is balanced.
    """
    rng = random.Random(f"wordproblems {split} {seed}")
    for kind in cycle(STORIES):
        yield _draw_problem(kind, split, rng)


def _draw_problem(kind: Story, split: Split, rng: random.Random) -> WordProblem:
    while True:
        a, b, c = operands = rng.choice(FIRST_OPERANDS), rng.choice(LATER_OPERANDS), rng.choice(LATER_OPERANDS)
        between = apply_operation(a, kind.operations[0], b)
        within = between in RESULTS and apply_operation(between, kind.operations[1], c) in RESULTS
        if within and split_of_sum(operands, kind.operations) == split:
            story = kind.story.format(name=rng.choice(_NAMES), thing=rng.choice(_THINGS), a=a, b=b, c=c)
            return WordProblem(kind.name, story, operands, kind.operations)


def distinct_prompts(split: Split, seed: int | str, size: int) -> list[Prompt]:
    """Return `size` different prompts, cycling through the stories."""
    rng = random.Random(f"wordproblems {split} {seed}")
    prompts: dict[str, Prompt] = {}
    for kind in islice(cycle(STORIES), size):
        drawn = (_make_prompt(_draw_problem(kind, split, rng), split) for _ in range(_MAX_DRAWS))
        prompt = next((prompt for prompt in drawn if prompt.id not in prompts), None)
        if prompt is None:
            raise TaskError(f"wordproblems has hardly more than {len(prompts)} different problems: lower --task.size.")
        prompts[prompt.id] = prompt
    return list(prompts.values())


def _make_prompt(problem: WordProblem, split: Split) -> Prompt:
    expression = "".join(str(part) for part in _interleave(problem))
    target = {
        "answer": problem.answer,
        "steps": list(problem.steps),
        "operands": list(problem.operands),
        "operations": list(problem.operations),
        "kind": problem.kind,
    }
    return Prompt(id=f"{split}-{problem.kind}-{expression}", messages=problem.messages, target=target)


def _interleave(problem: WordProblem) -> tuple[int | str, ...]:
    (a, b, c), (first, second) = problem.operands, problem.operations
    return a, first, b, second, c


def _find_number_answer(text: str) -> TaggedAnswer | None:
    """Return the answer if the text has the required form and the answer is a number."""
    answer = find_answer(text)
    return answer if answer is not None and parse_number(answer.text) is not None else None


def _is_formed(prompt: Prompt, text: str) -> float:
    return float(_find_number_answer(text) is not None)


def _is_correct(prompt: Prompt, text: str) -> float:
    answer = _find_number_answer(text)
    return float(answer is not None and same_number(answer.text, prompt.target["answer"]))


def format_answer(steps: Sequence[str], answer: int | str) -> str:
    """Return a complete answer: the steps as reasoning, then the result."""
    return f"<think>{' '.join(steps)}</think><answer>{answer}</answer>"


def gold_answer(prompt: Prompt) -> str:
    return format_answer(prompt.target["steps"], prompt.target["answer"])


_REWARDS = (Reward("correct", 1.0, _is_correct), Reward("format", 0.2, _is_formed))


def wordproblems_task(recipe: Recipe) -> Task:
    """Build the task. `recipe.seed` chooses the training problems; the test problems are always the same."""
    rewards = reweighted(_REWARDS, recipe.task.weights)

    def prompts(split: Split) -> Sequence[Prompt]:
        if split == "test":
            return distinct_prompts("test", "fixed", TEST_SIZE)
        return distinct_prompts("train", recipe.seed, recipe.task.size)

    def grade(prompt: Prompt, text: str) -> Grade:
        solved = _is_correct(prompt, text) == 1.0
        return graded(rewards, prompt, text, formed=_is_formed(prompt, text) == 1.0, solved=solved)

    return Task("wordproblems", prompts, grade, gold_answer, about="small word problems, generated; runs anywhere")
