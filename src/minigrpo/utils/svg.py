"""Draw plots as SVG text, written by hand: no plotting library is needed.

A picture has a ground of its own, light or dark as the reader's system is, so that it can be read on any page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

BLUE, ORANGE = "#1f6feb", "#d9730d"
MAX_POINTS = 200
"""Points of a line: of more, neighbours are averaged."""
STYLE = """
.ground { fill: #fff } text { fill: #555 } .grid { stroke: #ddd }
@media (prefers-color-scheme: dark) { .ground { fill: #0d1117 } text { fill: #aaa } .grid { stroke: #333 } }
"""


@dataclass(frozen=True, slots=True)
class Frame:
    """The area of a plot, in pixels, and the values at its edges."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def place_x(self, value: float) -> float:
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def place_y(self, value: float) -> float:
        return self.bottom - (value - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)

    def points(self, values: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.place_x(x):.1f},{self.place_y(y):.1f}" for x, y in values)

    def grid(self) -> Iterator[str]:
        """Yield horizontal lines with their values at the left."""
        for value in round_values(*self.y):
            y = self.place_y(value)
            yield f'<line class="grid" x1="{self.left}" y1="{y:.1f}" x2="{self.right}" y2="{y:.1f}"/>'
            yield f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.5g}</text>'

    def line(self, values: Iterable[tuple[float, float]], color: str = BLUE) -> str:
        return (
            f'<polyline points="{self.points(values)}" fill="none" stroke="{color}" stroke-width="2" '
            'stroke-linecap="round"/>'
        )

    def band(self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], color: str) -> str:
        """Fill what lies between two lines."""
        return f'<polygon points="{self.points([*low, *reversed(high)])}" fill="{color}" fill-opacity="0.18"/>'


def averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours, so that at most MAX_POINTS remain."""
    size = -(-len(points) // MAX_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(fmean(x for x, _ in part), fmean(value for _, value in part)) for part in parts]


def round_values(low: float, high: float) -> list[float]:
    """Return three to six values between low and high that are short to read: multiples of 1, 2 or 5 times 10**k."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= (high - low) / 5)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def label(x: float, y: float, words: str, anchor: str = "start", color: str | None = None) -> str:
    fill = f' style="fill: {color}"' if color else ""
    return f'<text x="{x:.1f}" y="{y:g}" text-anchor="{anchor}"{fill}>{escape(words)}</text>'


def widened(values: Iterable[float]) -> tuple[float, float]:
    """Return the lowest and the highest value, half a unit apart from one that stands alone."""
    listed = list(values)
    low, high = min(listed), max(listed)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def picture(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title><style>{STYLE}</style>'
        f'<rect class="ground" width="{width}" height="{height}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
