"""Checks on a device, each a process of its own that prints one line of JSON: `python -m benchmarks.gpu_checks NAME`.

engines   what each engine samples there, token for token beside the native engine on the CPU, and how fast each is
memory    what two steps of training take there, beside the plan
overhead  native and slots in turns on two small models: on a CPU, what fixed shapes cost where no graph saves anything
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks.machine import now
from benchmarks.ours import recipe_of
from benchmarks.proof import move_from_zero
from benchmarks.sides import Setup
from benchmarks.workloads import WORKLOADS, Workload, task_of
from minigrpo.config.schema import Recipe
from minigrpo.models.chat_template import render
from minigrpo.models.context_window import longest_prompt
from minigrpo.models.policy import Policy, open_policy
from minigrpo.rollouts.engines.registry import ENGINES, open_engine
from minigrpo.runs.logger import RunLogger, read_metrics
from minigrpo.runs.rundir import RunDir
from minigrpo.training.grpo import grpo
from minigrpo.training.memory.machine import plan_of_run, planned_sampling
from minigrpo.types import Engine, Rendered, Sampling, Task

IN_PROCESS = ("native", "slots", "transformers")
ROUNDS = 9
STOPS = list(range(3, 40))
"""Tokens that end a completion where random weights sample: rows then end at different times."""


def setup_of(workload: Workload, scratch: Path, device: str) -> Setup:
    folder = scratch / workload.name
    if not folder.exists():
        workload.kind.make(folder)
    return Setup(workload, folder, scratch, torch.get_num_threads(), "auto", 2, device)


def open_one(setup: Setup, device: str, dtype: str, engine: str) -> tuple[Recipe, Policy]:
    recipe = recipe_of(setup, model__device=device, model__dtype=dtype, rollout__engine=engine)
    policy = open_policy(recipe)
    policy.model.generation_config.eos_token_id = STOPS
    return recipe, policy


def engines(setup: Setup, fast: Setup) -> dict[str, Any]:
    """Compare what the engines sample from `setup`'s model, and time them on `fast`'s."""
    return {"tokens": list(same_tokens(setup)), "sixteen_bit": sixteen_bit(setup), "speed": speeds(fast)}


def same_tokens(setup: Setup) -> Iterator[dict[str, Any]]:
    """Yield, for each engine on the device, how many of its tokens are the CPU's; before and after an update.

    In float64: engines sum in different order, and among thousands of draws rounding in float32 may change one.
    """
    wanted = sampled_twice(setup, "cpu", "native")
    for name in IN_PROCESS:
        found = sampled_twice(setup, setup.device, name)
        yield {"engine": name, "tokens": sum(map(len, wanted)), "same": found == wanted}


def sampled_twice(setup: Setup, device: str, name: str) -> list[tuple[int, ...]]:
    recipe, policy = open_one(setup, device, "float32", name)
    policy.model.double()
    engine = ENGINES[name](policy, recipe, recipe.rollout.rows)
    first = sample(setup, policy, engine, seed=1)
    move_from_zero(policy.trainable)
    engine.update(policy)
    return first + sample(setup, policy, engine, seed=2)


def sample(setup: Setup, policy: Policy, engine: Engine, seed: int) -> list[tuple[int, ...]]:
    workload = setup.workload
    prompts = rendered(setup, policy)
    answers = engine.generate(prompts, workload.completions, Sampling(1.0, workload.limit, seed))
    return [completion.token_ids for own in answers for completion in own]


def rendered(setup: Setup, policy: Policy) -> list[Rendered]:
    return [render(policy.tokenizer, prompt) for prompt in task_of(setup.workload, setup.folder).prompts("train")]


def sixteen_bit(setup: Setup) -> dict[str, Any]:
    """Return the share of tokens in which native and slots agree in the device's own number type, up to the first
    difference of each completion. It need not be 1: they round in different order."""
    found, dtype = [], "float32"
    for name in ("native", "slots"):
        recipe, policy = open_one(setup, setup.device, "auto", name)
        dtype = str(policy.dtype).removeprefix("torch.")
        found.append(sample(setup, policy, ENGINES[name](policy, recipe, recipe.rollout.rows), seed=3))
    pairs = list(zip(*found, strict=True))
    equal = sum(next((k for k, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), len(x)) for x, y in pairs)
    return {"dtype": dtype, "share": equal / sum(len(x) for x, _ in pairs)}


def speeds(setup: Setup, names: Sequence[str] = IN_PROCESS, rounds: int = 1) -> list[dict[str, Any]]:
    """Return each engine's completion tokens a second in the device's own number type: the median of `rounds`, in which
    the engines take turns, after one that is not counted. The least and the most stand beside it."""
    recipe, policy = open_one(setup, setup.device, "auto", "auto")
    policy.model.generation_config.eos_token_id = policy.tokenizer.eos_token_id  # few completions end early
    opened = {name: ENGINES[name](policy, recipe, recipe.rollout.rows) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(1 + rounds):
        for name in names if seed % 2 else reversed(names):
            began = now(setup.device)
            tokens = sum(map(len, sample(setup, policy, opened[name], seed)))
            rates[name].append(tokens / (now(setup.device) - began))
    found = {name: sorted(taken[1:]) for name, taken in rates.items()}
    return [
        {"engine": name, "tokens_per_second": median(taken), "least": taken[0], "most": taken[-1]}
        for name, taken in found.items()
    ]


def overhead(embedded: Setup, slim: Setup) -> dict[str, Any]:
    """Time native and slots in turns on both models."""
    setups = {setup.workload.about: setup for setup in (embedded, slim)}
    return {"speed": {about: speeds(setup, ("native", "slots"), ROUNDS) for about, setup in setups.items()}}


def memory(setup: Setup, fast: Setup) -> dict[str, Any]:
    """Train `fast`'s model for two steps; return the peaks of rollout and update beside the plan's, in bytes.

    On a GPU torch counts its own tensors: the plan's line for CUDA itself is left out there.
    """
    recipe = recipe_of(fast, model__dtype="auto", train__steps=2)
    task = task_of(fast.workload, fast.folder)
    policy = open_policy(recipe)
    prompt = longest_prompt(task.prompts("train"), policy.tokenizer)
    sampling = planned_sampling(policy, recipe, prompt)
    policy.blocks_due = sampling.training_blocks
    engine = open_engine(policy, recipe, sampling.rows, blocks=sampling.blocks)
    plan = plan_of_run(policy, recipe, prompt)
    assert plan is not None, "the shapes of the benchmark are all of architectures that can be counted"
    run = RunDir(fast.scratch / "memory")
    run.path.mkdir()
    train(recipe, task, policy, engine, run)
    last = list(read_metrics(run))[-1]
    left_out = plan.line("program") if fast.device == "cuda" else 0
    rows = []
    for when in ("rollout", "update"):
        measured = last.get(f"memory_gb/{when}")
        planned = (plan.at("rollout" if when == "rollout" else "update") - left_out) / 1e9
        rows.append({"phase": when, "planned_gb": planned, "measured_gb": measured})
    facts = {"tokens_per_pass": plan.tokens_per_pass, "recompute": plan.recompute, "rows": plan.rows}
    return {"phases": rows, "dtype": plan.dtype, "fits": plan.fits, **facts}


def train(recipe: Recipe, task: Task, policy: Policy, engine: Engine, run: RunDir) -> None:
    grpo(recipe, task, policy, engine, RunLogger(run, recipe.train.steps, console=Console(file=io.StringIO())))


CHECKS: Mapping[str, Callable[[Setup, Setup], dict[str, Any]]] = {
    "engines": engines,
    "memory": memory,
    "overhead": overhead,
}


def workloads_of(check: str, tiny: bool) -> tuple[Workload, Workload]:
    """Return what a check is done on: a small model and a large one. `tiny`: the smallest models and batches."""
    mini = WORKLOADS["mini"]
    if check == "overhead":
        embedded = replace(WORKLOADS["tiny"], limit=6 if tiny else 64)
        like_qwen = replace(embedded, name="slim", about="0.7 million random weights in Qwen2's shape, long prompts")
        return embedded, like_qwen
    large = mini if tiny else WORKLOADS["half"].on_gpu()
    return replace(mini, prompts=3, completions=2, limit=6 if tiny else 48), large


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__)
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest model and batch, for a rehearsal")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="minigrpo-gpu-") as scratch:
        places = (Path(scratch) / "small", Path(scratch) / "large")
        setups = map(partial(setup_of, device=args.device), workloads_of(args.check, args.tiny), places)
        found = CHECKS[args.check](*setups)
    print(json.dumps({**found, "seconds": time.perf_counter() - began}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
