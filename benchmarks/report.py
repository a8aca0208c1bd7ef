"""What was measured, as a table and as JSON: medians, ratios of steps taken side by side, and their spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Machine
from benchmarks.proof import Proof
from benchmarks.sides import Step
from benchmarks.workloads import Workload

OURS, TRL = "minigrpo", "TRL"
PHASES = ("rollout", "reward", "update", "other")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Side:
    """Every timed step of one side, and its settings."""

    settings: Mapping[str, Any]
    steps: tuple[Step, ...]

    def median(self, name: str) -> float:
        return statistics.median(getattr(step, name) for step in self.steps)

    def phase(self, name: str) -> float:
        return statistics.median(step.phases[name] for step in self.steps)


@dataclass(frozen=True, slots=True)
class Result:
    """One workload on both sides. `proof` is None where it was skipped."""

    workload: Workload
    sides: Mapping[str, Side]
    proof: Proof | None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Our tokens per second over TRL's, repetition by repetition."""
        return tuple(a.rate / b.rate for a, b in zip(self.sides[OURS].steps, self.sides[TRL].steps, strict=True))

    @property
    def memory_ratio(self) -> float:
        return self.sides[OURS].median("peak") / self.sides[TRL].median("peak")


def show(result: Result, console: Console) -> None:
    workload = result.workload
    about = f"{workload.about}: {workload.prompts} prompts x {workload.completions} completions, limit {workload.limit}"
    table = Table(title=f"{workload.title}: {about}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("tokens/s", "step s", "from - to", *PHASES, "CPU s", "peak GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, side in result.sides.items():
        seconds = [step.seconds for step in side.steps]
        table.add_row(
            name,
            f"{side.median('rate'):.1f}",
            f"{side.median('seconds'):.2f}",
            f"{min(seconds):.2f} - {max(seconds):.2f}",
            *(f"{side.phase(phase):.2f}" for phase in PHASES),
            f"{side.median('cpu_seconds'):.2f}",
            f"{side.median('peak') / GIB:.2f}",
        )
    console.print(table)
    console.print(verdict(result), soft_wrap=True, highlight=False)
    console.print(settings(result))


def verdict(result: Result) -> str:
    ratios, steps = result.ratios, result.sides[OURS].steps
    proof = "not checked" if result.proof is None else f"{result.proof.gap:.0e} apart on {result.proof.tokens} tokens"
    return (
        f"minigrpo makes {statistics.median(ratios):.2f} times as many completion tokens a second "
        f"({min(ratios):.2f} - {max(ratios):.2f} in {len(ratios)} repetitions), with {result.memory_ratio:.2f} times "
        f"the memory. Same work: {steps[0].tokens} tokens in {len(steps[0].completion_lengths)} completions of equal "
        f"lengths on both sides; gradients {proof}."
    )


def settings(result: Result) -> Table:
    """Both sides' settings beside each other, as each side reads them back."""
    grid = Table.grid(padding=(0, 3))
    for name, side in result.sides.items():
        grid.add_column(name, overflow="fold")
        assert side.settings
    listed = ["\n".join(f"{key} = {value}" for key, value in side.settings.items()) for side in result.sides.values()]
    grid.add_row(*result.sides)
    grid.add_row(*listed)
    return grid


def write(path: Path, machine: Machine, results: Sequence[Result]) -> None:
    rows = [
        {**asdict(result), "lengths": result.workload.lengths_B, "ratios": result.ratios, "memory": result.memory_ratio}
        for result in results
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": asdict(machine), "results": rows}, indent=2) + "\n", encoding="utf-8")
