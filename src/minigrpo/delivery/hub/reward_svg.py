"""Draw the reward over the steps as an SVG picture, for the page of a published model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from minigrpo.utils.svg import Frame, label, picture, widened

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 34
"""Margins around the plot, in pixels, with room for the numbers."""
MAX_POINTS = 200
"""Points of the line: more steps than this are averaged in runs of equal length."""


def render_reward_svg(rewards: Sequence[tuple[int, float]]) -> str:
    """Render (step, mean reward) in the order of the steps; at least one."""
    points = _averaged(rewards)
    first, last = rewards[0][0], max(rewards[-1][0], rewards[0][0] + 1)
    frame = Frame(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM, (first, last), widened(value for _, value in points))
    steps = [
        label(frame.place_x(step), HEIGHT - 12, f"step {step}", anchor)
        for step, anchor in ((first, "start"), (last, "end"))
    ]
    return picture(WIDTH, HEIGHT, "mean reward over the steps", [*frame.grid(), *steps, frame.line(points)])


def _averaged(rewards: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Average neighbours, so that at most MAX_POINTS remain."""
    size = -(-len(rewards) // MAX_POINTS)
    parts = [rewards[i : i + size] for i in range(0, len(rewards), size)]
    return [(fmean(step for step, _ in part), fmean(value for _, value in part)) for part in parts]
