"""Draw the reward over the steps as an SVG picture, written by hand: no plotting library is needed to publish.

The picture has a ground of its own, light or dark as the reader's system is, so that it can be read on any page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from minigrpo.runs.logger import read_metrics
from minigrpo.runs.rundir import RunDir

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 34
"""Margins around the plot, in pixels, with room for the numbers."""
MAX_POINTS = 200
"""Points of the line: more steps than this are averaged in runs of equal length."""

STYLE = """
rect { fill: #fff } text { fill: #555 } line { stroke: #ddd } polyline { stroke: #1f6feb }
@media (prefers-color-scheme: dark) {
rect { fill: #0d1117 } text { fill: #aaa } line { stroke: #333 } polyline { stroke: #6cb0ff }
}
"""


def read_rewards(run: RunDir) -> Iterator[tuple[int, float]]:
    """Yield (step, mean reward) of the steps whose reward could be told."""
    for row in read_metrics(run):
        if isinstance(row.get("reward"), int | float) and math.isfinite(row["reward"]):
            yield int(row["step"]), float(row["reward"])


def render_reward_svg(rewards: Sequence[tuple[int, float]]) -> str:
    """Render (step, mean reward) in the order of the steps; at least one."""
    points = _averaged(rewards)
    low, high = min(value for _, value in points), max(value for _, value in points)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    first, last = rewards[0][0], max(rewards[-1][0], rewards[0][0] + 1)

    def place_x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = []
    for value in _round_values(low, high):
        y = place_y(value)
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.5g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        lines.append(f'<text x="{place_x(step):.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">step {step}</text>')
    path = " ".join(f"{place_x(step):.1f},{place_y(value):.1f}" for step, value in points)
    lines.append(f'<polyline points="{path}" fill="none" stroke-width="2" stroke-linecap="round"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><title>mean reward over the steps</title><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{HEIGHT}"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _averaged(rewards: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Average neighbours, so that at most MAX_POINTS remain."""
    size = -(-len(rewards) // MAX_POINTS)
    parts = [rewards[i : i + size] for i in range(0, len(rewards), size)]
    return [(fmean(step for step, _ in part), fmean(value for _, value in part)) for part in parts]


def _round_values(low: float, high: float) -> list[float]:
    """Return three to six values between low and high that are short to read: multiples of 1, 2 or 5 times 10**k."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= (high - low) / 5)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
