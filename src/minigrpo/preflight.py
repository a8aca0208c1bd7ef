"""Before any hour is spent: sample the real task with the real settings, and say whether training could work.

A group teaches only where its siblings earn different rewards. What makes all of them earn the same shows in a few
groups; `findings` says what mends it.

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

from minigrpo.config import Recipe
from minigrpo.findings import Figures, Finding, PromptLengths, cut, faults, teaches, worries
from minigrpo.grader import Grader
from minigrpo.objective import OBJECTIVES
from minigrpo.packing import pack
from minigrpo.plan import Plan, plan_of_run, tokens_per_pass
from minigrpo.progress import Report, no_report
from minigrpo.render import render
from minigrpo.rollout import prompts_of, rollout
from minigrpo.sampler import PromptSampler
from minigrpo.teaching import LOWEST_RATE
from minigrpo.types import Completion, Engine, Grade, Group, Prompt, Sampling, Task

ENOUGH_GROUPS = 8
"""Groups looked at, at least: with 8, a task whose groups teach one time in three is seen to teach 24 times in 25."""

MEASURED_SECONDS = 5.0

MEASURED_PROMPTS = 1024
"""So many prompts, evenly spaced, are rendered to learn how long they are: a second or two."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`go`: nothing was found that would keep training from working. `reasons` block, `warnings` do not.

    `warms`: there are reasons, and a warm start would mend them all.
    """

    go: bool
    warms: bool
    reasons: tuple[Finding, ...]
    warnings: tuple[str, ...]
    figures: Figures
    samples: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def preflight(recipe: Recipe, task: Task, policy: Any, engine: Engine, report: Report = no_report) -> Verdict:
    """Leaves the policy as it was."""
    knobs = recipe.rollout
    asked = prompts_of(task, "train")
    lengths = measured_prompts(asked, policy, knobs.max_tokens)
    plan = plan_of_run(policy, recipe, lengths.longest)
    sampler = PromptSampler(asked, recipe.seed)
    # Two rollouts at least: the first pays for warming up, so only the later ones are timed.
    rollouts = max(2, -(-ENOUGH_GROUPS // knobs.prompts))
    groups: list[Group] = []
    seconds: list[float] = []
    with Grader.of(task, recipe.task) as grader:
        ask = partial(rollout, engine, task, n=knobs.completions, tokenizer=policy.tokenizer, grader=grader)
        for step in range(rollouts):
            sampling = Sampling(knobs.temperature, knobs.max_tokens, seed=recipe.seed + step)
            prompts = sampler.take(knobs.prompts)
            start = time.perf_counter()
            groups += ask(prompts, sampling=sampling)
            seconds.append(time.perf_counter() - start)
            report(step + 1, rollouts, f"{len(groups)} groups")
    pass_seconds = seconds_per_pass(policy, groups[-knobs.prompts :], recipe)
    figures = figures_of(
        groups,
        recipe,
        rollout_seconds=fmean(seconds[1:]),
        pass_seconds=pass_seconds,
        prompts=lengths,
        plan=plan,
    )
    reasons = tuple(faults(figures, groups, recipe, task))
    warnings = (*policy.warnings, *(str(finding) for finding in worries(figures, recipe, task)))
    warms = bool(reasons) and all(reason.warms for reason in reasons)
    return Verdict(not reasons, warms, reasons, warnings, figures, evidence(groups))


def measured_prompts(prompts: Sequence[Prompt], policy: Any, max_tokens: int) -> PromptLengths:
    """How long the training prompts are, and how many of them leave no room for a completion of the longest kind."""
    every = max(1, len(prompts) // MEASURED_PROMPTS)
    lengths = [len(render(policy.tokenizer, prompt).ids) for prompt in prompts[::every]]
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return PromptLengths(max(lengths), None, 0.0)
    return PromptLengths(max(lengths), int(context), fmean(length + max_tokens > context for length in lengths))


def figures_of(
    groups: Sequence[Group],
    recipe: Recipe,
    *,
    rollout_seconds: float,
    pass_seconds: float,
    prompts: PromptLengths,
    plan: Plan | None = None,
) -> Figures:
    grades = [grade for group in groups for grade in group.grades]
    completions = [completion for group in groups for completion in group.completions]
    rewards = [grade.reward for grade in grades if grade.scored]
    informative = fmean(teaches(group, recipe) for group in groups)
    mean_tokens = fmean(len(completion.token_ids) for completion in completions)
    step_tokens = mean_tokens * recipe.rollout.prompts * recipe.rollout.completions
    # Groups that tie skip their training pass, unless a KL term pulls on every token.
    trained = 1.0 if recipe.objective.kl or recipe.objective.entropy else informative
    step_seconds = rollout_seconds * rollouts_a_step(recipe, informative) + trained * pass_seconds * passes(recipe)
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
        truncated=fmean(cut(completion) for completion in completions),
        prompts=prompts,
        mean_tokens=mean_tokens,
        tokens_per_second=step_tokens / max(rollout_seconds, 1e-9),
        rollout_seconds=rollout_seconds,
        pass_seconds=pass_seconds,
        step_seconds=step_seconds,
        training_seconds=recipe.train.steps * step_seconds,
        peak_memory_gb=peak_memory_gb(),
        planned_memory_gb=plan.peak / 1e9 if plan else None,
        short_of_memory=plan is not None and not plan.fits,
    )


def rollouts_a_step(recipe: Recipe, informative: float) -> float:
    """One, and what is tried in place of the groups that tie."""
    wanted = (1 - informative) / max(informative, LOWEST_RATE)
    return 1 + min(recipe.groups.resample, wanted)


def passes(recipe: Recipe) -> float:
    """Training passes of a step; one without a backward pass (the reference, a look at entropies) is a third of one."""
    looks = (recipe.objective.kl > 0) + (recipe.objective.top_entropy < 1)
    return recipe.train.inner_epochs + looks / 3


def seconds_per_pass(policy: Any, groups: Sequence[Group], recipe: Recipe) -> float:
    """Time of forward and backward over one step's groups. Longest part first: memory runs out here, not later.

    Gradients are dropped, and nothing else of the policy changes.
    """
    objective = OBJECTIVES[recipe.objective.name]
    # As if a KL term pulled on every token: groups that tie would otherwise be left out.
    batch = replace(pack([all_scored(group) for group in groups], objective, recipe.rollout.max_tokens), needs_all=True)
    parts = sorted(batch.split(tokens_per_pass(policy, recipe)), key=lambda part: -part.tokens)
    tokens, start = 0, time.perf_counter()
    for part in parts:
        objective.loss(policy.logprobs(part, step=0).logprobs_N, part).total.backward()
        tokens += part.tokens
        if time.perf_counter() - start > MEASURED_SECONDS:
            break
    finish_queued(policy.device)
    elapsed = time.perf_counter() - start
    for parameter in policy.trainable:
        parameter.grad = None
    return elapsed * sum(part.tokens for part in parts) / tokens


def all_scored(group: Group) -> Group:
    """A reward that could not be told counts as none: only the time of a pass is asked for."""
    return replace(group, grades=tuple(g if g.scored else replace(g, reward=0.0) for g in group.grades))


def finish_queued(device: Any) -> None:
    """A GPU works behind the program's back; times mean nothing before it is done."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_memory_gb() -> float | None:
    """Largest memory held so far: the GPU's where there is one, else this process's; None where it cannot be told."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def evidence(groups: Sequence[Group]) -> tuple[dict[str, Any], ...]:
    """The best completion, the worst, and one that was cut off: read them before believing a verdict."""
    listed = [(g, c, r) for g in groups for c, r in zip(g.completions, g.grades, strict=True)]
    by_reward = sorted(listed, key=lambda each: each[2].reward if each[2].scored else -math.inf)
    chosen = {"best": by_reward[-1], "worst": by_reward[0]}
    for each in listed:
        if cut(each[1]):
            chosen.setdefault("cut off", each)
    return tuple(sample(name, *each) for name, each in chosen.items())


def sample(name: str, group: Group, completion: Completion, grade: Grade) -> dict[str, Any]:
    return {
        "which": name,
        "prompt": group.prompt.messages[-1]["content"],
        "target": group.prompt.target,
        "text": completion.text,
        "reward": grade.reward if grade.scored else None,
        "parts": {name: amount if math.isfinite(amount) else None for name, amount in grade.parts.items()},
        "formed": grade.formed,
        "solved": grade.solved,
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
    }
