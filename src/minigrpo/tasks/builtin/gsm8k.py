"""GSM8K: grade-school word problems whose answer is a number (arXiv 2110.14168), with the answer asked for in tags.

    <think>48 / 2 = 24 in May, so 48 + 24 = 72.</think><answer>72</answer>

Rows are {"question": ..., "answer": "... #### 72"}. They come from the Hub, at a fixed commit, or from `task.data`: a
folder with train.jsonl and test.jsonl, one file, or `wordproblems:`, which generates problems in the same shape and
needs no download. A training question that repeats an earlier one or stands in the test split is left out, with a
warning.

The reward is 1 for the gold number alone, 0.5 for the gold number among words, else 0. Only the first counts as
solved. Two more parts have weight 0 and are only logged: whether there was exactly one answer, and whether the model
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
from minigrpo.tasks.common.answers import TAGS, ParsedNumber, find_answer, parse_number
from minigrpo.tasks.common.dataset import (
    DatasetRow,
    SplitRows,
    check_prompt_text,
    read_data,
    read_hub_dataset,
    rows_to_prompts,
)
from minigrpo.tasks.common.math_answers import read_answer
from minigrpo.tasks.common.rewards import Reward, graded, reweighted, shorten_repr
from minigrpo.types import Grade, Prompt, Split, Task

_HUB_DATASET = "openai/gsm8k:main"
REVISION = "e53f048856ff4f594e959d75785d2c2d37b678ee"
GENERATED_DATA = "wordproblems:"

# The embedded model was trained on the system prompt of its own task, and knows no other.
GSM8K_SYSTEM_PROMPT = wordproblems.SYSTEM_PROMPT
# Small instruct models copy the length of the example: numbered steps bring more right answers than one line
# (docs/gsm8k.md has the figures).
SYSTEM_PROMPT_WITH_EXAMPLE = """You solve word problems. Reason step by step, one sentence a step, between <think> \
and </think>. Then write the final number alone between <answer> and </answer>.

For example, to the question
A baker fills 6 trays with 12 rolls each and sells 50 rolls. How many rolls are left?
answer
<think>
1. The baker fills 6 trays with 12 rolls each. That makes 6 * 12 = 72 rolls.
2. The baker sells 50 rolls. That leaves 72 - 50 = 22 rolls.
</think>
<answer>22</answer>"""

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def gsm8k_task(recipe: Recipe) -> Task:
    """Build the task; no data is read before a prompt is asked for.

    `recipe.task.size` limits the training split to its first questions.
    """
    rewards = reweighted(_REWARDS, recipe.task.weights)
    system = SYSTEM_PROMPT_WITH_EXAMPLE if recipe.task.example else GSM8K_SYSTEM_PROMPT

    @cache
    def prompts_by_split() -> dict[Split, list[Prompt]]:
        table = _load_rows(recipe)
        return _drop_repeats({split: rows_to_prompts(rows, split, system) for split, rows in table.items()})

    def prompts(split: Split) -> Sequence[Prompt]:
        found = prompts_by_split()[split]
        return found[: recipe.task.size] if split == "train" else found

    def grade(prompt: Prompt, text: str) -> Grade:
        worth, reading = _read_and_compare(prompt, text)
        given = graded(rewards, prompt, text, formed=reading is not None, solved=worth == 1.0)
        return replace(given, answer=reading.canonical if reading else None)

    return Task("gsm8k", prompts, grade, _gold_answer, about="grade-school maths; from the Hub, or --task.data FOLDER")


def _load_rows(recipe: Recipe) -> SplitRows:
    """Load the rows that the recipe names. Raise TaskError, with the line, for a row that is not in GSM8K's shape."""
    source = recipe.task.data
    if source == GENERATED_DATA:
        return _generate_rows(recipe)
    if source is not None:
        return read_data(source, _parse_gsm8k_rows)
    try:
        return read_hub_dataset(_HUB_DATASET, _parse_gsm8k_rows, REVISION)
    except TaskError as fault:
        reason = " ".join(str(fault.__cause__ or fault).split())[:300]
        raise TaskError(
            f"GSM8K could not be loaded from the Hub ({_HUB_DATASET}): {reason} With its train.jsonl and test.jsonl "
            "in a folder no network is needed: --task.data FOLDER"
        ) from fault


def _parse_gsm8k_rows(rows: Sequence[tuple[str, Any]], source: str) -> list[DatasetRow]:
    if not rows:
        raise TaskError(f"{source} holds no rows.")
    return [_parse_gsm8k_row(row, where) for where, row in rows]


def _parse_gsm8k_row(row: Any, where: str) -> DatasetRow:
    """Return the question, with the gold number and the worked solution as columns."""
    if not isinstance(row, Mapping):
        raise TaskError(f"{where} is {shorten_repr(row)}, not a row: an object with a question and an answer.")
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str):
            raise TaskError(
                f"{where} has no text under {name!r}, but the columns {shorten_repr(', '.join(map(str, row)))}."
            )
    steps, mark, end = row["answer"].rpartition("####")
    number = parse_number(end)
    if not mark or number is None:
        what = f"ends in {shorten_repr(end.strip())}" if mark else "has no ####"
        raise TaskError(f"{where}: its answer {what}. After #### must stand one number, as in '#### 1,200'.")
    columns = {"answer": ParsedNumber(Fraction(number), alone=True).canonical, "solution": _clean_solution(steps)}
    return DatasetRow(check_prompt_text(row["question"], where), columns, where)


def _clean_solution(steps: str) -> str:
    """Return the worked solution without calculator marks; "" where it contains one of our tags."""
    plain = _CALCULATOR.sub("", steps).strip()
    return "" if any(tag in plain for tag in TAGS) else plain


def _generate_rows(recipe: Recipe) -> SplitRows:
    """Generate the embedded model's word problems in GSM8K's format; the seed chooses the training problems."""
    drawn: dict[Split, list[Prompt]] = {
        "train": wordproblems.distinct_prompts("train", recipe.seed, recipe.task.size),
        "test": wordproblems.distinct_prompts("test", "fixed", wordproblems.TEST_SIZE),
    }
    return {
        split: _parse_gsm8k_rows(_prompts_to_rows(prompts, split), GENERATED_DATA) for split, prompts in drawn.items()
    }


def _prompts_to_rows(prompts: Iterable[Prompt], split: Split) -> list[tuple[str, dict[str, str]]]:
    return [
        (
            f"{GENERATED_DATA} {split}, row {number}",
            {
                "question": prompt.messages[-1]["content"],
                "answer": f"{' '.join(prompt.target['steps'])}\n#### {prompt.target['answer']}",
            },
        )
        for number, prompt in enumerate(prompts, 1)
    ]


def _drop_repeats(prompts: Mapping[Split, Sequence[Prompt]]) -> dict[Split, list[Prompt]]:
    """Keep each question once. A question in both splits stays in the test split, so that it is never trained on."""
    seen: set[str] = set()
    kept: dict[Split, list[Prompt]] = {}
    for split in ("test", "train"):
        kept[split] = []
        for prompt in prompts[split]:
            if (key := question_key(prompt)) not in seen:
                seen.add(key)
                kept[split].append(prompt)
    left_out = sum(map(len, prompts.values())) - sum(map(len, kept.values()))
    if left_out:
        warnings.warn(f"gsm8k: {left_out} questions were there before and are left out.", stacklevel=2)
    return kept


def question_key(prompt: Prompt) -> str:
    """Return the question with spaces and capitals normalised."""
    return " ".join(prompt.messages[-1]["content"].split()).casefold()


def _read_and_compare(prompt: Prompt, text: str) -> tuple[float, ParsedNumber | None]:
    """Return the reward of the answer and the one number that it contains."""
    answer = find_answer(text)
    reading = read_answer(answer.text) if answer else None
    if reading is None or reading.value != Fraction(prompt.target["answer"]):
        return 0.0, reading
    return 1.0 if reading.alone else 0.5, reading


def _is_correct(prompt: Prompt, text: str) -> float:
    return _read_and_compare(prompt, text)[0]


def _has_one_answer(prompt: Prompt, text: str) -> float:
    return float(
        text.count("<answer>") == text.count("</answer>") == 1 and text.find("<answer>") < text.find("</answer>")
    )


def _has_reasoned(prompt: Prompt, text: str) -> float:
    answer = find_answer(text)
    return float(answer is not None and bool(answer.reasoning))


def _gold_answer(prompt: Prompt) -> str:
    return f"<think>{prompt.target['solution']}</think><answer>{prompt.target['answer']}</answer>"


_REWARDS = (
    Reward("correct", 1.0, _is_correct),
    Reward("one_tag", 0.0, _has_one_answer),
    Reward("reasoned", 0.0, _has_reasoned),
)
