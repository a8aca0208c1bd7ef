"""A Task made of reward functions and rows: the short way to a task of your own.

    task = reward_task(score, rows=[{"prompt": "Say 7.", "answer": "7"}, ...])

A completion is `formed` where a function applied to it, and `solved` where the first function gave it 1 or more. The
row's `answer` is taken as a right answer, unless `gold` is given; where a row has none, or null, there is no `gold`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from minigrpo.config.schema import MOST_PROMPTS
from minigrpo.errors import TaskError
from minigrpo.tasks.common.dataset import DatasetRow, SplitRows, parse_rows, rows_to_prompts, split_rows
from minigrpo.tasks.common.rewards import Reward, reweighted, weighted_sum
from minigrpo.tasks.custom.ready_made import open_ready_made
from minigrpo.tasks.custom.reward_functions import (
    GroupView,
    RewardCallable,
    RewardLog,
    check_columns,
    inspect_function,
    name_row,
    score_group,
    tell_apart,
)
from minigrpo.types import Completion, Grade, Prompt, Split, Task

Rows = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]
_NOTHING_APPLIED = "no reward function applied"


def reward_task(
    *functions: Callable[..., Any] | str,
    rows: Rows,
    test_rows: Rows | None = None,
    name: str = "rewards",
    system: str | None = None,
    gold: Callable[[Prompt], str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Task:
    """Build the task.

    `functions`: reward functions, and judge:FILE or classifier:FOLDER as text. `weights`: the weight of each by its
    name, 1 by default. Raise TaskError for unusable rows.
    """
    table = read_rows(rows, test_rows)
    opened = open_ready_made(functions, Path.cwd())
    return build_reward_task(opened, table, name=name, system=system, gold=gold, weights=weights or {})


def read_rows(rows: Rows, test_rows: Rows | None, file: str = "") -> SplitRows:
    """Read rows from Python. `file`: what stands before their names in messages."""
    train = _read_python_rows(rows, f"{file}rows")
    if test_rows is None:
        return split_rows(train, f"{file}rows")
    return {"train": train, "test": _read_python_rows(test_rows, f"{file}test_rows")}


def _read_python_rows(rows: Any, name: str) -> list[DatasetRow]:
    """Read a list of rows, or call a function without parameters that returns one."""
    try:
        given = list(islice(rows() if callable(rows) else rows, MOST_PROMPTS + 1))
    except TypeError as fault:
        raise TaskError(f"{name} is neither a list of rows nor a function that returns one: {fault}.") from fault
    if len(given) > MOST_PROMPTS:
        raise TaskError(f"{name} gives more than {MOST_PROMPTS} rows, all of which are held in memory. Does it end?")
    return parse_rows([(f"{name}[{number}]", row) for number, row in enumerate(given)], name)


def build_reward_task(
    functions: Sequence[Callable[..., Any]],
    table: SplitRows,
    *,
    name: str,
    system: str | None = None,
    gold: Callable[[Prompt], str] | None = None,
    weights: Mapping[str, float],
    names: Mapping[int, str] | None = None,
) -> Task:
    """Build the task. `names`: the variables that hold functions, by id(), for those without a name of their own."""
    found = [inspect_function(one, f"{name}: reward function {place}") for place, one in enumerate(functions, 1)]
    known = tell_apart(found, names or {})
    counts = _check_weights(known, weights)
    every = [row for split in table.values() for row in split]
    for function in known:
        for row in every:
            check_columns(function, list(row.columns), row.where)
    prompts = {split: rows_to_prompts(rows, split, system) for split, rows in table.items()}
    plain = isinstance(every[0].prompt, str)
    answers = all(_is_answer(row.columns.get("answer")) for row in every)
    places = {prompt.id: row.where for split in table for prompt, row in zip(prompts[split], table[split], strict=True)}

    def grade_group(prompt: Prompt, completions: Sequence[Completion]) -> list[Grade]:
        question = prompt.messages[-1]["content"] if plain else [dict(message) for message in prompt.messages]
        row = places.get(prompt.id, "one of none of the splits")
        return _grade_group(known, counts, GroupView(prompt.id, row, question, prompt.target, completions))

    def grade(prompt: Prompt, text: str) -> Grade:
        return grade_group(prompt, [Completion(text, (), (), "stop")])[0]

    def prompts_of(split: Split) -> Sequence[Prompt]:
        return prompts[split]

    own_gold = gold or ((lambda prompt: str(prompt.target["answer"])) if answers else None)
    about = f"reward functions: {', '.join(function.name for function in known)}"
    closing = [told for function in known if (told := getattr(function.call, "closing_words", None))]

    def closing_sentences() -> list[str]:
        return [sentence for told in closing if (sentence := told())]

    return Task(name, prompts_of, grade, own_gold, about, grade_group, closing=closing_sentences if closing else None)


def _is_answer(value: Any) -> bool:
    """Tell whether a row's answer is one: null, and the NaN by which tables say it, are none."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _check_weights(functions: Sequence[RewardCallable], weights: Mapping[str, float]) -> dict[str, float]:
    rewards = [Reward(function.name, 1.0, lambda prompt, text: 0.0) for function in functions]
    if not rewards:
        raise TaskError("There is no reward function. Give at least one.")
    return {reward.name: reward.weight for reward in reweighted(rewards, weights)}


def _grade_group(functions: Sequence[RewardCallable], weights: Mapping[str, float], group: GroupView) -> list[Grade]:
    """Grade one group; a function that gave None for a completion has no part in its grade."""
    log = RewardLog(len(group.completions))
    columns = {function.name: score_group(function, group, log) for function in functions}
    metrics = {name: sum(values) / len(values) for name, values in log.metrics.items()}
    nothing = f"{_NOTHING_APPLIED}: {', '.join(columns)} gave None"
    grades = []
    for place in range(len(group.completions)):
        parts = {name: value for name, column in columns.items() if (value := column[place]) is not None}
        note = log.notes[place] if log.notes else {}
        try:
            total = weighted_sum(parts, weights)
        except TaskError as fault:
            raise name_row(fault, group) from None
        grades.append(
            Grade(
                total,
                parts,
                formed=bool(parts),
                solved=parts.get(functions[0].name, 0.0) >= 1,
                weights=weights,
                notes=note if parts else {**note, "grader": nothing},
                metrics=metrics,
            )
        )
    return grades
