"""Evaluate a model on prompts of a task, keep every answer, and compare two models.

Prompts are rendered by the function that training uses, and sampled with the limit that training had. Two models are
compared prompt by prompt on the same prompts with the same decoding, or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from minigrpo.config.schema import MOST_ANSWERS
from minigrpo.errors import ArtifactError, RecipeError
from minigrpo.evaluation.answer_cache import AnswerCache
from minigrpo.evaluation.statistics import PairedDifference, Scores, paired_difference, score_groups
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.groups import rollout
from minigrpo.types import Engine, Prompt, Sampling, Split, Task
from minigrpo.ui.progress import Report, no_report

ROWS = 256
"""Completions asked for in one call, so that progress can be shown."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of one model on one task. `name` names the model for people."""

    name: str
    task: str
    split: Split
    sampling: Sampling
    seconds: float
    scores: Scores

    @property
    def decoding(self) -> str:
        """Return the decoding in words: greedy, temperature 1, or temperature 1 x 8 samples."""
        if self.sampling.temperature == 0:
            return "greedy"
        samples = f" x {self.scores.samples} samples" if self.scores.samples > 1 else ""
        return f"temperature {self.sampling.temperature:g}{samples}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Read back what `to_dict` gave, from JSON too. Raise KeyError or TypeError for anything else."""
        names = ("name", "task", "split", "seconds")
        return cls(
            **{name: data[name] for name in names},
            sampling=Sampling(**data["sampling"]),
            scores=Scores.from_dict(data["scores"]),
        )

    def summary(self) -> dict[str, Any]:
        """Return `to_dict` without the answers."""
        whole = self.to_dict()
        del whole["scores"]["answers"]
        return whole


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two evaluations of the same prompts with the same decoding, before and after, and what changed."""

    before: Evaluation
    after: Evaluation
    change: PairedDifference

    def summary(self) -> dict[str, Any]:
        return {"before": self.before.summary(), "after": self.after.summary(), "change": asdict(self.change)}


def evaluate(
    engine: Engine,
    task: Task,
    *,
    name: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    tokenizer: Any,
    n: int = 1,
    split: Split = "test",
    answer_cache: AnswerCache | None = None,
    grader: Grader | None = None,
    report: Report = no_report,
) -> Evaluation:
    """Sample n answers to every prompt and grade them; a grader grades while others are still sampled.

    What the cache holds is not sampled again.
    """
    if n > 1 and sampling.temperature == 0:
        raise RecipeError(f"{n} samples at temperature 0 are all the same. Add --temperature 1, or leave -n at 1.")
    if n > MOST_ANSWERS:
        raise RecipeError(
            f"{n} answers to one prompt are in memory at once; {MOST_ANSWERS} are the most. Ask for fewer."
        )
    start = time.perf_counter()
    scores = grade_prompts(
        engine,
        task,
        prompts,
        n=n,
        sampling=sampling,
        tokenizer=tokenizer,
        answer_cache=answer_cache,
        grader=grader,
        report=report,
    )
    return Evaluation(name, task.name, split, sampling, time.perf_counter() - start, scores)


def grade_prompts(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    sampling: Sampling,
    tokenizer: Any,
    report: Report = no_report,
    rows: int = ROWS,
    grader: Grader | None = None,
    answer_cache: AnswerCache | None = None,
) -> Scores:
    """Sample n answers to every prompt and score them. `rows`: completions a call.

    What the cache holds is not sampled again; new answers are added to it.
    """
    groups = answer_cache.load(prompts) if answer_cache else {}
    left = [prompt for prompt in prompts if prompt.id not in groups]
    batch = max(1, rows // n)
    for start in range(0, len(left), batch):
        part = left[start : start + batch]
        counted = _count_prompts(report, len(groups), len(prompts), n)
        fresh = rollout(engine, task, part, n=n, sampling=sampling, tokenizer=tokenizer, grader=grader, report=counted)
        groups |= {group.prompt.id: group for group in fresh}
        if answer_cache:
            answer_cache.add(fresh)
        right = fmean(grade.solved for group in groups.values() for grade in group.grades)
        report(len(groups), len(prompts), f"{right:.0%} right")
    return score_groups([groups[prompt.id] for prompt in prompts])


def _count_prompts(report: Report, before: int, prompts: int, n: int) -> Report:
    """Return a report of completions that reports prompts: those done `before`, and one for each n completions."""

    def counted(done: int, total: int = 0, note: str = "") -> None:
        report(before + done // n, prompts, note)

    return counted


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """Compare two evaluations. Raise ArtifactError where task, split, decoding or number of samples differ."""
    settings = [(e.task, e.split, e.sampling, e.scores.samples) for e in (before, after)]
    if settings[0] != settings[1]:
        raise ArtifactError(
            f"{before.name} and {after.name} were evaluated differently: {settings[0]} and {settings[1]}. Use the "
            "same task, temperature and number of samples for both."
        )
    return Comparison(before, after, paired_difference(before.scores, after.scores))


def pick_examples(evaluation: Evaluation, count: int = 2) -> list[dict[str, Any]]:
    """Return the first `count` right answers and the first `count` wrong ones, at most one of each kind per prompt."""
    chosen: list[dict[str, Any]] = []
    for solved in (True, False):
        kind = {a["prompt"]: a for a in reversed(evaluation.scores.answers) if a["solved"] == solved}
        chosen += list(reversed(kind.values()))[:count]
    return chosen


def pick_example_pairs(comparison: Comparison, count: int = 2) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return `count` pairs (answer before, answer after) to the same prompt: first those gained, then the rest."""
    pairs = list(zip(comparison.before.scores.answers, comparison.after.scores.answers, strict=True))
    return sorted(pairs, key=lambda pair: pair[0]["solved"] - pair[1]["solved"])[:count]
