"""Shares and means of observations with confidence intervals of 95 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

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


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its interval by Student's t, from `count` observations; without limits where one says nothing of the
    spread."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:+.2g} [{self.low:.2g}, {self.high:.2g}]" if self.count > 1 else f"{self.value:+.2g}"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float]) -> Mean:
    """Return the mean of independent observations, of which there is at least one."""
    mean, count = fmean(values), len(values)
    half = student_t(count - 1) * stdev(values) / sqrt(count) if count > 1 else float("inf")
    return Mean(mean, mean - half, mean + half, count)


T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""The 97.5 % quantiles of Student's t for 1 to 15 degrees of freedom."""


def student_t(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t; beyond the table by two terms of its expansion, right to 0.002."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    cubic, fifth = (Z_95**3 + Z_95) / 4, (5 * Z_95**5 + 16 * Z_95**3 + 3 * Z_95) / 96
    return Z_95 + cubic / degrees + fifth / degrees**2
