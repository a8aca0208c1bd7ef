"""Sample the task with the real settings before training, and say whether training could work.

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

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import pack
from minigrpo.config.schema import GroupsConfig, Recipe, RolloutConfig, WarmupConfig
from minigrpo.models.chat_template import render
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.groups import prompts_of, rollout
from minigrpo.training.group_source import LOWEST_RATE
from minigrpo.training.memory.machine import Plan, plan_of_run, tokens_per_pass
from minigrpo.training.prompt_sampler import PromptSampler
from minigrpo.types import Completion, Engine, Grade, Group, Prompt, Sampling, Task
from minigrpo.ui.progress import Report, no_report
from minigrpo.utils.memory import peak_bytes

ENOUGH_GROUPS = 8
"""The fewest groups to sample: with 8, at least one differs 24 times in 25 where every third group does."""

MEASURED_SECONDS = 5.0

MEASURED_PROMPTS = 1024
"""Prompts, evenly spaced, that are rendered to measure their length: a second or two."""


@dataclass(frozen=True, slots=True)
class PreflightResult:
    """`go`: nothing was found that would keep training from working. `reasons` block, `warnings` do not.

    `warms`: there are reasons, and a warm start would mend them all.
    """

    go: bool
    warms: bool
    reasons: tuple[PreflightFinding, ...]
    warnings: tuple[str, ...]
    figures: Figures
    samples: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def preflight(recipe: Recipe, task: Task, policy: Any, engine: Engine, report: Report = no_report) -> PreflightResult:
    """Sample, judge and time a few groups. The policy is left unchanged."""
    config = recipe.rollout
    training_prompts = prompts_of(task, "train")
    lengths = measure_prompts(training_prompts, policy, config.max_tokens)
    plan = plan_of_run(policy, recipe, lengths.longest)
    sampler = PromptSampler(training_prompts, recipe.seed)
    # Two rollouts at least: the first pays for warming up, so only the later ones are timed.
    rollouts = max(2, -(-ENOUGH_GROUPS // config.prompts))
    groups: list[Group] = []
    seconds: list[float] = []
    with Grader.of(task, recipe.task) as grader:
        sample_groups = partial(rollout, engine, task, n=config.completions, tokenizer=policy.tokenizer, grader=grader)
        for step in range(rollouts):
            sampling = Sampling(config.temperature, config.max_tokens, seed=recipe.seed + step)
            prompts = sampler.take(config.prompts)
            start = time.perf_counter()
            groups += sample_groups(prompts, sampling=sampling)
            seconds.append(time.perf_counter() - start)
            report(step + 1, rollouts, f"{len(groups)} groups")
    pass_seconds = seconds_per_pass(policy, groups[-config.prompts :], recipe)
    figures = compute_figures(
        groups,
        recipe,
        rollout_seconds=fmean(seconds[1:]),
        pass_seconds=pass_seconds,
        prompts=lengths,
        plan=plan,
    )
    reasons = tuple(find_faults(figures, groups, recipe, task))
    warnings = (*policy.warnings, *(str(finding) for finding in find_warnings(figures, recipe, task)))
    warms = bool(reasons) and all(reason.warms for reason in reasons)
    return PreflightResult(not reasons, warms, reasons, warnings, figures, pick_samples(groups))


def measure_prompts(prompts: Sequence[Prompt], policy: Any, max_tokens: int) -> PromptLengths:
    """Measure prompt lengths, and the share that leaves no room for a completion of maximal length."""
    every = max(1, len(prompts) // MEASURED_PROMPTS)
    lengths = [len(render(policy.tokenizer, prompt).ids) for prompt in prompts[::every]]
    context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return PromptLengths(max(lengths), None, 0.0)
    return PromptLengths(max(lengths), int(context), fmean(length + max_tokens > context for length in lengths))


def compute_figures(
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
    informative = fmean(is_informative(group, recipe.groups) for group in groups)
    mean_tokens = fmean(len(completion.token_ids) for completion in completions)
    step_tokens = mean_tokens * recipe.rollout.prompts * recipe.rollout.completions
    # Groups that tie skip their training pass, unless a KL term pulls on every token.
    trained = 1.0 if recipe.objective.kl or recipe.objective.entropy else informative
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
        tokens_per_second=step_tokens / max(rollout_seconds, 1e-9),
        rollout_seconds=rollout_seconds,
        pass_seconds=pass_seconds,
        step_seconds=step_seconds,
        training_seconds=recipe.train.steps * step_seconds,
        peak_memory_gb=peak / 1e9 if peak else None,
        planned_memory_gb=plan.peak / 1e9 if plan else None,
        short_of_memory=plan is not None and not plan.fits,
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
    parts = sorted(batch.split(tokens_per_pass(policy, recipe)), key=lambda micro_batch: -micro_batch.tokens)
    tokens, start = 0, time.perf_counter()
    for micro_batch in parts:
        objective.loss(policy.logprobs(micro_batch, step=0).logprobs_N, micro_batch).total.backward()
        tokens += micro_batch.tokens
        if time.perf_counter() - start > MEASURED_SECONDS:
            break
    synchronize_device(policy.device)
    elapsed = time.perf_counter() - start
    for parameter in policy.trainable:
        parameter.grad = None
    return elapsed * sum(micro_batch.tokens for micro_batch in parts) / tokens


def with_all_scored(group: Group) -> Group:
    """Give unscored completions the reward 0: only the time of a pass is measured."""
    return replace(group, grades=tuple(g if g.scored else replace(g, reward=0.0) for g in group.grades))


def synchronize_device(device: Any) -> None:
    """Wait for a GPU's queued kernels, without which timings mean nothing."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


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
        "target": group.prompt.target,
        "text": completion.text,
        "reward": grade.reward if grade.scored else None,
        "parts": {name: amount if math.isfinite(amount) else None for name, amount in grade.parts.items()},
        "formed": grade.formed,
        "solved": grade.solved,
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
    }


WARMUP_STEPS = 60
"""Proposed where a recipe has no warm-up: enough to learn a form, too few to learn many answers by heart."""

LITTLE_FORM = 0.1


@dataclass(frozen=True, slots=True)
class PreflightFinding:
    """What was seen, and what to turn. `warms`: a warm start mends it."""

    what: str
    change: str
    warms: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.change}"


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Lengths of the training prompts in tokens. `crowded`: the share that leaves less than rollout.max_tokens of the
    context.

    `context`: the model's longest text, None where its configuration does not tell.
    """

    longest: int
    context: int | None
    crowded: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares from 0 to 1, times in seconds; None where it could not be measured.

    Rewards are those of the completions whose reward could be told.
    `step_seconds` is what one training step will take: a rollout, and a training pass over the groups that teach.
    `pass_seconds` is that pass if all groups teach. `planned_memory_gb`: what training will take at its height.
    """

    groups: int
    completions: int
    formed: float
    solved: float
    reward_mean: float | None
    reward_std: float | None
    unscored: float
    group_spread: float
    informative: float
    truncated: float
    prompts: PromptLengths
    mean_tokens: float
    tokens_per_second: float
    rollout_seconds: float
    pass_seconds: float
    step_seconds: float
    training_seconds: float
    peak_memory_gb: float | None
    planned_memory_gb: float | None = None
    short_of_memory: bool = False


def is_informative(group: Group, config: GroupsConfig) -> bool:
    return group.spread > config.min_spread


def is_truncated(completion: Completion) -> bool:
    return completion.finish == "length"


def find_faults(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> list[PreflightFinding]:
    """Return the reasons why training could not work."""
    rest = find_answer_faults(figures, groups, recipe, task)
    return [explain_long_prompts(figures, recipe.rollout.max_tokens), *rest] if figures.prompts.crowded else rest


def find_answer_faults(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> list[PreflightFinding]:
    """Return why the sampled answers teach nothing."""
    if figures.unscored == 1:
        return [
            PreflightFinding(
                f"The reward of none of the {figures.completions} completions could be told.",
                "Every reward function declined, or the grader took too long: see what it returns for the sample "
                f"above, or raise --task.seconds {2 * recipe.task.seconds:g}.",
            )
        ]
    if always_cut(figures):
        limit = recipe.rollout.max_tokens
        return [
            PreflightFinding(
                f"{figures.truncated:.0%} of the completions were cut off at {limit} tokens.",
                f"Let them finish: --rollout.max_tokens {2 * limit}. If the model never stops, its chat template or "
                f"eos token does not fit it: use the instruct version. {advise_warmup(recipe.warmup, task)}",
                warms=figures.formed == 0,
            )
        ]
    if figures.formed == 0:
        return [
            PreflightFinding(
                f"Not one of {figures.completions} completions has the form that the task asks for.",
                f"GRPO can only strengthen what the model already does sometimes. {advise_warmup(recipe.warmup, task)} "
                "Or show the form in the system prompt with one worked example, or use an instruct model.",
                warms=True,
            )
        ]
    if figures.informative == 0:
        return [explain_ties(figures, groups, recipe, task)]
    return []


def always_cut(figures: Figures) -> bool:
    """Return whether nearly all completions are cut off and none solves: a task may pay for unfinished answers.

    Then being cut off is no reason to stop.
    """
    return figures.truncated > 0.95 and figures.solved == 0


def advise_warmup(config: WarmupConfig, task: Task) -> str:
    """Return advice with the command for a supervised warm-up of this model on this task."""
    if config.steps:
        return (
            f"The recipe's warm-up comes next in `minigrpo run`; if these samples were taken after it, it was too "
            f"short: --warmup.steps {2 * config.steps}."
        )
    if task.gold is not None or config.data:
        return f"Warm it up on right answers first: minigrpo warmup RECIPE --warmup.steps {WARMUP_STEPS}"
    return (
        "Write some right answers down, as lines of JSON {prompt, completion}, and warm it up on them first: "
        f"minigrpo warmup RECIPE --warmup.data FILE --warmup.steps {WARMUP_STEPS}"
    )


def explain_long_prompts(figures: Figures, max_tokens: int) -> PreflightFinding:
    """Return the finding that a completion may run beyond the longest text that the model can read."""
    context, longest = figures.prompts.context or 0, figures.prompts.longest
    room = context - longest
    cure = f"--rollout.max_tokens {room} fits them all, or shorten" if room > 0 else "Shorten or leave out"
    return PreflightFinding(
        f"{figures.prompts.crowded:.0%} of the prompts leave less than rollout.max_tokens {max_tokens} "
        f"of the model's context of {context} tokens (the longest prompt has {longest}).",
        f"Beyond its context a model babbles: {cure} the longest prompts.",
    )


def explain_ties(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> PreflightFinding:
    """Return the finding that every group's siblings earn the same, with what makes them differ."""
    what = f"In all {figures.groups} groups the siblings earned the same reward, so there is nothing to compare."
    if figures.solved == 1:
        return PreflightFinding(what, "The model already solves every prompt: choose a harder task.")
    more = 2 * recipe.rollout.completions
    if all(len({completion.text for completion in group.completions}) == 1 for group in groups):
        return PreflightFinding(
            what, "Siblings say the same, too: raise --rollout.temperature, or use a less certain model."
        )
    if earn_like_gold(groups, task, recipe.groups):
        return PreflightFinding(
            what,
            f"Every completion earned {figures.reward_mean:g}, as much as the task's own right answers: choose a "
            "harder task, or let the reward tell better answers from good ones.",
        )
    if figures.solved == 0:
        return PreflightFinding(
            what,
            "The answers have the form and none is right: make the task easier, give part of the reward for part of "
            f"the way, use a stronger model, or look longer for a lucky one: --rollout.completions {more}. If the "
            f"{figures.reward_mean:g} that they earned is the most that the reward pays, choose a harder task.",
        )
    return PreflightFinding(
        what, f"Prompts are either always or never solved: mix the difficulty, or --rollout.completions {more}."
    )


def earn_like_gold(groups: Sequence[Group], task: Task, config: GroupsConfig) -> bool:
    """Return whether no completion earned less than a right answer to its prompt; False where nobody can tell."""
    if task.gold is None:
        return False
    pairs = [(group, task.grade(group.prompt, task.gold(group.prompt))) for group in groups]
    return all(min(group.rewards) >= gold.reward - config.min_spread for group, gold in pairs)


def find_warnings(figures: Figures, recipe: Recipe, task: Task) -> list[PreflightFinding]:
    """Return what makes training slow or weak without keeping it from working."""
    warnings = []
    if 0 < figures.unscored < 1:
        warnings.append(
            PreflightFinding(
                f"The reward of {figures.unscored:.0%} of the completions could not be told.",
                "They are left out of their groups' comparisons; if the grader took too long: "
                f"--task.seconds {2 * recipe.task.seconds:g}.",
            )
        )
    if figures.short_of_memory:
        warnings.append(
            PreflightFinding(
                f"The whole training is planned to take {figures.planned_memory_gb:.1f} GB at its height, more than "
                "is free here.",
                "What takes it and what to turn: minigrpo plan RECIPE",
            )
        )
    if figures.truncated > 0.2 and not always_cut(figures):
        warnings.append(
            PreflightFinding(
                f"{figures.truncated:.0%} of the completions were cut off at {recipe.rollout.max_tokens} tokens.",
                f"They earn what an unfinished answer earns; if they were on the right way: "
                f"--rollout.max_tokens {2 * recipe.rollout.max_tokens}.",
            )
        )
    if 0 < figures.formed < LITTLE_FORM:
        warnings.append(
            PreflightFinding(
                f"Only {figures.formed:.0%} of the completions have the form.",
                f"The first steps would teach the form alone. {advise_warmup(recipe.warmup, task)} Or show one "
                "worked example in the system prompt.",
            )
        )
    return warnings + find_slow_learning(figures, recipe.rollout)


def find_slow_learning(figures: Figures, config: RolloutConfig) -> list[PreflightFinding]:
    """Return warnings that few groups differ, or that little is left to learn."""
    warnings = []
    if 0 < figures.informative < 0.25:
        warnings.append(
            PreflightFinding(
                f"Only {figures.informative:.0%} of the groups teach anything.",
                f"More siblings find more differences: --rollout.completions {2 * config.completions}.",
            )
        )
    if 0.9 < figures.solved < 1:
        warnings.append(
            PreflightFinding(f"{figures.solved:.0%} of the completions are right already.", "Little is left to learn.")
        )
    return warnings
