"""Prompts to graded groups: the one way used by training, preflight and evaluation."""

from __future__ import annotations

import copy
import math
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minigrpo.errors import MinigrpoError, TaskError
from minigrpo.render import render
from minigrpo.types import Completion, Engine, Grade, Group, Prompt, Sampling, Split, Task

if TYPE_CHECKING:
    from minigrpo.grader import Grader


def rollout(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    *,
    n: int,
    sampling: Sampling,
    tokenizer: Any,
    grader: Grader | None = None,
) -> list[Group]:
    """Ask the engine for n completions of each prompt and have the task judge each.

    With a grader, groups are judged while others are still being sampled; the outcome is the same. Raises TaskError
    where the task cannot judge, or where no reward function applied to any completion of several prompts.
    """
    rendered = [render(tokenizer, prompt) for prompt in prompts]
    if grader is None:
        answers = engine.generate(rendered, n, sampling)
        graded = [judge_group(task, asked.prompt, own) for asked, own in zip(rendered, answers, strict=True)]
    else:
        batch = grader.begin(prompts)
        answers = engine.generate(rendered, n, sampling, batch.hand_over)
        graded = batch.collect(answers)
    groups = [
        Group(asked.prompt, asked.ids, own, grades)
        for asked, own, grades in zip(rendered, answers, graded, strict=True)
    ]
    look_for_unscored(task, groups, grader)
    return groups


def judge_group(task: Task, prompt: Prompt, completions: Sequence[Completion]) -> tuple[Grade, ...]:
    """The grades of all siblings, in their order."""
    return tuple(judgements(task, prompt, completions))


def judgements(task: Task, prompt: Prompt, completions: Sequence[Completion]) -> Iterator[Grade]:
    """Grades one by one, as far as the task judges one by one. Graders get a copy: the caller's prompt stays his."""
    shown = copy_of(prompt)
    if task.grade_group is None:
        for completion in completions:
            yield judge(task, shown, completion.text)
        return
    where = f"prompt {prompt.id}"
    try:
        grades = task.grade_group(shown, completions)
    except MinigrpoError:
        raise
    except (Exception, SystemExit) as fault:
        raise failure(task, fault, where) from fault
    if not isinstance(grades, list | tuple) or len(grades) != len(completions):
        what = f"{len(grades)} grades" if isinstance(grades, list | tuple) else type(grades).__name__
        raise TaskError(
            f"The grader of task {task.name} returned {what} for the {len(completions)} completions of {where}. "
            "Return a list with a minigrpo.Grade for each, in their order."
        )
    for grade, completion in zip(grades, completions, strict=True):
        yield checked(task, grade, named(prompt, completion.text))


def judge(task: Task, prompt: Prompt, text: str) -> Grade:
    """The task's grade; a grader that fails is named with what it failed on, so that its author can repeat it."""
    try:
        grade = task.grade(prompt, text)
    except MinigrpoError:
        raise
    except (Exception, SystemExit) as fault:
        raise failure(task, fault, named(prompt, text)) from fault
    return checked(task, grade, named(prompt, text))


def failure(task: Task, fault: BaseException, where: str) -> TaskError:
    last = traceback.extract_tb(fault.__traceback__)[-1]
    return TaskError(
        f"The grader of task {task.name} raised {type(fault).__name__}: {fault} ({last.filename}:{last.lineno}) on "
        f"{where}. A grader must judge any text: give what it cannot read a reward, such as 0."
    )


def checked(task: Task, grade: Any, where: str) -> Grade:
    """A Grade of finite numbers, or one that says in notes["grader"] why its reward is NaN: it could not be told."""
    if not isinstance(grade, Grade):
        raise TaskError(
            f"The grader of task {task.name} returned {type(grade).__name__} on {where}. Return a minigrpo.Grade."
        )
    untold = not grade.parts and "grader" in grade.notes
    amounts = {"reward": 0.0 if untold and not grade.scored else grade.reward, **grade.parts, **grade.metrics}
    faulty = [f"{name} = {amount}" for name, amount in amounts.items() if not is_finite(amount)]
    if faulty:
        raise TaskError(
            f"The grader of task {task.name} gave {', '.join(faulty)} on {where}. Rewards must be finite numbers."
        )
    return grade


def is_finite(amount: Any) -> bool:
    return not isinstance(amount, str) and hasattr(amount, "__float__") and math.isfinite(amount)


def named(prompt: Prompt, text: str) -> str:
    return f"prompt {prompt.id}, answer {text[:80]!r}{' ...' if len(text) > 80 else ''}"


def copy_of(prompt: Prompt) -> Prompt:
    """What cannot be copied (a lock, a handle) is handed out as it is."""
    try:
        messages = tuple(dict(message) for message in prompt.messages)
        return replace(prompt, messages=messages, target=copy.deepcopy(prompt.target))
    except Exception:  # deepcopy runs code of any class there is
        return prompt


def look_for_unscored(task: Task, groups: Sequence[Group], grader: Grader | None) -> None:
    """Say once what was left out; raise TaskError where functions gave None for everything."""
    unscored = [(group, grade) for group in groups for grade in group.grades if not grade.scored]
    if not unscored:
        return
    whys = {str(grade.notes["grader"]): group.prompt.id for group, grade in reversed(unscored)}
    # One odd row asked alone (the last of a search, say) is no proof against the task.
    every = len(groups) > 1 and len(unscored) == sum(len(group.grades) for group in groups)
    if every and not any("took longer" in why for why in whys):
        told = "; ".join(f"{why}, first on prompt {name}" for why, name in sorted(whys.items()))
        raise TaskError(
            f"Task {task.name} could not score one completion of this step ({told}). At least one function must apply "
            "to each prompt."
        )
    for why, name in sorted(whys.items()):
        sentence = f"Left out, because it could not be scored: {why} (task {task.name}, first on prompt {name})."
        if grader is None:
            warnings.warn(sentence, stacklevel=3)
        else:
            grader.say_once(why, sentence)


def prompts_of(task: Task, split: Split, limit: int | None = None) -> Sequence[Prompt]:
    """The task's prompts, up to `limit`; raises TaskError where there is none."""
    prompts = task.prompts(split)
    if not len(prompts):
        raise TaskError(
            f"Task {task.name} has no {split} prompts. Give its `prompts({split!r})` at least one, or use another task."
        )
    return prompts if limit is None else prompts[:limit]
