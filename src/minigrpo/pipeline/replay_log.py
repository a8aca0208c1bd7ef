"""The log of a replayed run: each step is compared with what the run logged as soon as it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minigrpo.config.schema import TaskConfig
from minigrpo.pipeline.step_differences import Difference, LoggedSteps, first_difference
from minigrpo.rollouts.grading import judge_group
from minigrpo.runs.logger import RunLogger, group_row, row_text
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Group, Task
from minigrpo.ui.progress import Report
from minigrpo.ui.screen import Screen

TRIES = 4
"""Gradings of one group, to see whether its grader agrees with itself."""


class ReplayLog(RunLogger):
    """Compares steps in place of showing them. `exact`: steps without a difference; `differences`: the first of each
    other step. `kept`: the group that a differing reward is of, by step. `group`: the one asked for, both ways."""

    def __init__(
        self, scratch: RunDir, logged: LoggedSteps, start: int, until: int, *, report: Report, group: int | None = None
    ) -> None:
        super().__init__(scratch, until, console=Screen(stderr=True, quiet=True, force_terminal=False))
        self._logged, self._start, self._until, self._report = logged, start, until, report
        self._wanted = group
        self.step = start
        self.exact: list[int] = []
        self.differences: list[Difference] = []
        self.kept: dict[int, Group] = {}
        self.group: dict[str, Any] | None = None
        self.without_ids = False

    def rewind(self, positions: Mapping[str, Mapping[str, Any]]) -> None:
        """Do nothing: the scratch run holds the figures up to its checkpoint, and no groups."""

    def say(self, text: str) -> None:
        """Say nothing: what the run said of these steps, it has said."""

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[Group],
        advantages_PG: Sequence[Sequence[float]],
    ) -> None:
        super().record(step, metrics, groups, advantages_PG)
        rows = [json.loads(row_text(group_row(step, *each))) for each in zip(groups, advantages_PG, strict=True)]
        then = self._logged.take(step)
        self.step = step
        self.without_ids |= any("ids" not in row for row in then.groups)
        found = first_difference(step, then, json.loads(row_text({"step": step, **metrics})), rows)
        if found is None:
            self.exact.append(step)
        else:
            self.differences.append(found)
        if found is not None and found.kind == "reward" and not self.kept:
            self.kept[step] = next(group for group in groups if group.prompt.id == found.prompt)
        if step == self._until and self._wanted is not None:
            self.group = _one_group(self._wanted, then.groups, rows)
        words = f"not exact: step {self.differences[-1].step}" if self.differences else "exact"
        self._report(step - self._start, self._until - self._start, words)


def _one_group(wanted: int, then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    place = wanted - 1
    return {
        "number": wanted,
        "of": len(now),
        "logged": then[place] if place < len(then) else None,
        "replayed": now[place] if place < len(now) else None,
    }


def why_graded_otherwise(task: Task, group: Group, config: TaskConfig, began: Mapping[str, str] | None) -> str:
    """Say why an answer may have earned another reward: a grader that disagrees with itself, or was edited since.

    `began`: hashes of the task's files when the run began; None where nobody kept them.
    """
    from minigrpo.training.origin import hash_task_files

    graded = [[grade.reward for grade in judge_group(task, group.prompt, group.completions)] for _ in range(TRIES)]
    graded.append([grade.reward for grade in group.grades])
    now = hash_task_files(config)
    edited = sorted(name for name in {*now, *(began or {})} if began is not None and began.get(name) != now.get(name))
    for sibling, rewards in enumerate(zip(*graded[:TRIES], strict=True), 1):
        if len(set(map(str, rewards))) > 1:
            values = ", ".join(f"{reward:g}" for reward in rewards)
            return (
                f"The reward function is not deterministic: asked {TRIES} times, it gave answer {sibling} of prompt "
                f"{group.prompt.id} {values}."
            )
    if edited:
        return f"Edited since the run began: {', '.join(edited)}."
    if began is None:
        return "The run is of before hashes of its task's files were kept, so whether they were edited is unknown."
    return (
        "The task's own files are as they were when the run began. Either the line in the log was changed, or the "
        "reward function depends on something else: a package, a file that it reads, a server, the time."
    )
