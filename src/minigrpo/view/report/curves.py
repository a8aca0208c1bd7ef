"""The charts of a run as SVG, in the colours of the page's style sheet, which are light or dark as the system is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from statistics import fmean

from minigrpo.utils.svg import Frame, averaged, label, widened
from minigrpo.view.charts import Chart, sentence_of
from minigrpo.view.metrics_log import Mark, MetricsLog
from minigrpo.view.report.markup import Markup, figure, joined, tag

WIDTH, HEIGHT = 420, 180
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 26
"""Margins around the plot, in pixels, with room for the numbers."""
COLOURS = tuple(f"var(--line-{number})" for number in range(1, 9))
MARKS = {"alarm": "var(--warn)", "failed": "var(--bad)", "killed": "var(--bad)", "resumed": "var(--accent)"}
"""Kinds of marks that are drawn, and in which colour."""

Points = list[tuple[float, float]]
"""(step, value) of the steps that have one."""


def chart_figure(log: MetricsLog, chart: Chart, marks: Sequence[Mark], window: int, planned: float | None) -> Markup:
    """Draw a chart with its title and its sentence. `window`: steps over which lines are averaged."""
    lines = {name: _points(log, name) for name in chart.figures}
    smoothed = {name: points if chart.dots else smooth(points, window) for name, points in lines.items()}
    band = _band(smoothed[chart.figures[0]], smooth(_points(log, chart.band), window)) if chart.band else None
    plan = planned if chart.plan else None
    drawn = _drawing(chart, lines, smoothed, band=band, marks=marks, plan=plan)
    keys = [
        tag("span", _swatch(COLOURS[at % 8]), f"{words} ", tag("b", figure(lines[name][-1][1])), class_="key")
        for at, (name, words) in enumerate(zip(chart.figures, chart.labels, strict=True))
    ]
    if plan is not None:
        keys.append(tag("span", "dashed: planned ", tag("b", figure(plan)), class_="key"))
    caption = tag("figcaption", tag("h3", chart.title), tag("p", sentence_of(chart.about), class_="about"))
    return tag("figure", caption, tag("div", *keys, class_="legend"), drawn, class_="chart")


def smooth(points: Points, window: int) -> Points:
    """Average each value with the `window` - 1 before it."""
    values = [value for _, value in points]
    return [(step, fmean(values[max(0, at + 1 - window) : at + 1])) for at, (step, _) in enumerate(points)]


def _points(log: MetricsLog, name: str) -> Points:
    return [(step, value) for step, value in zip(log.steps, log.columns[name], strict=True) if isfinite(value)]


def _band(line: Points, spread: Points) -> tuple[Points, Points]:
    """Return the lines as far below and above a line as another says."""
    width = dict(spread)
    known = [(step, value, width[step]) for step, value in line if step in width]
    return [(step, value - half) for step, value, half in known], [(step, value + half) for step, value, half in known]


def _drawing(
    chart: Chart,
    lines: dict[str, Points],
    smoothed: dict[str, Points],
    *,
    band: tuple[Points, Points] | None,
    marks: Iterable[Mark],
    plan: float | None,
) -> Markup:
    steps = [step for points in lines.values() for step, _ in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    values = [value for points in (*smoothed.values(), *(band or ())) for _, value in points]
    height = (0.0, 1.0) if chart.share else widened([*values, *([] if plan is None else [plan])])
    frame = Frame(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM, (first, last), height)
    parts = [
        *frame.grid(),
        label(LEFT, HEIGHT - 6, f"step {first:g}"),
        label(WIDTH - RIGHT, HEIGHT - 6, f"step {last:g}", "end"),
    ]
    if band:
        parts.append(frame.band(averaged(band[0]), averaged(band[1]), COLOURS[0]))
    parts += _marked(frame, marks)
    if plan is not None:
        y = frame.place_y(plan)
        parts.append(_dashed((frame.left, y), (frame.right, y), "var(--soft)"))
    for at, (name, points) in enumerate(smoothed.items()):
        colour = COLOURS[at % 8]
        if chart.dots:
            parts += [_dot(frame, point, colour) for point in averaged(points)]
        else:
            parts.append(f'<g opacity="0.3">{frame.line(_within(averaged(lines[name]), height), colour)}</g>')
        parts.append(frame.line(averaged(points), colour))
    spoken = f"{chart.title}. " + ". ".join(_summary(*each) for each in zip(chart.labels, lines.values(), strict=True))
    return tag("svg", Markup("".join(parts)), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=spoken)


def _within(points: Points, height: tuple[float, float]) -> Points:
    """Keep a faint line inside the plot: its single steps may lie outside what their averages span."""
    return [(step, min(max(value, height[0]), height[1])) for step, value in points]


def _marked(frame: Frame, marks: Iterable[Mark]) -> Iterator[str]:
    for mark in marks:
        if mark["kind"] in MARKS and frame.x[0] <= mark["step"] <= frame.x[1]:
            x = frame.place_x(mark["step"])
            title = tag("title", f"step {mark['step']}: {mark['text']}")
            yield _dashed((x, frame.top), (x, frame.bottom), MARKS[mark["kind"]], title)


def _dashed(start: tuple[float, float], end: tuple[float, float], colour: str, inside: Markup | None = None) -> str:
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-dasharray="4 3">{joined(inside)}</line>'


def _dot(frame: Frame, point: tuple[float, float], colour: str) -> str:
    return f'<circle cx="{frame.place_x(point[0]):.1f}" cy="{frame.place_y(point[1]):.1f}" r="3" fill="{colour}"/>'


def _swatch(colour: str) -> Markup:
    return Markup(f'<i style="background: {colour}"></i>')


def _summary(words: str, points: Points) -> str:
    values = [value for _, value in points]
    ends = f"{words}: from {figure(values[0])} to {figure(values[-1])}"
    return f"{ends}, lowest {figure(min(values))}, highest {figure(max(values))}"
