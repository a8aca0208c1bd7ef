"""Measure how the cost of minigrpo's step grows along one axis, all else equal: values in turns, one exponent.

    python -m benchmarks --sweep group --model slim

Exponent: the slope of log(seconds) over log(value), least squares. 1 is linear; below 1, what is shared (a prompt read
once, weights read once for all rows) still pays. Every completion has the same length: no stragglers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import models, ours
from benchmarks.harness import make_model
from benchmarks.report import GIB
from benchmarks.sides import Setup, Side, Step
from benchmarks.workloads import Workload

Say = Callable[[str], None]

RUNGS = ("size1", "size2", "size3", "size4")


@dataclass(frozen=True, slots=True)
class Point:
    """One value of the axis. `x`: what the cost is plotted against."""

    x: float
    label: str
    workload: Workload


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a sweep. `values`: its defaults; `point` turns a value into a workload."""

    about: str
    values: tuple[int, ...]
    point: Callable[[Workload, int], Point]


def base(model: str) -> Workload:
    """Return the base workload.

    300-token prompts, eight completions of 100 tokens each; a large model takes one prompt, a small one four.
    """
    dtype = models.SHAPES[model].dtype
    prompts = 1 if dtype == "bfloat16" else 4
    return Workload(model, "sweep", prompts, 8, 100, dtype, dtype, 3, "full", prompt_tokens=300)


def _group(start: Workload, value: int) -> Point:
    return Point(value, f"G = {value}", replace(start, completions=value))


def _prompt(start: Workload, value: int) -> Point:
    return Point(value, f"{value} tokens", replace(start, prompt_tokens=value))


def _completion(start: Workload, value: int) -> Point:
    return Point(value, f"{value} tokens", replace(start, limit=value))


def _total(start: Workload, value: int) -> Point:
    workload = replace(start, prompts=value)
    tokens = value * (start.prompt_tokens + start.completions * start.limit)
    return Point(tokens, f"{tokens} tokens", workload)


def _size(start: Workload, value: int) -> Point:
    name = RUNGS[value - 1]
    sizes = models.SHAPES[name]
    weights = sizes.layers * (2 * sizes.hidden**2 + 2 * sizes.hidden * sizes.kv_heads * sizes.width)
    weights += sizes.layers * 3 * sizes.hidden * sizes.inner + sizes.vocab * sizes.hidden
    return Point(weights, f"{weights / 1e6:.1f} M", replace(start, name=name, prompts=1))


AXES: Mapping[str, Axis] = {
    "group": Axis("completions of a prompt", (2, 4, 8, 16, 32), _group),
    "prompt": Axis("prompt length", (75, 150, 300, 600), _prompt),
    "completion": Axis("completion length", (25, 50, 100, 200, 400), _completion),
    "size": Axis("model size", (1, 2, 3, 4), _size),
    "total": Axis("total tokens", (1, 2, 4, 8, 16), _total),
}


@dataclass(frozen=True, slots=True)
class Sweep:
    """`steps`: the timed ones of each point."""

    axis: str
    model: str
    points: tuple[Point, ...]
    steps: tuple[tuple[Step, ...], ...]

    @property
    def seconds(self) -> list[float]:
        return [statistics.median(step.seconds for step in steps) for steps in self.steps]

    @property
    def exponent(self) -> float:
        return slope([point.x for point in self.points], self.seconds)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "exponent": self.exponent}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log(y) over log(x) by least squares; NaN for a single point."""
    if len(x) < 2:
        return math.nan
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


@dataclass(frozen=True, slots=True)
class Asked:
    """A requested sweep. `values`: empty for the axis's own. `keep` gets the sweep so far after every repetition."""

    model: str
    values: Sequence[int]
    repeats: int
    threads: int
    device: str
    say: Say
    keep: Callable[[Sweep], None] = lambda sweep: None


def run(name: str, asked: Asked, scratch: Path) -> Sweep:
    """Step all points in turns: one warm-up each, then the timed steps. Raise BenchmarkError where a point fails."""
    axis = AXES[name]
    points = tuple(axis.point(base(asked.model), value) for value in asked.values or axis.values)
    sweep = Sweep(name, asked.model, points, ())
    with ExitStack() as stack:
        sides = [stack.enter_context(_side(point, asked, scratch / f"{name}{n}")) for n, point in enumerate(points)]
        taken: list[list[Step]] = [[] for _ in points]
        for repetition in range(1 + asked.repeats):
            steps = {n: sides[n].step() for n in _order(len(points), repetition)}
            asked.say(f"sweep {name} {repetition}/{asked.repeats}: " + _line(points, steps))
            if repetition:
                for n, step in steps.items():
                    taken[n].append(step)
                sweep = replace(sweep, steps=tuple(tuple(steps) for steps in taken))
                asked.keep(sweep)
    return sweep


def _side(point: Point, asked: Asked, scratch: Path) -> Side:
    workload = point.workload
    folder = scratch.parent / f"model-{workload.name}"
    setup = Setup(workload, folder, scratch, asked.threads, workload.dtype, asked.repeats + 1, asked.device)
    make_model(setup, folder)
    return Side(point.label, ours.run, setup)


def _order(count: int, repetition: int) -> list[int]:
    """Return the order of a repetition, there and back: a slow drift of the machine then favours no end of the axis."""
    return list(range(count)) if repetition % 2 == 0 else list(reversed(range(count)))


def _line(points: Sequence[Point], steps: Mapping[int, Step]) -> str:
    return ", ".join(f"{point.label} {steps[n].seconds:.2f} s" for n, point in enumerate(points))


def show(sweep: Sweep, console: Console) -> None:
    start = sweep.points[0].workload
    console.print(f"\nsweep over {AXES[sweep.axis].about}: {sweep.model}, {start.dtype}", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = ("prompts", "G", "prompt", "answer", "step s", "from - to", "rollout", "scoring", "update")
    for name in (*columns, "tok/s", "GiB", "times"):
        table.add_column(name, justify="right", no_wrap=True)
    for point, steps, seconds in zip(sweep.points, sweep.steps, sweep.seconds, strict=True):
        load, every = point.workload, [step.seconds for step in steps]
        table.add_row(
            point.label,
            *(str(value) for value in (load.prompts, load.completions, load.prompt_tokens, load.limit)),
            f"{seconds:.2f}",
            f"{min(every):.2f}-{max(every):.2f}",
            *(f"{statistics.median(step.phases[name] for step in steps):.2f}" for name in columns[-3:]),
            f"{statistics.median(step.rate for step in steps):.0f}",
            f"{max(step.peak for step in steps) / GIB:.2f}",
            f"{seconds / sweep.seconds[0]:.2f}",
        )
    console.print(table)
    console.print(summarize(sweep), soft_wrap=True, highlight=False)


def summarize(sweep: Sweep) -> str:
    first, last = sweep.points[0], sweep.points[-1]
    grown, cost = last.x / first.x, sweep.seconds[-1] / sweep.seconds[0]
    words = (
        f"{grown:.1f} times the {AXES[sweep.axis].about} cost {cost:.2f} times the time: exponent {sweep.exponent:.2f}."
    )
    known = {point.x: seconds for point, seconds in zip(sweep.points, sweep.seconds, strict=True)}
    if sweep.axis == "group" and 4 in known and 16 in known:
        words += f" From G = 4 to G = 16: {known[16] / known[4]:.2f} times."
    return words
