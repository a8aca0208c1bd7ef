"""The logged steps of a run, as alarms look at them: means, peaks and rises of figures that may be missing."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minigrpo.config import Recipe

WINDOW, LONG = 5, 50
"""Steps of a short window, and steps over which something was better before."""
SPREAD = re.compile(r"rewards/.*/std")

Row = Mapping[str, float]


def is_known(value: Any) -> bool:
    """A finite number: JSON holds null for what was not, and a figure may be missing altogether."""
    return isinstance(value, int | float) and math.isfinite(value)


def mean_of(rows: Iterable[Row], name: str) -> float:
    values = [row[name] for row in rows if name in row]
    return statistics.fmean(values) if values else math.nan


@dataclass(frozen=True, slots=True)
class Past:
    """The steps that an alarm may look at: the newest `steps`, the first of the run, and the last LONG."""

    recipe: Recipe
    rows: tuple[Row, ...]
    first: tuple[Row, ...]
    long: tuple[Row, ...]
    gap_limit: float

    def all(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Whether the figure is there in every step of the window, and is like that."""
        return all(name in row and holds(row[name]) for row in self.rows)

    def mean(self, name: str) -> float:
        """Over the steps of the window that have the figure; NaN, which no comparison holds for, where none has."""
        return mean_of(self.rows, name)

    def began(self, name: str) -> float:
        """What the figure was at the beginning of the run."""
        return mean_of(self.first, name)

    def best(self, name: str) -> float:
        """Largest mean over a short window of the last LONG steps."""
        spans = [self.long[start : start + WINDOW] for start in range(max(1, len(self.long) - WINDOW + 1))]
        return max((value for span in spans if not math.isnan(value := mean_of(span, name))), default=math.nan)

    def peak(self, name: str) -> float:
        """Largest value of a single step of the last LONG."""
        return max((row[name] for row in self.long if name in row), default=math.nan)

    def rise(self, name: str) -> tuple[float, float]:
        """(mean of the window's later half minus its earlier half, the standard error of that difference)."""
        half = len(self.rows) // 2
        parts = [[row[name] for row in rows if name in row] for rows in (self.rows[:half], self.rows[half:])]
        if min(len(part) for part in parts) < 2:
            return math.nan, math.nan
        error = math.sqrt(sum(statistics.variance(part) / len(part) for part in parts))
        return statistics.fmean(parts[1]) - statistics.fmean(parts[0]), error

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def answers(self) -> int:
        """Completions of the window."""
        return self.steps * self.recipe.rollout.prompts * self.recipe.rollout.completions

    @property
    def reward(self) -> str:
        return f"{self.rows[-1].get('reward', math.nan):.3g}"

    @property
    def silent(self) -> bool:
        """Whether no group of the window had two different rewards."""
        return self.all("informative_groups", lambda share: share <= 1e-9)

    @property
    def same(self) -> bool:
        """Whether all completions earned the same, as far as the figures tell: within groups, groups, and steps."""
        rewards = [row.get("reward", math.nan) for row in self.rows]
        spreads = [value for row in self.rows for name, value in row.items() if SPREAD.fullmatch(name)]
        mixed = 0 < self.mean("accuracy") < 1 or max(spreads, default=0.0) > 1e-9
        return self.silent and not mixed and max(rewards) - min(rewards) < 1e-9

    @property
    def gains(self) -> bool:
        """Whether more is solved or earned than at the beginning of the run: then it may well be done differently."""
        spread = self.began("reward_std")
        return (
            self.mean("accuracy") > self.began("accuracy") + 0.05
            or self.mean("reward") > self.began("reward") + 0.25 * spread
        )
