"""GSM8K: grade-school word problems whose answer is a number (arXiv 2110.14168), with the answer asked for in tags.

    <think>48 / 2 = 24 in May, so 48 + 24 = 72.</think><answer>72</answer>

Rows are {"question": ..., "answer": "... #### 72"}: from the Hub, at a fixed commit, or from `task.data`: a folder with
train.jsonl and test.jsonl, one file, or `wordproblems:`, generated problems in the same shape, which need no download.
A training question that also stands in the test split, or that was there before, is left out and said so.

The reward is 1 for the gold number alone, 0.5 for the gold number among words, else 0. Only the first counts as
solved. What is worth nothing, but seen in the metrics: whether there was exactly one answer, and whether the model
reasoned before it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

from minigrpo.config.schema import Recipe
from minigrpo.errors import TaskError
from minigrpo.tasks.builtin import wordproblems
from minigrpo.tasks.common.answers import TAGS, Reading, find_answer, parse_number
from minigrpo.tasks.common.dataset import Row, Table, as_prompts, read_data, read_hub, sayable
from minigrpo.tasks.common.math_answers import read_answer
from minigrpo.tasks.common.rewards import Reward, graded, reweighted, shown
from minigrpo.types import Grade, Prompt, Split, Task

HUB = "openai/gsm8k:main"
REVISION = "e53f048856ff4f594e959d75785d2c2d37b678ee"
GENERATED = "wordproblems:"

# The embedded model was brought up on the words of its own task; a model that reads well needs no more of them.
SYSTEM = wordproblems.SYSTEM
EXAMPLE = """

For example, to the question
A baker fills 6 trays with 12 rolls each and sells 50 rolls. How many rolls are left?
answer
<think>6 trays hold 6 * 12 = 72 rolls. 72 - 50 = 22 rolls are left.</think><answer>22</answer>"""

CALCULATOR = re.compile(r"<<[^<>]*>>")


def task(recipe: Recipe) -> Task:
    """`recipe.task.size` takes the first so many training questions; nothing is read before a prompt is asked for."""
    rewards = reweighted(REWARDS, recipe.task.weights)
    system = SYSTEM + EXAMPLE if recipe.task.example else SYSTEM

    @cache
    def prompts_by_split() -> dict[Split, list[Prompt]]:
        table = rows_of(recipe)
        return without_repeats({split: as_prompts(rows, split, system) for split, rows in table.items()})

    def prompts(split: Split) -> Sequence[Prompt]:
        found = prompts_by_split()[split]
        return found[: recipe.task.size] if split == "train" else found

    def grade(prompt: Prompt, text: str) -> Grade:
        worth, reading = judged(prompt, text)
        given = graded(rewards, prompt, text, formed=reading is not None, solved=worth == 1.0)
        return replace(given, answer=reading.canonical if reading else None)

    return Task("gsm8k", prompts, grade, gold, about="grade-school maths; from the Hub, or --task.data FOLDER")


def rows_of(recipe: Recipe) -> Table:
    """Raises TaskError, with the line, where something is not in GSM8K's shape."""
    source = recipe.task.data
    if source == GENERATED:
        return generated(recipe)
    if source is not None:
        return read_data(source, checked)
    try:
        return read_hub(HUB, checked, REVISION)
    except TaskError as fault:
        reason = " ".join(str(fault.__cause__ or fault).split())[:300]
        raise TaskError(
            f"GSM8K could not be loaded from the Hub ({HUB}): {reason} With its train.jsonl and test.jsonl in a folder "
            "no network is needed: --task.data FOLDER"
        ) from fault


def checked(rows: Sequence[tuple[str, Any]], source: str) -> list[Row]:
    if not rows:
        raise TaskError(f"{source} holds no rows.")
    return [checked_row(row, where) for where, row in rows]


def checked_row(row: Any, where: str) -> Row:
    """A question, and as columns what the grader needs: the gold number, and the solution for those who write it."""
    if not isinstance(row, Mapping):
        raise TaskError(f"{where} is {shown(row)}, not a row: an object with a question and an answer.")
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str):
            raise TaskError(f"{where} has no text under {name!r}, but the columns {shown(', '.join(map(str, row)))}.")
    steps, mark, end = row["answer"].rpartition("####")
    number = parse_number(end)
    if not mark or number is None:
        what = f"ends in {shown(end.strip())}" if mark else "has no ####"
        raise TaskError(f"{where}: its answer {what}. After #### must stand one number, as in '#### 1,200'.")
    columns = {"answer": Reading(Fraction(number), alone=True).canonical, "solution": solution(steps)}
    return Row(sayable(row["question"], where), columns, where)


def solution(steps: str) -> str:
    """The worked solution as a model should write it: without the calculator's marks, and without a tag of ours."""
    plain = CALCULATOR.sub("", steps).strip()
    return "" if any(tag in plain for tag in TAGS) else plain


def generated(recipe: Recipe) -> Table:
    """The embedded model's word problems as GSM8K would write them down; training problems follow from the seed."""
    drawn: dict[Split, list[Prompt]] = {
        "train": wordproblems.distinct("train", recipe.seed, recipe.task.size),
        "test": wordproblems.distinct("test", "fixed", wordproblems.TEST_SIZE),
    }
    return {split: checked(as_rows(prompts, split), GENERATED) for split, prompts in drawn.items()}


def as_rows(prompts: Iterable[Prompt], split: Split) -> list[tuple[str, dict[str, str]]]:
    return [
        (
            f"{GENERATED} {split}, row {number}",
            {
                "question": prompt.messages[-1]["content"],
                "answer": f"{' '.join(prompt.target['steps'])}\n#### {prompt.target['answer']}",
            },
        )
        for number, prompt in enumerate(prompts, 1)
    ]


def without_repeats(prompts: Mapping[Split, Sequence[Prompt]]) -> dict[Split, list[Prompt]]:
    """Each question once; one that stands in both splits stays in the test split, where nobody must have seen it."""
    seen: set[str] = set()
    kept: dict[Split, list[Prompt]] = {}
    for split in ("test", "train"):
        kept[split] = []
        for prompt in prompts[split]:
            if (key := asked(prompt)) not in seen:
                seen.add(key)
                kept[split].append(prompt)
    left_out = sum(map(len, prompts.values())) - sum(map(len, kept.values()))
    if left_out:
        warnings.warn(f"gsm8k: {left_out} questions were there before and are left out.", stacklevel=2)
    return kept


def asked(prompt: Prompt) -> str:
    """The question, whatever its spaces and capitals."""
    return " ".join(prompt.messages[-1]["content"].split()).casefold()


def judged(prompt: Prompt, text: str) -> tuple[float, Reading | None]:
    """What the answer is worth, and the one number that it holds."""
    answer = find_answer(text)
    reading = read_answer(answer.text) if answer else None
    if reading is None or reading.value != Fraction(prompt.target["answer"]):
        return 0.0, reading
    return 1.0 if reading.alone else 0.5, reading


def is_correct(prompt: Prompt, text: str) -> float:
    return judged(prompt, text)[0]


def has_one_answer(prompt: Prompt, text: str) -> float:
    return float(
        text.count("<answer>") == text.count("</answer>") == 1 and text.find("<answer>") < text.find("</answer>")
    )


def has_reasoned(prompt: Prompt, text: str) -> float:
    answer = find_answer(text)
    return float(answer is not None and bool(answer.reasoning))


def gold(prompt: Prompt) -> str:
    return f"<think>{prompt.target['solution']}</think><answer>{prompt.target['answer']}</answer>"


REWARDS = (
    Reward("correct", 1.0, is_correct),
    Reward("one_tag", 0.0, has_one_answer),
    Reward("reasoned", 0.0, has_reasoned),
)
