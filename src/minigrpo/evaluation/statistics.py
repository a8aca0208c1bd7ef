"""Statistics of graded groups: accuracy and other rates with confidence intervals, and paired comparison of two models.

Intervals are 95 %. With several samples a prompt, a prompt's score is the share of its samples that are right, and
intervals count prompts, not samples: the samples of one prompt resemble one another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, comb, sqrt
from statistics import fmean
from typing import Any

from minigrpo.errors import ArtifactError
from minigrpo.types import Grade, Group
from minigrpo.utils.json_values import json_ready
from minigrpo.utils.rates import Z_95, Rate, wilson_interval


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one evaluation.

    `answers`: one dict a completion, in prompt order, siblings together: enough to compute everything again.

    `majority`: share of prompts for which a vote among the samples is right. Where grades carry answers, the most
    frequent answer wins, the earliest among equals (arXiv 2203.11171); elsewhere wrong answers cannot be compared with
    one another, and more than half of the samples must be right. `pass_at[k]`: probability that k samples include a
    right one, an unbiased estimate from the n drawn (arXiv 2107.03374).
    """

    samples: int
    accuracy: Rate
    formed: Rate
    accuracy_formed: Rate
    truncated: Rate
    mean_reward: float
    mean_tokens: float
    tokens: int
    pass_at: dict[int, float]
    majority: float | None
    answers: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Read back what `to_dict` gave, from JSON too, whose keys are text."""
        rates = {name: Rate(**data[name]) for name in ("accuracy", "formed", "accuracy_formed", "truncated")}
        pass_at = {int(k): value for k, value in data["pass_at"].items()}
        return cls(**{**data, **rates, "pass_at": pass_at, "answers": tuple(data["answers"])})


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The difference between two evaluations of the same prompts, after minus before, with its interval.

    `p`: exact sign test over prompts (with one sample: McNemar's test).
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p: float

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def score_groups(groups: Sequence[Group]) -> Scores:
    """Compute the scores of groups of equal size.

    A completion that could not be scored is not right, and its reward is not part of the mean, which is 0 where nothing
    could be scored.
    """
    n = len(groups[0].grades)
    grades = [grade for group in groups for grade in group.grades]
    completions = [completion for group in groups for completion in group.completions]
    right_P = [sum(grade.solved for grade in group.grades) for group in groups]
    formed = [grade for grade in grades if grade.formed]
    lengths = [len(completion.token_ids) for completion in completions]
    rewards = [grade.reward for grade in grades if grade.scored]
    return Scores(
        samples=n,
        accuracy=wilson_interval(fmean(right_P) / n, len(groups)),
        formed=wilson_interval(len(formed) / len(grades), len(groups)),
        accuracy_formed=wilson_interval(_share(grade.solved for grade in formed), ceil(len(formed) / n)),
        truncated=wilson_interval(_share(completion.finish == "length" for completion in completions), len(groups)),
        mean_reward=fmean(rewards) if rewards else 0.0,
        mean_tokens=fmean(lengths),
        tokens=sum(lengths),
        pass_at={k: fmean(pass_at_k(k, n, right) for right in right_P) for k in _powers_of_two(n)} if n > 1 else {},
        majority=fmean(_majority_is_right(group.grades) for group in groups) if n > 1 else None,
        answers=tuple(answer for group in groups for answer in _answer_records(group)),
    )


def _majority_is_right(grades: Sequence[Grade]) -> bool:
    """Return whether a vote among the samples of one prompt finds a right answer.

    Samples without an answer do not vote.
    """
    votes = Counter(grade.answer for grade in grades if grade.answer is not None)
    if not votes:
        return 2 * sum(grade.solved for grade in grades) > len(grades)
    winner = votes.most_common(1)[0][0]  # on a tie the first that was counted
    return any(grade.solved for grade in grades if grade.answer == winner)


def _answer_records(group: Group) -> list[dict[str, Any]]:
    return [
        {
            "prompt": group.prompt.id,
            "messages": [dict(message) for message in group.prompt.messages],
            "target": json_ready(group.prompt.target),
            **({"opening": completion.opening} if completion.opening else {}),
            "text": completion.text,
            "tokens": len(completion.token_ids),
            "finish": completion.finish,
            "reward": grade.reward if grade.scored else None,
            "parts": dict(grade.parts),
            "formed": grade.formed,
            "solved": grade.solved,
            **({"answer": grade.answer} if grade.answer is not None else {}),
            **({"notes": json_ready(grade.notes)} if grade.notes else {}),
        }
        for completion, grade in zip(group.completions, group.grades, strict=True)
    ]


def paired_difference(before: Scores, after: Scores) -> PairedDifference:
    """Compare prompt by prompt. Raise ArtifactError where the prompts are not the same."""
    before_P, after_P = _accuracy_by_prompt(before), _accuracy_by_prompt(after)
    if before_P.keys() != after_P.keys():
        raise ArtifactError(
            f"The two evaluations answered different prompts ({len(before_P)} and {len(after_P)}, "
            f"{len(before_P.keys() & after_P.keys())} in common). Evaluate both with the same task, split and --limit."
        )
    change_P = [after_P[name] - before_P[name] for name in before_P]
    gained, lost = sum(change > 0 for change in change_P), sum(change < 0 for change in change_P)
    # Agresti and Min: two pseudo-pairs, half of one in each cell, keep the interval valid when nothing is lost.
    count = len(change_P) + 2
    mean = sum(change_P) / count
    square = (sum(change**2 for change in change_P) + 1) / count
    half = Z_95 * sqrt(max(0.0, square - mean**2) / count)
    return PairedDifference(
        fmean(change_P), max(-1.0, mean - half), min(1.0, mean + half), gained, lost, sign_test(gained, lost)
    )


def _accuracy_by_prompt(scores: Scores) -> dict[str, float]:
    """Return the share of right samples of each prompt."""
    rights: dict[str, list[bool]] = {}
    for answer in scores.answers:
        rights.setdefault(answer["prompt"], []).append(answer["solved"])
    return {name: fmean(right) for name, right in rights.items()}


def sign_test(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value: how often a fair coin is at least this one-sided."""
    total = gained + lost
    tail = sum(comb(total, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def pass_at_k(k: int, n: int, right: int) -> float:
    return 1.0 - comb(n - right, k) / comb(n, k)


def _powers_of_two(n: int) -> list[int]:
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def _share(facts: Any) -> float:
    listed = [bool(fact) for fact in facts]
    return fmean(listed) if listed else 0.0
