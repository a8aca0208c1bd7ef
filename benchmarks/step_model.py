"""How long a step takes on so many ranks: measured rates put into formulas (docs/scale.md), as a table and a picture.

    python -m benchmarks.step_model rates runs/quickstart > rates.json      # from a run's own log
    python -m benchmarks.step_model show rates.json docs/step_model.svg

The formulas know whole groups, the longest completion, gradients, groups and latencies. They do not know stragglers,
congestion, or a machine that runs slower where all its cores are busy.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from minigrpo.config.load import load_recipe
from minigrpo.errors import ArtifactError
from minigrpo.rollouts.serialize import group_data, group_of
from minigrpo.runs.logger import read_metrics
from minigrpo.runs.rundir import RunDir, read_json
from minigrpo.types import Completion, Grade, Group, Prompt
from minigrpo.ui.screen import print_result
from minigrpo.utils.svg import BLUE, ORANGE, Frame, label, picture

RANKS = tuple(2**power for power in range(13))
"""1 to 4096."""
GROUP_BYTES = 30
"""Bytes that a token of a group takes as JSON, measured on the quickstart (docs/scale.md)."""
EXCHANGES = 8
"""Exchanges of a step besides gradients: groups, figures, the size of passes and a word at its end, each with its
length before it."""
GREY = "#8a8a8a"


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one rank, in seconds: `pass_s` a decoding pass whatever it holds, `sample_s` and `update_s` a completion
    token, `host_s` a token of the whole batch, which every rank reads, `sync_s` a step, when the engine takes over the
    weights. `link`: bytes a second that a rank sends; `latency_s`: of
    one message. `tokens`: of a group's completions; `longest`: tokens of a step's longest one; `trained`: numbers."""

    pass_s: float
    sample_s: float
    update_s: float
    host_s: float
    sync_s: float
    tokens: float
    longest: float
    groups: int
    trained: int
    limit: int
    link: float = 1.25e9
    latency_s: float = 50e-6


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step on so many ranks, in seconds. `groups`: of all of them together."""

    ranks: int
    groups: int
    rollout: float
    update: float
    exchange: float
    host: float

    @property
    def seconds(self) -> float:
        return self.rollout + self.update + self.exchange + self.host


def step_time(rates: Rates, ranks: int, groups: int) -> StepTime:
    """Return the time of a step in which so many groups are shared by so many ranks: the busiest one's."""
    own = math.ceil(groups / ranks) * rates.tokens
    # With more completions the longest of them is longer, until the limit: by the logarithm of their number.
    longest = min(rates.limit, rates.longest * (1 + math.log(max(1.0, groups / rates.groups)) / 10))
    gradients = 2 * (ranks - 1) / ranks * 4 * rates.trained
    told = (ranks - 1) / ranks * groups * rates.tokens * GROUP_BYTES
    messages = (ranks - 1) * (2 + EXCHANGES)
    return StepTime(
        ranks,
        groups,
        rollout=rates.pass_s * longest + rates.sample_s * own,
        update=rates.update_s * own,
        exchange=(gradients + told) / rates.link + (messages * rates.latency_s if ranks > 1 else 0.0),
        host=rates.sync_s + (rates.host_s * groups * rates.tokens if ranks > 1 else 0.0),
    )


def same_batch(rates: Rates) -> list[StepTime]:
    """Return the step of the recipe's own batch on ever more ranks."""
    return [step_time(rates, ranks, rates.groups) for ranks in RANKS]


def growing_batch(rates: Rates) -> list[StepTime]:
    """Return steps whose batch grows with the ranks: each keeps as many groups as one rank had."""
    return [step_time(rates, ranks, ranks * rates.groups) for ranks in RANKS]


def quickest(steps: Sequence[StepTime]) -> StepTime:
    return min(steps, key=lambda step: step.seconds)


def half_efficient(steps: Sequence[StepTime]) -> StepTime | None:
    """Return the first step that gives a rank less than half of what one rank alone does; None where none is."""
    alone = steps[0].groups / steps[0].seconds
    return next((step for step in steps if step.groups / step.seconds / step.ranks < alone / 2), None)


def rates_of(run: RunDir, link: float, latency: float) -> Rates:
    """Return the rates of a run on one rank, from its log and its adapter. Raise ArtifactError where there are none.

    A rollout's seconds are fitted to passes and tokens by least squares over its steps; `host_s` is measured here.
    """
    recipe, rows = load_recipe(str(run.path)), list(read_metrics(run))
    if len(rows) < 10 or any("sent_bytes/groups" in row for row in rows):
        raise ArtifactError(f"{run.path} has not done ten steps on one rank, so there is nothing to fit.")
    group = recipe.rollout.completions
    work = [(row["completions/max_length"], row["num_tokens"], row["seconds/rollout"]) for row in rows]
    passes, sampled = fit_two(work)
    return Rates(
        pass_s=passes,
        sample_s=sampled,
        update_s=median(row["seconds/update"] / row["num_tokens"] for row in rows),
        host_s=seconds_to_read_a_token(),
        sync_s=median(row["seconds/sync"] for row in rows),
        tokens=fmean(row["completions/mean_length"] for row in rows) * group,
        longest=fmean(row["completions/max_length"] for row in rows),
        groups=recipe.rollout.prompts,
        trained=_numbers(run.adapter / "adapter_model.safetensors"),
        limit=recipe.rollout.max_tokens,
        link=link,
        latency_s=latency,
    )


def seconds_to_read_a_token(tokens: int = 200_000) -> float:
    """Measure what it takes to read a token of another rank's groups, as every rank does with all of them."""
    own, prompt = 1000, Prompt("p", ())
    completion = Completion("a " * own, (12345,) * own, (-0.123456789012345,) * own, "stop")
    group = Group(prompt, (1,), (completion,), (Grade(1.0),))
    text = json.dumps([group_data(group)] * (tokens // own))
    took = []
    for _ in range(5):
        began = time.perf_counter()
        for row in json.loads(text):
            group_of(row, {"p": prompt})
        took.append(time.perf_counter() - began)
    return min(took) / tokens  # whatever else the machine did only adds to it


def fit_two(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return a, b >= 0 that bring a * x + b * y nearest to z over rows (x, y, z), by least squares."""
    xx, xy, yy = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    xz, yz = (sum(row[i] * row[2] for row in rows) for i in (0, 1))
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        a, b = (xz * yy - yz * xy) / determinant, (xx * yz - xy * xz) / determinant
        if a >= 0 and b >= 0:
            return a, b
    alone = [(xz / xx, 0.0), (0.0, yz / yy)]
    return min(alone, key=lambda pair: sum((pair[0] * x + pair[1] * y - z) ** 2 for x, y, z in rows))


def _numbers(file: Path) -> int:
    """Count the numbers of a safetensors file from its head alone."""
    if not file.is_file():
        raise ArtifactError(f"{file} is missing: the run has not ended, or trained every parameter.")
    with file.open("rb") as stream:
        head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in head.items() if name != "__metadata__")


def read_rates(data: Mapping[str, Any]) -> Rates:
    """Read what `rates` printed. Raise ArtifactError for anything else."""
    names = {each.name for each in fields(Rates)}
    if not isinstance(data, dict) or set(data) != names:
        raise ArtifactError(f"These are no rates: they need {', '.join(sorted(names))}.")
    return Rates(**data)


def table(title: str, steps: Sequence[StepTime]) -> Iterator[str]:
    yield f"{title:<28}{'rollout':>10}{'update':>10}{'exchange':>10}{'host':>10}{'step, s':>10}{'groups/s':>10}"
    for step in steps:
        parts = (step.rollout, step.update, step.exchange, step.host, step.seconds, step.groups / step.seconds)
        yield f"{step.ranks:>6} ranks, {step.groups:>7} groups " + "".join(f"{part:>10.4g}" for part in parts)


PARTS: Sequence[tuple[str, str, Callable[[StepTime], float]]] = (
    ("step", BLUE, lambda step: step.seconds),
    ("rollout", ORANGE, lambda step: step.rollout),
    ("update", GREY, lambda step: step.update),
    ("exchange and whole batch", "#c0504d", lambda step: step.exchange + step.host),
)


def draw(rates: Rates) -> str:
    """Return the picture: seconds of a step and of its parts against ranks, both axes by powers, for both batches."""
    both = (("the same batch", same_batch(rates)), ("a batch that grows with the ranks", growing_batch(rates)))
    values = [part(step) for _, steps in both for step in steps for _, _, part in PARTS]
    floor = max(min(value for value in values if value > 0), 1e-4)
    top = max(values)
    parts = [line for place, (title, steps) in enumerate(both) for line in _plot(title, steps, place, floor, top)]
    return picture(760, 310, "Seconds of a step against the number of ranks, from measured rates", parts)


def _plot(title: str, steps: Sequence[StepTime], place: int, floor: float, top: float) -> Iterator[str]:
    left = 60 + 370 * place
    low, high = math.floor(math.log10(floor)), math.ceil(math.log10(top))
    frame = Frame(left, 40, left + 290, 240, x=(0, math.log2(RANKS[-1])), y=(low, high))
    yield label(left, 24, f"Seconds a step: {title}")
    for power in range(low, high + 1):
        y = frame.place_y(power)
        yield f'<line class="grid" x1="{frame.left}" y1="{y:.1f}" x2="{frame.right}" y2="{y:.1f}"/>'
        yield label(frame.left - 6, y + 4, f"{10.0**power:g}", "end")
    for ranks in RANKS[::3]:
        yield label(frame.place_x(math.log2(ranks)), 258, str(ranks), "middle")
    for number, (name, colour, part) in enumerate(PARTS):
        shown = [(math.log2(step.ranks), math.log10(part(step))) for step in steps if part(step) >= 10.0**low]
        yield frame.line(shown, colour)
        if not place:
            yield label(60 + 170 * number, 290, name, color=colour)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_model", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    rates = verbs.add_parser("rates", help="print the rates of a run as JSON")
    rates.add_argument("run", type=Path)
    rates.add_argument("--link", type=float, default=1.25e9, help="bytes a second between ranks (default: 10 Gbit/s)")
    rates.add_argument("--latency", type=float, default=50e-6, help="seconds of one message (default: 50e-6)")
    show = verbs.add_parser("show", help="print the tables, and draw the picture")
    show.add_argument("rates", type=Path)
    show.add_argument("picture", type=Path, nargs="?")
    given = parser.parse_args(arguments)
    if given.verb == "rates":
        print_result(json.dumps(asdict(rates_of(RunDir(given.run), given.link, given.latency)), indent=2))
        return
    found = read_rates(read_json(given.rates))
    same, growing = same_batch(found), growing_batch(found)
    limit = half_efficient(growing)
    lines = [*table("the same batch", same), "", *table("a batch that grows", growing), ""]
    lines.append(f"The same batch is quickest on {quickest(same).ranks} ranks: {quickest(same).seconds:.4g} s a step.")
    lines.append(
        f"A batch that grows is half efficient from {limit.ranks} ranks on." if limit else "It stays efficient."
    )
    print_result("\n".join(lines))
    if given.picture:
        given.picture.write_text(draw(found), encoding="utf-8")


if __name__ == "__main__":
    main()
