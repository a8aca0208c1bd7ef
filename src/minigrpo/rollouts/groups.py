"""Roll out prompts into graded groups: the one function used by training, preflight and evaluation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from minigrpo.errors import TaskError
from minigrpo.models.chat_template import render, with_opening
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.grading import judge_group
from minigrpo.rollouts.oom import generate_with_retries
from minigrpo.types import Completion, Engine, Group, Progress, Prompt, Ready, Sampling, Split, Task
from minigrpo.ui.progress import Report


def rollout(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    *,
    n: int,
    sampling: Sampling,
    tokenizer: Any,
    grader: Grader | None = None,
    report: Report | None = None,
    observe: Ready | None = None,
    complete: Callable[[list[Group]], list[Group]] | None = None,
) -> list[Group]:
    """Ask the engine for n completions of each prompt and have the task judge each.

    With a grader, groups are judged while others are still being sampled; the outcome is the same. `report` is told how
    many completions have ended, with the tokens sampled so far and their rate; `observe` is passed each prompt's
    completions when they have ended; `complete` adds the groups that other ranks have rolled out. Raise TaskError where
    the task cannot judge, or where no reward function applied to any completion of several prompts.
    """
    rendered = [render(tokenizer, prompt) for prompt in prompts]
    progress = _report_tokens(report, len(rendered) * n) if report else None
    sample = partial(generate_with_retries, engine, rendered, n, sampling, progress=progress)
    if grader is None:
        answers = _answers(sample(ready=observe), prompts, tokenizer)
        graded = [judge_group(task, question.prompt, own) for question, own in zip(rendered, answers, strict=True)]
    else:
        pending = grader.open_batch(prompts)

        def ready(index: int, completions: tuple[Completion, ...]) -> None:
            pending.submit(index, with_opening(tokenizer, prompts[index], completions))
            if observe:
                observe(index, completions)

        answers = _answers(sample(ready=ready), prompts, tokenizer)
        graded = pending.collect(answers)
    groups = [
        Group(question.prompt, question.ids, own, grades)
        for question, own, grades in zip(rendered, answers, graded, strict=True)
    ]
    if complete:
        groups = complete(groups)
    report_unscored(task, groups, grader)
    return groups


def _answers(
    sampled: Sequence[tuple[Completion, ...]], prompts: Sequence[Prompt], tokenizer: Any
) -> list[tuple[Completion, ...]]:
    return [with_opening(tokenizer, prompt, own) for prompt, own in zip(prompts, sampled, strict=True)]


def _report_tokens(report: Report, completions: int) -> Progress:
    start = time.perf_counter()

    def progress(tokens: int, ended: int) -> None:
        rate = tokens / max(time.perf_counter() - start, 1e-9)
        report(ended, completions, f"{tokens} tokens, {rate:.0f} a second")

    report(0, completions, "reading the prompts")
    return progress


def report_unscored(task: Task, groups: Sequence[Group], grader: Grader | None) -> None:
    """Warn once of completions left unscored; raise TaskError where functions gave None for everything."""
    unscored = [(group, grade) for group in groups for grade in group.grades if not grade.scored]
    if not unscored:
        return
    whys = {str(grade.notes["grader"]): group.prompt.id for group, grade in reversed(unscored)}
    # One odd row asked alone (the last of a search, say) is no proof against the task.
    every = len(groups) > 1 and len(unscored) == sum(len(group.grades) for group in groups)
    if every and not any("took longer" in why for why in whys):
        reasons = "; ".join(f"{why}, first on prompt {name}" for why, name in sorted(whys.items()))
        raise TaskError(
            f"Task {task.name} could not score one completion of this step ({reasons}). At least one function must "
            "apply to each prompt."
        )
    for why, name in sorted(whys.items()):
        sentence = f"Left out, because it could not be scored: {why} (task {task.name}, first on prompt {name})."
        if grader is None:
            warnings.warn(sentence, stacklevel=3)
        else:
            grader.say_once(why, sentence)


def prompts_of(task: Task, split: Split, limit: int | None = None) -> Sequence[Prompt]:
    """Return the task's prompts, up to `limit`; raises TaskError where there is none."""
    prompts = task.prompts(split)
    if not len(prompts):
        raise TaskError(
            f"Task {task.name} has no {split} prompts. Give its `prompts({split!r})` at least one, or use another task."
        )
    return prompts if limit is None else prompts[:limit]
