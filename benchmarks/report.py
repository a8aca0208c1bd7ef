"""Report the measurements as tables and as JSON: medians, ratios of steps taken side by side, spread, and the limit."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.limit import Limit
from benchmarks.machine import Machine
from benchmarks.proof import Proof
from benchmarks.sides import Step
from benchmarks.workloads import Workload

OURS, TRL = "minigrpo", "TRL"
PHASES = ("rollout", "reward", "scoring", "update", "other")
PARTS = ("prefill", "decode", "training", "update")
COARSE = {"rollout": ("prefill", "decode"), "passes": ("training", "update"), "step": PARTS}
GIB = 2**30
QUIET = 0.05
"""Share of the cores' time that others may take before a ratio is no longer quoted: they may slow the steps by as much,
and ratios are quoted to two digits."""


def side_name(variant: str) -> str:
    return TRL if variant == "best" else f"{TRL} {variant}"


@dataclass(frozen=True, slots=True)
class Side:
    """Every timed step of one side, and its settings."""

    settings: Mapping[str, Any]
    steps: tuple[Step, ...]

    def median(self, name: str) -> float:
        return statistics.median(getattr(step, name) for step in self.steps)

    def phase(self, name: str) -> float:
        return statistics.median(step.phases[name] for step in self.steps)

    def part(self, name: str) -> float | None:
        """Return the seconds of a row of the limit.

        A part, or parts together; None where the side does not report it.
        """
        if name == "step":
            return self.median("seconds")
        if name == "rollout":
            return self.phase("rollout")
        if name == "passes":
            return statistics.median(step.phases["scoring"] + step.phases["update"] for step in self.steps)
        found = [step.parts.get(name) for step in self.steps]
        return None if None in found else statistics.median(found)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class Result:
    """One workload on all sides. `proof` is None where it was skipped; `absent`: sides left out, and why.

    `neighbours`: other busy processes that were asked for.
    """

    workload: Workload
    sides: Mapping[str, Side]
    proof: Proof | None
    absent: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Limit] = field(default_factory=dict)
    neighbours: int = 0

    @property
    def others_share(self) -> float:
        """Return the share of all cores' time that other programs took while the timed steps ran."""
        steps = [step for side in self.sides.values() for step in side.steps]
        return sum(step.others for step in steps) / (sum(step.seconds for step in steps) * (os.cpu_count() or 1))

    @property
    def is_quiet(self) -> bool:
        return self.others_share <= QUIET

    def ratios(self, other: str = TRL) -> tuple[float, ...]:
        """Return our tokens per second over the other side's, repetition by repetition."""
        pairs = zip(self.sides[OURS].steps, self.sides[other].steps, strict=True)
        return tuple(a.rate / b.rate for a, b in pairs)

    def memory(self, other: str = TRL) -> float:
        return self.sides[OURS].median("peak") / self.sides[other].median("peak")

    @property
    def others(self) -> list[str]:
        return [name for name in self.sides if name != OURS]

    def limit(self, row: str) -> Limit:
        """Return the limit of a part, or of parts together."""
        chosen = [self.limits[name] for name in COARSE.get(row, (row,))]
        return Limit(
            sum(limit.operations for limit in chosen),
            sum(limit.bytes for limit in chosen),
            sum(limit.seconds for limit in chosen),
            sum(limit.machine for limit in chosen),
        )

    def reached(self, row: str, side: str = OURS) -> float | None:
        """Return the fraction of the limit; None where it is unknown, or where the side sampled lengths of its own."""
        if not self.limits or (side != OURS and self.workload.stops == "natural"):
            return None
        seconds = self.sides[side].part(row)
        return self.limit(row).seconds / seconds if seconds else None


def show(result: Result, console: Console) -> None:
    workload = result.workload
    about = f"{workload.about}: {workload.prompts} prompts x {workload.completions} completions"
    console.print(f"\n{workload.title} ({about})", highlight=False, soft_wrap=True)
    console.print(speed_table(result))
    if result.limits:
        console.print(limit_table(result))
    for other in result.others:
        said = summarize(result, other) if result.is_quiet or result.neighbours else ""
        console.print(f"{said} {load(result)}".strip(), soft_wrap=True, highlight=False)
    for name, why in result.absent.items():
        console.print(f"{name}: not measured. {why}", soft_wrap=True, highlight=False)
    console.print(settings(result))


def speed_table(result: Result) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("tokens/s", "step s", "from - to", *PHASES, "CPU s", "peak GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, side in result.sides.items():
        seconds = [step.seconds for step in side.steps]
        table.add_row(
            name,
            f"{side.median('rate'):.1f}",
            f"{side.median('seconds'):.2f}",
            f"{min(seconds):.2f}-{max(seconds):.2f}",
            *(f"{side.phase(phase):.2f}" for phase in PHASES),
            f"{side.median('cpu_seconds'):.2f}",
            f"{side.median('peak') / GIB:.2f}",
        )
    return table


def limit_table(result: Result) -> Table:
    """Tabulate each phase beside its limit.

    Work, the bare kernels' time, the machine's, and each side's share of it.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("the limit", no_wrap=True)
    for name in ("GFLOP", "GB", "kernels s", "machine s", f"{OURS} s", f"{OURS} %", *(f"{x} %" for x in result.others)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in ("prefill", "decode", "rollout", "training", "update", "passes", "step"):
        limit, seconds = result.limit(row), result.sides[OURS].part(row)
        shares = [result.reached(row, name) for name in result.sides]
        table.add_row(
            {"passes": "training + update"}.get(row, row),
            *(f"{limit.operations / 1e9:.1f}", f"{limit.bytes / 1e9:.2f}"),
            *(f"{limit.seconds:.4f}", f"{limit.machine:.4f}"),
            "" if seconds is None else f"{seconds:.4f}",
            *("" if share is None else f"{share:.0%}" for share in shares),
        )
    return table


def summarize(result: Result, other: str) -> str:
    ratios, ours, theirs = result.ratios(other), result.sides[OURS].steps[0], result.sides[other].steps[0]
    proof = "not checked" if result.proof is None else f"{result.proof.gap:.0e} apart on {result.proof.tokens} tokens"
    equal = f"{ours.tokens} tokens in {len(ours.completion_lengths)} completions of equal lengths on both sides"
    own = f"each side its own lengths, {ours.tokens} tokens and {theirs.tokens} in the first step"
    return (
        f"minigrpo makes {statistics.median(ratios):.2f} times as many completion tokens a second as {other} "
        f"({min(ratios):.2f} - {max(ratios):.2f} in {len(ratios)} repetitions), with {result.memory(other):.2f} times "
        f"the memory. Same work: {own if result.workload.stops == 'natural' else equal}; gradients {proof}."
    )


def load(result: Result) -> str:
    """Say what other programs took, and, unless they were asked for, that nothing is quoted where it was much."""
    took = f"Other programs took {result.others_share:.0%} of the cores' time while the steps ran"
    if result.is_quiet or result.neighbours:
        return took + (f" (busy neighbours that were asked for: {result.neighbours})." if result.neighbours else ".")
    return f"{took}, so no ratio is quoted (at most {QUIET:.0%}): run it again when the machine has nothing else to do."


def settings(result: Result) -> Table:
    """Tabulate all sides' settings, as each side reads them back."""
    grid = Table.grid(padding=(0, 3))
    for side in result.sides.values():
        grid.add_column(overflow="fold")
        assert side.settings
    listed = ["\n".join(f"{key} = {value}" for key, value in side.settings.items()) for side in result.sides.values()]
    grid.add_row(*result.sides)
    grid.add_row(*listed)
    return grid


def as_json(result: Result) -> dict[str, Any]:
    rows = (*PARTS, *COARSE)
    return {
        **asdict(result),
        "lengths": result.workload.lengths_B,
        "ratios": result.ratios() if TRL in result.sides else [],
        "ratio": {name: statistics.median(result.ratios(name)) for name in result.others},
        "memory": {name: result.memory(name) for name in result.others},
        "others_share": result.others_share,
        "is_quiet": result.is_quiet,
        "reached": {name: {row: result.reached(row, name) for row in rows} for name in result.sides},
    }


def write(path: Path, machine: Machine, results: Sequence[Result], sweeps: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the file as a whole: a run stopped while it writes leaves the file of the last repetition."""
    text = json.dumps(
        {"machine": asdict(machine), "results": [as_json(result) for result in results], "sweeps": list(sweeps)},
        indent=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)
