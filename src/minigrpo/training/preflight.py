"""Sample the task with the real settings before training, and say whether training could work.

A group has a gradient only where its siblings earn different rewards. Preflight samples until it is sure of one or the
other, or its time is up: `preflight_findings.is_decided`.

Not covered: a reward that can be earned without solving the task, and rates that fall later because completions grow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any

from minigrpo.algorithms.objective import OBJECTIVES, Objective
from minigrpo.algorithms.packing import MicroBatch, pack
from minigrpo.config.schema import GroupsConfig, Recipe
from minigrpo.models.chat_template import render, with_opening
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.engines.registry import release_caches
from minigrpo.rollouts.grading import gold_answer, judge_group
from minigrpo.rollouts.groups import prompts_of, rollout
from minigrpo.training.group_source import LOWEST_RATE
from minigrpo.training.memory.machine import Plan, plan_of_run, tokens_per_pass
from minigrpo.training.oom import clear_gradients, retry_on_oom
from minigrpo.training.preflight_findings import (
    Figures,
    PreflightFinding,
    PromptLengths,
    find_faults,
    find_warnings,
    is_decided,
    is_informative,
    is_truncated,
)
from minigrpo.training.prompt_sampler import PromptSampler
from minigrpo.types import Completion, Engine, Grade, Group, Prompt, Sampling, Task
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.json_values import json_ready
from minigrpo.utils.memory import peak_bytes

ENOUGH_GROUPS = 8
"""The fewest groups to sample: with 8, at least one differs 24 times in 25 where every third group does."""

DEFAULT_SECONDS = 120.0
"""Seconds of sampling after which no further rollout is begun."""

QUICK_SECONDS = 10.0
"""A first rollout that is quicker than this is followed by a second, because warming up makes up much of its time."""

MEASURED_SECONDS = 5.0
"""Seconds of training passes that are timed."""

MEASURED_PROMPTS = 1024
"""Prompts, evenly spaced, that are rendered to measure their length: a second or two."""


@dataclass(frozen=True, slots=True)
class PreflightResult:
    """`go`: nothing was found that would keep training from working. `reasons` block, `warnings` do not.

    `warms`: there are reasons, and a warm start would mend them all. `after_warmup`: the recipe has that warm-up, and
    it is still to come. `interrupted`: the user stopped the sampling, so the figures are those of what had been
    sampled.
    """

    go: bool
    warms: bool
    reasons: tuple[PreflightFinding, ...]
    warnings: tuple[str, ...]
    figures: Figures
    samples: tuple[dict[str, Any], ...]
    interrupted: bool = False
    after_warmup: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def preflight(
    recipe: Recipe,
    task: Task,
    policy: Any,
    engine: Engine,
    report: Report = no_report,
    *,
    seconds: float = DEFAULT_SECONDS,
) -> PreflightResult:
    """Sample, judge and time some groups. The policy is left unchanged.

    Ctrl-C ends the sampling, and what has been sampled is judged; before the first completion has ended, it ends all.
    """
    prompts = prompts_of(task, "train")
    lengths = measure_prompts(prompts, policy, recipe.rollout.max_tokens)
    plan = plan_of_run(policy, recipe, lengths.longest)
    sampled = sample_groups(recipe, task, policy, engine, prompts, report=report, seconds=seconds)
    pass_seconds = None
    if not sampled.interrupted:
        report(0, 0, f"{sampled.completions} completions sampled; timing a training pass")
        release_caches(engine)
        pass_seconds = seconds_per_pass(policy, sampled.groups[-recipe.rollout.prompts :], recipe)
    figures = compute_figures(sampled, recipe, pass_seconds=pass_seconds, prompts=lengths, plan=plan)
    if task.gold is not None:
        golds = [count_tokens(policy.tokenizer, gold_answer(task, group.prompt)) for group in sampled.groups]
        figures = replace(figures, shortest_gold=min(golds), longest_gold=max(golds))
    reasons = tuple(find_faults(figures, sampled.groups, recipe, task))
    warnings = (*policy.warnings, *(str(finding) for finding in find_warnings(figures, recipe, task)))
    warms = bool(reasons) and all(reason.warms for reason in reasons)
    samples = pick_samples(sampled.groups)
    return PreflightResult(not reasons, warms, reasons, warnings, figures, samples, sampled.interrupted)


@dataclass(frozen=True, slots=True)
class SampledGroups:
    """Groups sampled with a recipe's settings, and the seconds of each whole rollout."""

    groups: tuple[Group, ...]
    seconds: tuple[float, ...]
    decided: bool
    interrupted: bool = False

    @property
    def completions(self) -> int:
        return sum(len(group.completions) for group in self.groups)

    @property
    def rollout_seconds(self) -> float | None:
        """Mean seconds of a rollout, without the first where there are others: it pays for warming up."""
        return fmean(self.seconds[1:] or self.seconds) if self.seconds else None


def sample_groups(
    recipe: Recipe,
    task: Task,
    policy: Any,
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    report: Report,
    seconds: float,
) -> SampledGroups:
    """Roll out training prompts, one step's worth at a time, until the groups decide or the time is up."""
    config = recipe.rollout
    sampler = PromptSampler(prompts, recipe.seed)
    groups: list[Group] = []
    times: list[float] = []
    ended: dict[int, tuple[Completion, ...]] = {}
    asked: Sequence[Prompt] = ()

    def report_tokens(done: int, total: int = 0, note: str = "") -> None:
        report(0, 0, f"{len(groups) * config.completions + done} completions sampled; {note}")

    with Grader.of(task, recipe.task) as grader:
        sample = partial(rollout, engine, task, n=config.completions, tokenizer=policy.tokenizer, grader=grader)
        try:
            while not _is_enough(groups, times, recipe.groups, seconds):
                asked, start = sampler.take(config.prompts), time.perf_counter()
                ended.clear()
                sampling = Sampling(config.temperature, config.max_tokens, seed=recipe.seed + len(times))
                groups += sample(asked, sampling=sampling, report=report_tokens, observe=ended.__setitem__)
                times.append(time.perf_counter() - start)
        except KeyboardInterrupt:
            groups += [_judge_ended(task, policy, asked[index], own) for index, own in sorted(ended.items())]
            if not groups:
                raise
            return SampledGroups(tuple(groups), tuple(times), is_decided(groups, recipe.groups), interrupted=True)
    return SampledGroups(tuple(groups), tuple(times), is_decided(groups, recipe.groups))


def _is_enough(groups: Sequence[Group], times: Sequence[float], config: GroupsConfig, seconds: float) -> bool:
    """Return whether the groups decide, or another rollout would end after `seconds`."""
    if not times:
        return False
    if sum(times) + times[-1] > seconds:
        return True
    timed = len(times) > 1 or times[0] > QUICK_SECONDS
    return timed and len(groups) >= ENOUGH_GROUPS and is_decided(groups, config)


def _judge_ended(task: Task, policy: Any, prompt: Prompt, completions: tuple[Completion, ...]) -> Group:
    """Make a group of completions that had all ended when their rollout was interrupted."""
    own = with_opening(policy.tokenizer, prompt, completions)
    return Group(prompt, render(policy.tokenizer, prompt).ids, own, judge_group(task, prompt, own))


def count_tokens(tokenizer: Any, answer: str) -> int:
    """Return the tokens that a model samples for an answer: its text, and the one that ends it."""
    return len(tokenizer(answer, add_special_tokens=False).input_ids) + 1


def measure_prompts(prompts: Sequence[Prompt], policy: Any, max_tokens: int) -> PromptLengths:
    """Measure prompt lengths, and the share that leaves no room for a completion of maximal length."""
    every = max(1, len(prompts) // MEASURED_PROMPTS)
    lengths = [len(render(policy.tokenizer, prompt).ids) for prompt in prompts[::every]]
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return PromptLengths(max(lengths), None, 0.0)
    return PromptLengths(max(lengths), int(context), fmean(length + max_tokens > context for length in lengths))


def compute_figures(
    sampled: SampledGroups, recipe: Recipe, *, pass_seconds: float | None, prompts: PromptLengths, plan: Plan | None
) -> Figures:
    groups, rollout_seconds = sampled.groups, sampled.rollout_seconds
    grades = [grade for group in groups for grade in group.grades]
    completions = [completion for group in groups for completion in group.completions]
    rewards = [grade.reward for grade in grades if grade.scored]
    informative = fmean(is_informative(group, recipe.groups) for group in groups)
    mean_tokens = fmean(len(completion.token_ids) for completion in completions)
    step_tokens = mean_tokens * recipe.rollout.prompts * recipe.rollout.completions
    # Groups that tie skip their training pass, unless a KL term pulls on every token.
    trained = 1.0 if recipe.objective.kl or recipe.objective.entropy else informative
    step_seconds = None
    if pass_seconds is not None and rollout_seconds is not None:
        sampling_seconds = rollout_seconds * rollouts_per_step(recipe.groups, informative)
        step_seconds = sampling_seconds + trained * pass_seconds * passes_per_step(recipe)
    peak = peak_bytes("cuda") or peak_bytes()
    return Figures(
        groups=len(groups),
        completions=len(completions),
        formed=fmean(grade.formed for grade in grades),
        solved=fmean(grade.solved for grade in grades),
        reward_mean=fmean(rewards) if rewards else None,
        reward_std=pstdev(rewards) if rewards else None,
        unscored=1 - len(rewards) / len(grades),
        group_spread=fmean(group.spread for group in groups),
        informative=informative,
        truncated=fmean(is_truncated(completion) for completion in completions),
        prompts=prompts,
        mean_tokens=mean_tokens,
        tokens_per_second=None if rollout_seconds is None else step_tokens / max(rollout_seconds, 1e-9),
        rollout_seconds=rollout_seconds,
        pass_seconds=pass_seconds,
        step_seconds=step_seconds,
        training_seconds=None if step_seconds is None else recipe.train.last_step * step_seconds,
        peak_memory_gb=peak / 1e9 if peak else None,
        planned_memory_gb=plan.peak / 1e9 if plan else None,
        short_of_memory=plan is not None and not plan.fits,
        decided=sampled.decided,
    )


def rollouts_per_step(config: GroupsConfig, informative: float) -> float:
    """Return the rollouts of a step: one, and those that resample tied groups."""
    extra_rollouts = (1 - informative) / max(informative, LOWEST_RATE)
    return 1 + min(config.resample, extra_rollouts)


def passes_per_step(recipe: Recipe) -> float:
    """Return the training passes of a step.

    One without a backward pass (the reference, a look at entropies) is a third of one.
    """
    extra_passes = (recipe.objective.kl > 0) + (recipe.objective.top_entropy < 1)
    return recipe.train.inner_epochs + extra_passes / 3


def seconds_per_pass(policy: Any, groups: Sequence[Group], recipe: Recipe) -> float:
    """Time forward and backward over one step's groups. Longest micro-batch first: memory runs out here, not later.

    Gradients are dropped, and nothing else of the policy changes.
    """
    objective = OBJECTIVES[recipe.objective.name]
    # As if a KL term pulled on every token: groups that tie would otherwise be left out.
    batch = replace(
        pack([with_all_scored(group) for group in groups], objective, recipe.rollout.max_tokens), needs_all=True
    )
    budget, clear = tokens_per_pass(policy, recipe), partial(clear_gradients, policy)
    micro_batches = batch.split(budget)
    parts = sorted(micro_batches, key=lambda micro_batch: -micro_batch.tokens)
    seconds, _ = retry_on_oom(partial(_time_passes, policy, objective), parts, budget, clear=clear)
    clear()
    return seconds


def _time_passes(policy: Any, objective: Objective, parts: Sequence[MicroBatch]) -> float:
    """Return the seconds of all passes, from the first ones."""
    tokens, start = 0, time.perf_counter()
    for micro_batch in parts:
        objective.loss(policy.logprobs(micro_batch, step=0).logprobs_N, micro_batch).total.backward()
        tokens += micro_batch.tokens
        if time.perf_counter() - start > MEASURED_SECONDS:
            break
    synchronize_device(policy.device)
    return (time.perf_counter() - start) * sum(micro_batch.tokens for micro_batch in parts) / tokens


def with_all_scored(group: Group) -> Group:
    """Give unscored completions the reward 0: only the time of a pass is measured."""
    return replace(group, grades=tuple(g if g.scored else replace(g, reward=0.0) for g in group.grades))


def synchronize_device(device: Any) -> None:
    """Wait for a GPU's queued kernels, without which timings mean nothing."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def pick_samples(groups: Sequence[Group]) -> tuple[dict[str, Any], ...]:
    """Return the best completion, the worst, and a truncated one, for the user to read."""
    listed = [(g, c, r) for g in groups for c, r in zip(g.completions, g.grades, strict=True)]
    by_reward = sorted(listed, key=lambda each: each[2].reward if each[2].scored else -math.inf)
    chosen = {"best": by_reward[-1], "worst": by_reward[0]}
    for each in listed:
        if is_truncated(each[1]):
            chosen.setdefault("cut off", each)
    return tuple(sample_to_dict(name, *each) for name, each in chosen.items())


def sample_to_dict(name: str, group: Group, completion: Completion, grade: Grade) -> dict[str, Any]:
    return {
        "which": name,
        "prompt": group.prompt.messages[-1]["content"],
        "target": json_ready(group.prompt.target),
        "text": completion.answer,
        "reward": grade.reward if grade.scored else None,
        "parts": {name: amount if math.isfinite(amount) else None for name, amount in grade.parts.items()},
        "formed": grade.formed,
        "solved": grade.solved,
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
    }
