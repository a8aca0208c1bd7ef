"""Have a task judge completions: its grades checked, its faults told as errors that name the answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from minigrpo.errors import TaskError
from minigrpo.tasks.common.dataset import has_half_character
from minigrpo.tasks.common.rewards import LARGEST_REWARD, as_number, shorten_repr
from minigrpo.types import Completion, Grade, Prompt, Task
from minigrpo.utils.faults import told_as_task_error


def judge_group(task: Task, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Grade, ...]:
    """Grade all siblings; the grades are in their order."""
    return tuple(iter_grades(task, prompt, completions))


def iter_grades(task: Task, prompt: Prompt, completions: Sequence[Completion]) -> Iterator[Grade]:
    """Yield grades, one by one where the task grades so. Graders get a copy of the prompt, never the caller's."""
    shown = copy_prompt(prompt)
    if task.grade_group is None:
        for completion in completions:
            yield judge(task, shown, completion.answer)
        return
    where = f"prompt {prompt.id}"
    with _grader_told(task, where):
        grades = task.grade_group(shown, completions)
    if not isinstance(grades, list | tuple) or len(grades) != len(completions):
        what = f"{len(grades)} grades" if isinstance(grades, list | tuple) else type(grades).__name__
        raise TaskError(
            f"The grader of task {task.name} returned {what} for the {len(completions)} completions of {where}. "
            "Return a list with a minigrpo.Grade for each, in their order."
        )
    for grade, completion in zip(grades, completions, strict=True):
        yield check_grade(task, grade, answer_label(prompt, completion.answer))


def judge(task: Task, prompt: Prompt, text: str) -> Grade:
    """Ask the task for its grade; raise TaskError naming what a grader failed on, so that its author can repeat it."""
    where = answer_label(prompt, text)
    with _grader_told(task, where):
        grade = task.grade(prompt, text)
    return check_grade(task, grade, where)


def gold_answer(task: Task, prompt: Prompt) -> str:
    """Return the task's own right answer. Raise TaskError for whatever its `gold` raises, and for what is no text."""
    assert task.gold is not None
    with told_as_task_error(f"The `gold` of task {task.name}", f"on prompt {prompt.id}."):
        answer = task.gold(prompt)
    if not isinstance(answer, str):
        raise TaskError(
            f"The `gold` of task {task.name} gave {shorten_repr(answer)} on prompt {prompt.id}. Return the text of an "
            "answer."
        )
    if has_half_character(answer):
        raise TaskError(
            f"The `gold` of task {task.name} gave half a character (a lone surrogate) on prompt {prompt.id}, which no "
            "model can write."
        )
    return answer


def _grader_told(task: Task, where: str) -> AbstractContextManager[None]:
    """Say which grader raised what, in which line, on which answer."""
    rest = f"on {where}. A grader must judge any text: give what it cannot read a reward, such as 0."
    return told_as_task_error(f"The grader of task {task.name}", rest)


def check_grade(task: Task, grade: Any, where: str) -> Grade:
    """Return a Grade of finite numbers, or one that says in notes["grader"] why its reward is NaN.

    Raises TaskError for anything else.
    """
    if not isinstance(grade, Grade):
        raise TaskError(
            f"The grader of task {task.name} returned {type(grade).__name__} on {where}. Return a minigrpo.Grade."
        )
    untold = not grade.parts and "grader" in grade.notes
    amounts = {"reward": 0.0 if untold and not grade.scored else grade.reward, **grade.parts, **grade.metrics}
    faulty = [f"{name} = {shorten_number(amount)}" for name, amount in amounts.items() if not is_finite(amount)]
    if faulty:
        raise TaskError(
            f"The grader of task {task.name} gave {', '.join(faulty)} on {where}. Rewards must be finite numbers "
            f"of at most {LARGEST_REWARD:g}: their squares are summed."
        )
    return grade


def is_finite(amount: Any) -> bool:
    return abs(as_number(amount)) <= LARGEST_REWARD  # a comparison with NaN is false


def shorten_number(amount: Any) -> str:
    return str(amount) if isinstance(amount, float | str) else shorten_repr(amount)


def answer_label(prompt: Prompt, text: str) -> str:
    """Name an answer in an error, by its prompt and its first 80 characters."""
    return f"prompt {prompt.id}, answer {text[:80]!r}{' ...' if len(text) > 80 else ''}"


def copy_prompt(prompt: Prompt) -> Prompt:
    """Copy a prompt; what cannot be copied (a lock, a handle) is handed out as it is."""
    try:
        messages = tuple(dict(message) for message in prompt.messages)
        return replace(prompt, messages=messages, target=copy.deepcopy(prompt.target))
    except Exception:  # deepcopy runs code of any class there is
        return prompt
