"""Plot the figures: phases of each side beside the limit, and cost along each sweep."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import OURS, PHASES, Result
from benchmarks.sweeps import AXES, Sweep

COLOURS = ("#1f6f8b", "#99a799", "#e8a87c", "#c0504d", "#bbbbbb")


def draw(path: Path, title: str, results: Sequence[Result], sweeps: Sequence[Sweep]) -> str:
    """Write a PNG; return where it is, or what to install where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return "No plot: matplotlib is not installed. pip install 'minigrpo[bench]'"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(results) + len(sweeps)
    figure, axes = pyplot.subplots(1, count, figsize=(5 * count, 4.5), squeeze=False)
    for place, result in zip(axes[0], results, strict=False):
        _phases(place, result)
    for place, sweep in zip(axes[0][len(results) :], sweeps, strict=True):
        _growth(place, sweep)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"Plot: {path}"


def _phases(axes: Any, result: Result) -> None:
    """Draw one bar a side: milliseconds for a completion token, phase on phase; the limit as a line."""
    names = list(result.sides)
    below = [0.0] * len(names)
    for phase, colour in zip(PHASES, COLOURS, strict=True):
        heights = [1e3 * side.phase(phase) / side.median("tokens") for side in result.sides.values()]
        axes.bar(names, heights, bottom=below, label=phase, color=colour)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    if result.limits:
        limit = 1e3 * result.limit("step").seconds / result.sides[OURS].median("tokens")
        axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="limit (bare kernels)")
    axes.set_title(result.workload.title, fontsize=9)
    axes.set_ylabel("ms a completion token")
    axes.tick_params(axis="x", labelrotation=20, labelsize=8)
    axes.legend(fontsize=7)


def _growth(axes: Any, sweep: Sweep) -> None:
    """Draw a sweep on logarithmic axes; dotted: linear growth from the first point."""
    x = [point.x for point in sweep.points]
    axes.loglog(x, sweep.seconds, "o-", color=COLOURS[0], label=f"exponent {sweep.exponent:.2f}")
    axes.loglog(x, [sweep.seconds[0] * value / x[0] for value in x], ":", color="black", label="linear")
    axes.set_title(f"{sweep.model}: {AXES[sweep.axis].about}", fontsize=9)
    axes.set_xlabel(AXES[sweep.axis].about)
    axes.set_ylabel("seconds a step")
    axes.legend(fontsize=7)
