"""Shares of observations with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

Z_95 = 1.959964
"""The 97.5 % quantile of the normal distribution, for intervals of 95 %."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A share with its Wilson interval, from `count` observations; the interval is (0, 1) where there were none."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if not self.count:
            return "none"
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson_interval(value: float, count: int) -> Rate:
    if not count:
        return Rate(0.0, 0.0, 1.0, 0)
    middle = (value + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half = Z_95 / (1 + Z_95**2 / count) * sqrt(value * (1 - value) / count + Z_95**2 / (4 * count**2))
    return Rate(value, max(0.0, middle - half), min(1.0, middle + half), count)
