"""Measure one workload: start all sides, warm up, step them in turns; then time the limit, on the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import ours, proof, trls
from benchmarks.limit import Kernels, Limit
from benchmarks.machine import busy_neighbours
from benchmarks.proof import Proof
from benchmarks.report import OURS, Result, side_name
from benchmarks.report import Side as Measured
from benchmarks.shapes import Lengths, Shape, phases
from benchmarks.sides import BenchmarkError, Setup, Side, Step
from minigrpo.utils.spinning import spinning_is_ours

Say = Callable[[str], None]
SPINS = {False: 300_000, True: 1_000}
"""GOMP_SPINCOUNT of TRL's side, without and with busy neighbours: the best for it of those tried (docs/speed.md)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a workload is measured. `keep` gets the result so far after every repetition. `neighbours`: other processes
    that are busy meanwhile."""

    repeats: int
    warmup: int
    prove: bool
    variants: Sequence[str]
    say: Say
    keep: Callable[[Result], None] = lambda result: None
    neighbours: int = 0


def measure(setup: Setup, plan: Plan) -> Result:
    """Measure a workload. Raise BenchmarkError where a side fails, or the sides do not do the same work."""
    workload = setup.workload
    proven = check(setup, plan.say) if plan.prove else None
    setup = replace(setup, steps=plan.warmup + plan.repeats)
    absent: dict[str, str] = {}
    taken: dict[str, list[Step]] = {}
    with ExitStack() as stack:
        sides = open_sides(setup, plan, stack, absent)
        stack.enter_context(busy_neighbours(plan.neighbours))
        result = Result(workload, {}, proven, absent, neighbours=plan.neighbours)
        began = time.monotonic()
        for repetition in range(plan.warmup + plan.repeats):
            take_turns(sides if repetition % 2 == 0 else sides[::-1], taken, workload.lengths_B)
            plan.say(progress(workload.title, repetition, plan, taken, time.monotonic() - began))
            if repetition >= plan.warmup:
                timed = {s.name: Measured(s.facts, tuple(taken[s.name][plan.warmup :])) for s in sides}
                result = replace(result, sides=timed)
                plan.keep(result)
    plan.say(f"{workload.title}: bare kernels of the step's own products")
    return replace(result, limits=limits(setup, taken[OURS][-1]))


def open_sides(setup: Setup, plan: Plan, stack: ExitStack, absent: dict[str, str]) -> list[Side]:
    """Start the sides one after the other: none must load while another's memory is at its peak.

    minigrpo and TRL at its best must start; other TRL variants may be missing, with the reason in `absent`.
    """
    workload = setup.workload
    opened = [stack.enter_context(Side(OURS, ours.run, replace(setup, dtype=workload.dtype)))]
    for variant in plan.variants:
        name = side_name(variant)
        chosen = replace(setup, dtype=trls.weights_of(variant, workload.trl_dtype), variant=variant)
        why = trls.VARIANTS[variant].missing(workload)
        try:
            if why is None:
                opened.append(stack.enter_context(Side(name, trls.run, chosen, spins_of_trl(plan.neighbours))))
        except BenchmarkError as fault:
            if variant == "best":
                raise
            why = str(fault).strip().splitlines()[-1]
        if why is not None:
            absent[name] = why
            plan.say(f"{workload.title}: {name} is left out: {why}")
    return opened


def spins_of_trl(neighbours: int) -> int | None:
    """Return GOMP_SPINCOUNT of TRL's side; None where the user has said how threads wait, which both sides keep to."""
    return SPINS[neighbours > 0] if spinning_is_ours() else None


def take_turns(sides: Sequence[Side], taken: dict[str, list[Step]], wanted: tuple[int, ...]) -> None:
    for side in sides:
        taken.setdefault(side.name, []).append(side.step())
    for name, steps in taken.items():
        same_work(wanted, taken[OURS][-1], steps[-1], name)


def progress(title: str, repetition: int, plan: Plan, taken: dict[str, list[Step]], spent: float) -> str:
    word = "warm-up" if repetition < plan.warmup else f"{repetition - plan.warmup + 1}/{plan.repeats}"
    steps = ", ".join(f"{name} {steps[-1].seconds:.2f} s" for name, steps in taken.items())
    left = spent / (repetition + 1) * (plan.repeats + plan.warmup - repetition - 1)
    return f"{title} {word}: {steps}" + (f"; about {left:.0f} s to go" if left >= 1 else "")


def limits(setup: Setup, step: Step) -> dict[str, Limit]:
    """Of minigrpo's own step: its lengths, its number type."""
    import torch
    from transformers import AutoConfig

    workload = setup.workload
    dtype: torch.dtype = getattr(torch, workload.dtype)
    shape = Shape.of(AutoConfig.from_pretrained(setup.folder))
    lengths = Lengths.of(step.prompt_lengths, step.completion_lengths, workload.completions)
    rank = ours.recipe_of(setup).lora.rank
    torch.set_num_threads(setup.threads)
    kernels = Kernels(dtype, setup.device, shape.entries * dtype.itemsize)
    whole = phases(shape, lengths, rank, wide=dtype.itemsize >= 4)
    return {name: kernels.price(work) for name, work in whole.items()}


def check(setup: Setup, say: Say) -> Proof:
    with Side("proof", proof.run, setup) as side:
        proven = Proof(**side.facts)
    say(f"{setup.workload.title}: gradients of both sides {proven.gap:.1e} apart on {proven.tokens} tokens")
    if not proven.holds:
        raise BenchmarkError(f"The sides do not compute the same gradient: {proven}. Nothing was timed.")
    return proven


def same_work(wanted: tuple[int, ...], a: Step, b: Step, name: str = "the other side") -> None:
    """Raise BenchmarkError where two steps differ in their lengths.

    `wanted` is empty where each side ends its completions itself: then only the prompts must be the same.
    """
    if wanted and not (a.completion_lengths == b.completion_lengths == wanted):
        raise BenchmarkError(
            f"Completions differ in length: {a.completion_lengths}, and {b.completion_lengths} of {name}."
        )
    if a.prompt_lengths != b.prompt_lengths:
        raise BenchmarkError(f"Prompts differ in length: {a.prompt_lengths}, and {b.prompt_lengths} of {name}.")


def make_model(setup: Setup, path: Path) -> None:
    """Write the workload's model folder, unless it exists."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (path / "config.json").exists():
        setup.workload.kind.make(path)
