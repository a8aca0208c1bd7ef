"""Prompts to graded groups: the one way used by training, preflight and evaluation."""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minigrpo.errors import MinigrpoError, TaskError
from minigrpo.render import render
from minigrpo.types import Engine, Grade, Group, Prompt, Sampling, Split, Task


def rollout(
    engine: Engine, task: Task, prompts: Sequence[Prompt], *, n: int, sampling: Sampling, tokenizer: Any
) -> list[Group]:
    """Ask the engine for n completions of each prompt and have the task judge each."""
    rendered = [render(tokenizer, prompt) for prompt in prompts]
    answers = engine.generate(rendered, n, sampling)
    return [
        Group(asked.prompt, asked.ids, siblings, tuple(judge(task, asked.prompt, one.text) for one in siblings))
        for asked, siblings in zip(rendered, answers, strict=True)
    ]


def judge(task: Task, prompt: Prompt, text: str) -> Grade:
    """The task's grade; a grader that fails is named with what it failed on, so that its author can repeat it."""
    where = f"prompt {prompt.id}, answer {text[:80]!r}{' ...' if len(text) > 80 else ''}"
    try:
        grade = task.grade(prompt, text)
    except MinigrpoError:
        raise
    except Exception as fault:
        last = traceback.extract_tb(fault.__traceback__)[-1]
        raise TaskError(
            f"The grader of task {task.name} raised {type(fault).__name__}: {fault} ({last.filename}:{last.lineno}) on "
            f"{where}. A grader must judge any text: give what it cannot read a reward, such as 0."
        ) from fault
    if not isinstance(grade, Grade):
        raise TaskError(
            f"The grader of task {task.name} returned {type(grade).__name__} on {where}. Return a minigrpo.Grade."
        )
    amounts = {"reward": grade.reward, **grade.parts}
    faulty = [f"{name} = {amount}" for name, amount in amounts.items() if not math.isfinite(amount)]
    if faulty:
        raise TaskError(
            f"The grader of task {task.name} gave {', '.join(faulty)} on {where}. Rewards must be finite numbers."
        )
    return grade


def prompts_of(task: Task, split: Split, limit: int | None = None) -> Sequence[Prompt]:
    """The task's prompts, up to `limit`; raises TaskError where there is none."""
    prompts = task.prompts(split)
    if not len(prompts):
        raise TaskError(
            f"Task {task.name} has no {split} prompts. Give its `prompts({split!r})` at least one, or use another task."
        )
    return prompts if limit is None else prompts[:limit]


@dataclass(frozen=True, slots=True)
class PromptSampler:
    """Shuffled epochs over the prompts. There is no state: what a step takes follows from the seed and the step.

    An epoch ends with its last full step; what is left over waits for the next epoch, which is shuffled anew. So no
    step holds a prompt twice, unless a step takes more than there are.
    """

    prompts: Sequence[Prompt]
    seed: int

    def take(self, step: int, count: int) -> list[Prompt]:
        """The prompts of this step. `count` must not change within a run: epochs are counted in steps."""
        if count > len(self.prompts):
            return self.repeated(step, count)
        steps_per_epoch = len(self.prompts) // count
        epoch, offset = divmod(step, steps_per_epoch)
        order = self.order(str(epoch))
        return [self.prompts[i] for i in order[offset * count : (offset + 1) * count]]

    def repeated(self, step: int, count: int) -> list[Prompt]:
        """More than there are. Copies get names of their own, because a name is also a random stream (Sampling)."""
        rounds = math.ceil(count / len(self.prompts))
        drawn = [
            self.prompts[i] if turn == 0 else replace(self.prompts[i], id=f"{self.prompts[i].id}#{turn + 1}")
            for turn in range(rounds)
            for i in self.order(f"{step}/{turn}")
        ]
        return drawn[:count]

    def order(self, name: str) -> list[int]:
        order = list(range(len(self.prompts)))
        random.Random(f"prompts/{self.seed}/{name}").shuffle(order)  # seeding by text is the same on every platform
        return order
