"""python -m benchmarks.recipes: gsm8k-fast and gsm8k-full on one model, one step each in turns, on this machine.

Both sample 16 completions a step; the fast recipe gives 8 prompts two each, the full one 4 prompts four. Weights are
random, in the shape of Qwen2.5-0.5B; stop lengths are the same published draw on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.report import GIB, PHASES
from benchmarks.sides import Setup, Side, Step
from benchmarks.workloads import WORKLOADS, Workload

FAST, FULL = "gsm8k-fast", "gsm8k-full"
SHAPES = {FAST: (8, 2), FULL: (4, 4)}
"""Prompts and completions a step, as the recipes have them; a test holds it."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    p.add_argument("--model", choices=["fast", "mini"], default="fast", help="shape: Qwen2.5-0.5B's, or a tiny one")
    p.add_argument("--limit", type=int, default=64, help="longest completion, in tokens (default: 64; recipes: 300)")
    p.add_argument("--repeats", type=int, metavar="N", default=3, help="timed steps a side, after one that is not")
    p.add_argument("--threads", type=int, metavar="N", default=os.cpu_count() or 1)
    p.add_argument("--json", type=Path, metavar="FILE", help="default: bench-results/recipes-DATE.json")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console() if sys.stdout.isatty() else Console(width=110)
    machine = describe(args.threads)
    console.print(str(machine), soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="minigrpo-bench-") as scratch:
        steps = measure(args, Path(scratch), console)
    console.print(table(steps, args.limit))
    console.print(summarize(steps), soft_wrap=True, highlight=False)
    file = args.json or Path("bench-results") / f"recipes-{datetime.now(UTC):%Y%m%d-%H%M}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    sides = {name: [asdict(step) for step in taken] for name, taken in steps.items()}
    file.write_text(json.dumps({"machine": asdict(machine), "limit": args.limit, "sides": sides}, indent=2) + "\n")
    console.print(f"Every step's figures: {file}", highlight=False)
    return 0


def measure(args: argparse.Namespace, scratch: Path, console: Console) -> dict[str, list[Step]]:
    """Return the timed steps of both recipes, taken in turns."""
    from benchmarks import ours
    from benchmarks.harness import make_model

    workloads = {name: workload_of(name, args.model, args.limit) for name in SHAPES}
    setups = {
        # float32 for both: training all parameters needs it.
        name: Setup(workload, scratch / "model", scratch / name, args.threads, "float32", steps=args.repeats + 1)
        for name, workload in workloads.items()
    }
    make_model(setups[FAST], scratch / "model")
    taken: dict[str, list[Step]] = {name: [] for name in setups}
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name, ours.run, setup)) for name, setup in setups.items()]
        for repetition in range(args.repeats + 1):
            for side in sides if repetition % 2 == 0 else reversed(sides):
                step = side.step()
                console.print(
                    f"{repetition}/{args.repeats} {side.name} {step.seconds:.2f} s", style="dim", highlight=False
                )
                taken[side.name] += [step] if repetition else []
    return taken


def workload_of(recipe: str, model: str, limit: int) -> Workload:
    prompts, completions = SHAPES[recipe]
    return replace(WORKLOADS[model], recipe=recipe, prompts=prompts, completions=completions, limit=limit)


def table(steps: Mapping[str, Sequence[Step]], limit: int) -> Table:
    grid = Table(title=f"16 completions of up to {limit} tokens a step", title_justify="left", box=SIMPLE_HEAD)
    grid.add_column("", no_wrap=True)
    for name in ("step s", "from - to", *PHASES, "s a completion", "peak GiB"):
        grid.add_column(name, justify="right", no_wrap=True)
    for name, taken in steps.items():
        seconds = [step.seconds for step in taken]
        grid.add_row(
            name,
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f} - {max(seconds):.2f}",
            *(f"{statistics.median(step.phases[phase] for step in taken):.2f}" for phase in PHASES),
            f"{statistics.median(step.seconds / len(step.completion_lengths) for step in taken):.3f}",
            f"{max(step.peak for step in taken) / GIB:.2f}",
        )
    return grid


def summarize(steps: Mapping[str, Sequence[Step]]) -> str:
    ratios = [full.seconds / fast.seconds for fast, full in zip(steps[FAST], steps[FULL], strict=True)]
    memory = max(step.peak for step in steps[FULL]) / max(step.peak for step in steps[FAST])
    return (
        f"A step of {FULL} takes {statistics.median(ratios):.2f} times as long as one of {FAST} "
        f"({min(ratios):.2f} - {max(ratios):.2f} in {len(ratios)} repetitions), a completion the same, and "
        f"{memory:.2f} times the memory. Published for their kind: 9 times as long, 12 GB against 3 to 4."
    )


if __name__ == "__main__":
    sys.exit(main())
