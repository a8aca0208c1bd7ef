"""Draw the reward over the steps as an SVG picture, written by hand: no plotting library is needed to publish.

The picture has a white ground of its own, so that it can be read on dark pages, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 34
"""Margins around the plot, in pixels, with room for the numbers."""
MAX_POINTS = 200
"""Points of the line: more steps than this are averaged in runs of equal length."""


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
    for value in (low + (high - low) * i / 4 for i in range(5)):
        y = place_y(value)
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        lines.append(f'<text x="{place_x(step):.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">step {step}</text>')
    path = " ".join(f"{place_x(step):.1f},{place_y(value):.1f}" for step, value in points)
    lines.append(f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2" stroke-linecap="round"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#555"><title>mean reward over the steps</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _averaged(rewards: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Average neighbours, so that at most MAX_POINTS remain."""
    size = -(-len(rewards) // MAX_POINTS)
    parts = [rewards[i : i + size] for i in range(0, len(rewards), size)]
    return [(fmean(step for step, _ in part), fmean(value for _, value in part)) for part in parts]
