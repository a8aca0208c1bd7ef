"""minigrpo's side: `grpo` itself, with its log, stopped after each step by a logger that waits for its turn."""

from __future__ import annotations

import importlib
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from benchmarks.sides import BenchmarkError, CallTimer, Setup, StepGate
from benchmarks.workloads import task_of
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.models.policy import Policy, open_policy
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.registry import stop_ids
from minigrpo.rollouts.engines.transformers import TransformersEngine
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training.grpo import grpo
from minigrpo.types import Completion, Grade, Group, Prompt, Ready, Rendered, Sampling, Task
from minigrpo.utils.memory import free_memory

SHOWN = {
    "model": ("dtype", "checkpointing"),
    "lora": ("rank", "alpha", "dropout", "targets"),
    "rollout": ("prompts", "completions", "temperature", "max_tokens", "rows"),
    "objective": ("name", "clip_low", "clip_high", "kl", "importance"),
    "train": ("full", "reference", "lr", "grad_norm", "tokens_per_pass"),
}


def run(setup: Setup, gate: StepGate) -> None:
    """Run minigrpo's steps until there are no more turns."""
    # On a GPU the other side's weights come later: half of what is free now is planned with.
    half = {} if setup.device == "cpu" else {"train__memory": free_memory(torch.device(setup.device)) / 2e9}
    recipe = recipe_of(setup, **half)
    torch.set_num_threads(setup.threads)
    policy = open_policy(recipe)
    engine = open_engine(setup, policy, recipe.rollout.rows)
    clock, timer = RewardClock(task_of(setup.workload, setup.folder)), CallTimer(setup.device)
    time_methods(policy, engine, timer)
    logger = GatedLogger(RunDir(setup.scratch / "run"), recipe.train.steps, gate=gate, clock=clock, timer=timer)
    gate.ready(settings(recipe))
    grpo(recipe, clock.task, policy, engine, logger)


def time_methods(policy: Policy, engine: NativeEngine, timer: CallTimer) -> None:
    """Time the methods of the phases that the loop's own metrics do not separate."""
    algorithm = importlib.import_module("minigrpo.training.grpo")
    for name, owner, method in (
        ("prefill", engine.decoder, "prefill"),
        ("scoring", policy, "logprobs"),
        ("optimizer", algorithm, "step_optimizer"),
    ):
        setattr(owner, method, timer.timed(name, getattr(owner, method)))


def recipe_of(setup: Setup, **more: Any) -> Recipe:
    """Return the workload's recipe, or the package's defaults with a LoRA of rank 64, with what the comparison fixes.

    No checkpoint is ever due. `more`: options for this one call, with "__" for the dot.
    """
    workload, never = setup.workload, 10**6
    given = [("lora.rank", 64), ("lora.alpha", 128), ("lora.dropout", 0.0)] if workload.recipe is None else []
    fixed: dict[str, Any] = {
        "model.path": str(setup.folder),
        "model.dtype": setup.dtype.partition("+")[0],
        "model.device": setup.device,
        "task.name": "wordproblems",  # named, not used: prompts and rewards are the workload's
        "task.size": workload.prompts,
        "rollout.prompts": workload.prompts,
        "rollout.completions": workload.completions,
        "rollout.max_tokens": workload.limit,
        "train.steps": never,
        "train.threads": setup.threads,
        "save.every": never,
    }
    changed = {name.replace("__", "."): value for name, value in more.items()}
    return load_recipe(workload.recipe, [*given, *fixed.items(), *changed.items()])


def open_engine(setup: Setup, policy: Policy, rows: int) -> NativeEngine:
    """Open the native engine; its completions stop where the workload says, if it forces lengths."""
    lengths_B = torch.tensor(setup.workload.lengths_B, device=setup.device)
    forced = setup.workload.stops != "natural"
    policy.blocks_due = True  # as `open_all` does where memory admits
    return NativeEngine(
        policy,
        stop_ids=sorted(stop_ids(policy)),
        rows=rows,
        blocks=True,
        stop_rule=(lambda tokens_n, row_n, so_far: lengths_B[row_n] == so_far) if forced else None,
    )


def settings(recipe: Recipe) -> dict[str, str]:
    values = recipe.model_dump()
    return {f"{part}.{name}": str(values[part][name]) for part, names in SHOWN.items() for name in names}


class RewardClock:
    """A task whose grading is timed."""

    def __init__(self, task: Task) -> None:
        self._grade = task.grade
        self.task = replace(task, grade=self.grade)
        self.seconds = 0.0

    def grade(self, prompt: Prompt, text: str) -> Grade:
        began = time.perf_counter()
        grade = self._grade(prompt, text)
        self.seconds += time.perf_counter() - began
        return grade


class GatedLogger(RunLogger):
    """A run logger that waits for its turn between two steps."""

    def __init__(self, run: RunDir, total_steps: int, *, gate: StepGate, clock: RewardClock, timer: CallTimer) -> None:
        super().__init__(run, total_steps, console=Console(file=io.StringIO()))
        self._gate, self._clock, self._timer = gate, clock, timer

    def __enter__(self) -> RunLogger:
        entered = super().__enter__()
        self._timer.take()
        self._gate.begin()
        return entered

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        groups: Sequence[Group],
        advantages_PG: Sequence[Sequence[float]],
    ) -> None:
        super().record(step, metrics, groups, advantages_PG)
        if metrics["informative_groups"] < 1:
            raise BenchmarkError("A group's rewards tie: minigrpo skipped its passes, which TRL did not.")
        reward, self._clock.seconds = self._clock.seconds, 0.0
        inside = self._timer.take("prefill", "scoring", "optimizer")
        rollout, update, sync = (metrics[f"seconds/{name}"] for name in ("rollout", "update", "sync"))
        phases = {
            "rollout": rollout - reward,
            "reward": reward,
            "scoring": inside["scoring"],
            "update": update - inside["scoring"] + sync,
        }
        parts = {
            "prefill": inside["prefill"],
            "decode": rollout - reward - inside["prefill"],
            "training": update - inside["optimizer"],
            "update": inside["optimizer"] + sync,
        }
        peak = max((metrics.get(f"memory_gb/{name}", 0.0) for name in ("rollout", "update")), default=0.0)
        self._gate.end(phases, *lengths(groups), parts, int(peak * 1e9))
        self._gate.begin()


def lengths(groups: Sequence[Group]) -> tuple[list[int], list[int]]:
    """Return the lengths of prompts (once per completion) and of completions."""
    prompts = [len(group.prompt_ids) for group in groups for _ in group.completions]
    return prompts, [len(completion.token_ids) for group in groups for completion in group.completions]


def first_batch(setup: Setup, policy: Any, recipe: Recipe) -> list[Group]:
    """Return graded groups of the workload's first prompt alone, for the proof.

    transformers samples them: the native engine would lay out a second copy of float32 weights.
    """
    from minigrpo.rollouts.groups import rollout

    workload = setup.workload
    task = task_of(workload, setup.folder)
    sampling = Sampling(max_tokens=workload.limit)
    prompts, n = task.prompts("train")[:1], workload.completions
    if workload.stops == "natural":
        engine = TransformersEngine(policy, stop_ids=sorted(stop_ids(policy)), rows=recipe.rollout.rows)
    else:
        engine = CuttingEngine(policy, rows=recipe.rollout.rows, lengths_B=workload.lengths_B)
    return rollout(engine, task, prompts, n=n, sampling=sampling, tokenizer=policy.tokenizer)


class CuttingEngine(TransformersEngine):
    """Samples without a token that ends anything, and cuts each completion to its length."""

    def __init__(self, policy: Policy, *, rows: int, lengths_B: Sequence[int]) -> None:
        never = policy.model.get_input_embeddings().num_embeddings
        super().__init__(policy, stop_ids=[never], rows=rows)
        self.lengths_B = lengths_B

    def generate(
        self, prompts: Sequence[Rendered], n: int, sampling: Sampling, ready: Ready | None = None, **named: Any
    ) -> list[tuple[Completion, ...]]:
        whole, lengths = super().generate(prompts, n, sampling, **named), iter(self.lengths_B)
        answers = [tuple(self.cut(completion, next(lengths)) for completion in own) for own in whole]
        for index, own in enumerate(answers if ready else ()):
            ready(index, own)  # type: ignore[misc]
        return answers

    def cut(self, whole: Completion, length: int) -> Completion:
        ids = whole.token_ids[:length]
        text = self.policy.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(text, ids, whole.logprobs[:length], "stop")
