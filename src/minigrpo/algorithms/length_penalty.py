"""The length penalty: a part of a completion's reward beside the task's own parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minigrpo.types import Grade, Group


def with_overlong_penalty(groups: Sequence[Group], cache: int, limit: int) -> list[Group]:
    """Add the soft overlong punishment to the grades, as the reward part "overlong".

    It is 0 up to `limit - cache` tokens, then falls linearly to -1 at `limit`. DAPO, arXiv 2503.14476, equation 13.
    """
    return (
        [replace(group, grades=_penalized_grades(group, cache, limit)) for group in groups] if cache else list(groups)
    )


def _penalized_grades(group: Group, cache: int, limit: int) -> tuple[Grade, ...]:
    pairs = zip(group.grades, group.completions, strict=True)
    return tuple(
        _with_part(grade, overlong_penalty(len(completion.token_ids), cache, limit)) for grade, completion in pairs
    )


def overlong_penalty(length: int, cache: int, limit: int) -> float:
    return min(0.0, max(-1.0, (limit - cache - length) / cache))


def _with_part(grade: Grade, amount: float) -> Grade:
    if not grade.scored:
        return grade
    # A grade without parts gets its own reward as one, so that the parts still sum to the whole.
    parts = grade.parts or {"reward": grade.reward}
    return replace(grade, reward=grade.reward + amount, parts={**parts, "overlong": amount})
