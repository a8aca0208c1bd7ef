"""Draw the reward over the steps as an SVG picture, for the page of a published model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from minigrpo.runs.logger import read_metrics
from minigrpo.runs.rundir import RunDir
from minigrpo.utils.svg import Frame, averaged, label, picture, widened

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 34
"""Margins around the plot, in pixels, with room for the numbers."""


def read_rewards(run: RunDir) -> Iterator[tuple[int, float]]:
    """Yield (step, mean reward) of the steps whose reward could be told."""
    for row in read_metrics(run):
        if isinstance(row.get("reward"), int | float) and math.isfinite(row["reward"]):
            yield int(row["step"]), float(row["reward"])


def render_reward_svg(rewards: Sequence[tuple[int, float]]) -> str:
    """Render (step, mean reward) in the order of the steps; at least one."""
    points = averaged(rewards)
    first, last = rewards[0][0], max(rewards[-1][0], rewards[0][0] + 1)
    frame = Frame(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM, (first, last), widened(value for _, value in points))
    steps = [
        label(frame.place_x(step), HEIGHT - 12, f"step {step}", anchor)
        for step, anchor in ((first, "start"), (last, "end"))
    ]
    return picture(WIDTH, HEIGHT, "mean reward over the steps", [*frame.grid(), *steps, frame.line(points)])
