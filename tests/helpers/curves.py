"""Curves of real runs of the embedded model, a line for each step, with the figures that alarms look at.

The first line names the columns. A dash is a figure that was not logged.
"""

from __future__ import annotations

from tests.helpers.data import read_data


def rows(curve: str) -> list[dict[str, float | None]]:
    """Return the rows of metrics.jsonl that a curve stands for."""
    names, *lines = [line.split() for line in curve.splitlines()]
    return [
        {"step": step, **{name: None if text == "-" else float(text) for name, text in zip(names, line, strict=True)}}
        for step, line in enumerate(lines, start=1)
    ]


HEALTHY = read_data("curves/healthy.txt")
"""Quickstart, learning rate 1e-3, seed 0, every third step."""

HEALTHY_FAST = read_data("curves/healthy_fast.txt")
"""Quickstart, learning rate 3e-3, seed 1, every third step."""

EXPLODES_AT_ONCE = read_data("curves/explodes_at_once.txt")
"""Quickstart, learning rate 1e-1, seed 0."""

EXPLODES = read_data("curves/explodes.txt")
"""Quickstart, learning rate 3e-2, seed 0."""

EXPLODES_KL = read_data("curves/explodes_kl.txt")
"""Quickstart, learning rate 1e-1, objective.kl 0.05, seed 0."""

DECAYS = read_data("curves/decays.txt")
"""Quickstart, learning rate 1e-2, seed 0: the reward rises, then decays for good."""
