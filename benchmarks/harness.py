"""One workload, measured: both sides started, warmed up, then stepped in turns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import ours, proof, trls
from benchmarks.proof import Proof
from benchmarks.report import OURS, TRL, Result
from benchmarks.report import Side as Measured
from benchmarks.sides import BenchmarkError, Setup, Side, Step

PROGRAMS = {OURS: ours.run, TRL: trls.run}

Say = Callable[[str], None]


def measure(setup: Setup, *, repeats: int, warmup: int, prove: bool, say: Say) -> Result:
    """Raises BenchmarkError where a side fails, or does not do the same work as the other."""
    workload = setup.workload
    proven = check(setup, say) if prove else None
    dtypes = {OURS: workload.dtype, TRL: workload.trl_dtype}
    setup = replace(setup, steps=warmup + repeats)
    with ExitStack() as stack:
        # One after the other: a side must not load while the other's memory is at its peak.
        sides = [
            stack.enter_context(Side(name, program, replace(setup, dtype=dtypes[name])))
            for name, program in PROGRAMS.items()
        ]
        taken: dict[str, list[Step]] = {side.name: [] for side in sides}
        for turn in range(warmup + repeats):
            for side in sides if turn % 2 == 0 else reversed(sides):
                step = side.step()
                taken[side.name].append(step)
                word = "warm-up" if turn < warmup else f"{turn - warmup + 1}/{repeats}"
                say(f"{workload.title} {word}: {side.name} {step.seconds:.2f} s, {step.rate:.1f} tokens/s")
            same_work(workload.lengths_B, taken[OURS][-1], taken[TRL][-1])
        measured = {side.name: Measured(side.facts, tuple(taken[side.name][warmup:])) for side in sides}
    return Result(workload, measured, proven)


def check(setup: Setup, say: Say) -> Proof:
    with Side("proof", proof.run, setup) as side:
        proven = Proof(**side.facts)
    say(f"{setup.workload.title}: gradients of both sides {proven.gap:.1e} apart on {proven.tokens} tokens")
    if not proven.holds:
        raise BenchmarkError(f"The sides do not compute the same gradient: {proven}. Nothing was timed.")
    return proven


def same_work(wanted: tuple[int, ...], a: Step, b: Step) -> None:
    if not (a.completion_lengths == b.completion_lengths == wanted):
        raise BenchmarkError(f"Completions differ in length: {a.completion_lengths} and {b.completion_lengths}.")
    if a.prompt_lengths != b.prompt_lengths:
        raise BenchmarkError(f"Prompts differ in length: {a.prompt_lengths} and {b.prompt_lengths}.")


def make_model(setup: Setup, path: Path) -> None:
    """The workload's model folder, unless it is there."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (path / "config.json").exists():
        setup.workload.kind.make(path)
