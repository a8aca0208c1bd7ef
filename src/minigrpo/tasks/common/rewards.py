"""Several reward functions, weighted and summed into one Grade.

rewards = reweighted((Reward("correct", 1.0, is_correct), Reward("format", 0.2, is_formed)), recipe.task.weights)
grade = graded(rewards, prompt, text, formed=..., solved=...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from minigrpo.errors import TaskError
from minigrpo.types import Grade, Prompt, RewardFunction

LARGEST_REWARD = 1e16
"""Squares of rewards are summed over a step, and float32 ends at 3.4e38: a million squares of this."""
_SMALLER = "Their squares would overflow: return smaller numbers, such as their logarithm."


@dataclass(frozen=True, slots=True)
class Reward:
    """One reward function, the name under which it is logged, and its weight in the sum."""

    name: str
    weight: float
    function: RewardFunction


def reweighted(rewards: Sequence[Reward], weights: Mapping[str, float]) -> tuple[Reward, ...]:
    """Return the rewards with the given weights; names not given keep their own. Raise TaskError for unknown ones."""
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise TaskError(f"Two reward functions share a name among {', '.join(names)}. Give each its own.")
    if unknown := sorted(set(weights) - set(names)):
        raise TaskError(
            f"task.weights names {', '.join(unknown)}, which this task does not have. Its rewards: {', '.join(names)}."
        )
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise TaskError(f"task.weights: {name} is {weight}. Give a finite number.")
    return tuple(replace(reward, weight=weights.get(reward.name, reward.weight)) for reward in rewards)


def graded(rewards: Sequence[Reward], prompt: Prompt, text: str, *, formed: bool, solved: bool) -> Grade:
    """Call every function; `reward` is the weighted sum, `parts` are the unweighted values."""
    parts = {reward.name: _call_reward(reward, prompt, text) for reward in rewards}
    weights = {reward.name: reward.weight for reward in rewards}
    return Grade(reward=weighted_sum(parts, weights), parts=parts, formed=formed, solved=solved, weights=weights)


def weighted_sum(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted sum of the parts; NaN where there are none.

    The sum is exact, so the order does not matter. Raise TaskError where it is too large.
    """
    if not parts:
        return math.nan
    terms = [weights.get(name, 1.0) * part for name, part in parts.items()]
    if max(map(abs, terms)) > LARGEST_REWARD:
        shown = ", ".join(f"{weights.get(name, 1.0):g} x {name} = {part:g}" for name, part in parts.items())
        raise TaskError(f"The weighted rewards ({shorten_repr(shown)}) go beyond {LARGEST_REWARD:g}. {_SMALLER}")
    return math.fsum(terms)


def _call_reward(reward: Reward, prompt: Prompt, text: str) -> float:
    """Call the function. Raise TaskError for a value that is not a finite number, which would spoil its whole group."""
    return check_finite(reward.function(prompt, text), reward.name, f"prompt {prompt.id}")


def check_finite(value: object, name: str, where: str) -> float:
    """Return the value as a float; raise TaskError unless it is a finite number of at most LARGEST_REWARD.

    True is 1, and text is no number.
    """
    number = as_number(value)
    if not math.isfinite(number):
        raise TaskError(f"The reward function {name} gave {shorten_repr(value)} for {where}. Return a finite number.")
    if abs(number) > LARGEST_REWARD:
        raise TaskError(
            f"The reward function {name} gave {shorten_repr(value)} for {where}, beyond {LARGEST_REWARD:g}. {_SMALLER}"
        )
    return number


def as_number(value: object) -> float:
    """Return the value as a float; NaN where it is none."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except Exception:  # __float__ of arbitrary classes: a tensor of several numbers, a signalling NaN
        return math.nan


def shorten_repr(value: object, longest: int = 80) -> str:
    """Return the repr of a value, cut to `longest` characters, for messages."""
    try:
        text = repr(value)
    except Exception:  # __repr__ of arbitrary classes
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]} ..."
