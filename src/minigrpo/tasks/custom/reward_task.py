"""A Task made of reward functions and rows: the short way to a task of your own.

    task = reward_task(score, rows=[{"prompt": "Say 7.", "answer": "7"}, ...])

A completion is `formed` where a function applied to it, and `solved` where the first function gave it 1 or more. A
right answer is taken to be the row's `answer`, unless `gold` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from minigrpo.errors import TaskError
from minigrpo.tasks.common.dataset import Row, Table, as_prompts, checked_rows, divided
from minigrpo.tasks.common.rewards import Reward, reweighted, weighted
from minigrpo.tasks.custom.reward_functions import Function, GroupView, Logged, check_columns, read_function, scores
from minigrpo.types import Completion, Grade, Prompt, Split, Task

Rows = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]
NOTHING_APPLIED = "no reward function applied"


def reward_task(
    *functions: Callable[..., Any],
    rows: Rows,
    test_rows: Rows | None = None,
    name: str = "rewards",
    system: str | None = None,
    gold: Callable[[Prompt], str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Task:
    """`weights`: what each function counts in the sum, by its name; 1 where it is not named. Raises TaskError."""
    table = table_of(rows, test_rows)
    return scored_task(functions, table, name=name, system=system, gold=gold, weights=weights or {})


def table_of(rows: Rows, test_rows: Rows | None) -> Table:
    train = python_rows(rows, "rows")
    if test_rows is None:
        return divided(train, "rows")
    return {"train": train, "test": python_rows(test_rows, "test_rows")}


def python_rows(rows: Any, name: str) -> list[Row]:
    """A list of rows, or a function without parameters that gives one."""
    try:
        given = list(rows() if callable(rows) else rows)
    except TypeError as fault:
        raise TaskError(f"{name} is neither a list of rows nor a function that returns one: {fault}.") from fault
    return checked_rows([(f"{name}[{number}]", row) for number, row in enumerate(given)], name)


def scored_task(
    functions: Sequence[Callable[..., Any]],
    table: Table,
    *,
    name: str,
    system: str | None = None,
    gold: Callable[[Prompt], str] | None = None,
    weights: Mapping[str, float],
) -> Task:
    known = [read_function(one, f"{name}: reward function {place}") for place, one in enumerate(functions, 1)]
    counts = checked_weights(known, weights)
    every = [row for split in table.values() for row in split]
    for function in known:
        for row in every:
            check_columns(function, list(row.columns), row.where)
    prompts = {split: as_prompts(rows, split, system) for split, rows in table.items()}
    plain = isinstance(every[0].prompt, str)
    answers = all("answer" in row.columns for row in every)

    def grade_group(prompt: Prompt, completions: Sequence[Completion]) -> list[Grade]:
        said = prompt.messages[-1]["content"] if plain else [dict(message) for message in prompt.messages]
        return judged(known, counts, GroupView(prompt.id, said, prompt.target, completions))

    def grade(prompt: Prompt, text: str) -> Grade:
        return grade_group(prompt, [Completion(text, (), (), "stop")])[0]

    def prompts_of(split: Split) -> Sequence[Prompt]:
        return prompts[split]

    own_gold = gold or ((lambda prompt: str(prompt.target["answer"])) if answers else None)
    about = f"reward functions: {', '.join(function.name for function in known)}"
    return Task(name, prompts_of, grade, own_gold, about, grade_group)


def checked_weights(functions: Sequence[Function], weights: Mapping[str, float]) -> dict[str, float]:
    rewards = [Reward(function.name, 1.0, lambda prompt, text: 0.0) for function in functions]
    if not rewards:
        raise TaskError("There is no reward function. Give at least one.")
    return {reward.name: reward.weight for reward in reweighted(rewards, weights)}


def judged(functions: Sequence[Function], weights: Mapping[str, float], asked: GroupView) -> list[Grade]:
    """The grades of one group: functions that gave None for a completion are no part of its grade."""
    logged = Logged(len(asked.completions))
    columns = {function.name: scores(function, asked, logged) for function in functions}
    metrics = {name: sum(values) / len(values) for name, values in logged.metrics.items()}
    nothing = f"{NOTHING_APPLIED}: {', '.join(columns)} gave None"
    grades = []
    for place in range(len(asked.completions)):
        parts = {name: value for name, column in columns.items() if (value := column[place]) is not None}
        note = logged.notes[place] if logged.notes else {}
        grades.append(
            Grade(
                weighted(parts, weights),
                parts,
                formed=bool(parts),
                solved=parts.get(functions[0].name, 0.0) >= 1,
                weights=weights,
                notes=note if parts else {**note, "grader": nothing},
                metrics=metrics,
            )
        )
    return grades
