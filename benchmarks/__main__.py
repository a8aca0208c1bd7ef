"""python -m benchmarks: minigrpo and TRL, one step each in turns, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from benchmarks.machine import describe
from benchmarks.report import Result, show, write
from benchmarks.sides import BenchmarkError, Setup
from benchmarks.workloads import WORKLOADS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


WIDTH = 110
"""Columns, where the output goes to a file."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["tiny", "half"], help="what to run")
    p.add_argument(
        "--stops", nargs="+", choices=["draw", "fixed"], default=["draw"], help="stop lengths; fixed: no stragglers"
    )
    p.add_argument("--repeats", type=int, metavar="N", help="timed steps a side (default: the workload's own)")
    p.add_argument("--warmup", type=int, metavar="N", default=1, help="steps before the timed ones (default: 1)")
    p.add_argument("--threads", type=int, metavar="N", default=os.cpu_count() or 1, help="CPU threads of each side")
    p.add_argument("--dtype", help="float32 or bfloat16, for minigrpo (default: the workload's own)")
    p.add_argument("--trl-dtype", help="the same for TRL; +autocast: bf16 products over these weights")
    p.add_argument("--no-proof", action="store_true", help="do not compare gradients first")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (default: bench-results/DATE.json)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    if importlib.util.find_spec("trl") is None:
        console.print("The benchmark compares with TRL, which is not installed: pip install 'minigrpo\\[bench]'")
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", str(given.threads))
    from minigrpo.errors import ModelError
    from minigrpo.loading import check_instructions  # brings torch, which reads the environment above

    try:
        check_instructions("bfloat16")
    except ModelError as fault:
        console.print(str(fault), markup=False)
        return 2
    machine = describe(given.threads)
    console.print(str(machine), soft_wrap=True, highlight=False)
    file = given.json or Path("bench-results") / f"{datetime.now(UTC):%Y%m%d-%H%M}.json"
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="minigrpo-bench-") as scratch:
        for setup in setups(given, Path(scratch)):
            try:
                results.append(run(setup, given, console))
            except BenchmarkError as fault:
                console.print(f"{setup.workload.title}: {fault}", markup=False)
                return 1
            show(results[-1], console)
            write(file, machine, results)
    console.print(f"Every step's figures: {file}", highlight=False)
    return 0


def setups(given: argparse.Namespace, scratch: Path) -> list[Setup]:
    chosen = []
    for name in given.workload:
        for stops in given.stops:
            plain = WORKLOADS[name]
            workload = replace(
                plain, stops=stops, dtype=given.dtype or plain.dtype, trl_dtype=given.trl_dtype or plain.trl_dtype
            )
            runs = scratch / f"{name}-{stops}"
            chosen.append(Setup(workload, scratch / name, runs, given.threads, workload.dtype, steps=1))
    return chosen


def run(setup: Setup, given: argparse.Namespace, console: Console) -> Result:
    from benchmarks.harness import make_model, measure

    def say(line: str) -> None:
        console.print(line, style="dim", highlight=False, soft_wrap=True)

    make_model(setup, setup.folder)
    repeats = given.repeats or setup.workload.repeats
    return measure(setup, repeats=repeats, warmup=given.warmup, prove=not given.no_proof, say=say)


if __name__ == "__main__":
    sys.exit(main())
