"""Before any hour is spent: sample the real task with the real settings, and say whether training could work.

A group teaches only where its siblings earn different rewards. What makes all of them earn the same (no answer has
the form, all are cut off, all are right) shows in a few groups, and each has a knob that mends it.

Not covered: a reward that can be earned without solving the task, and rates that fall later because completions grow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, pstdev
from typing import Any

from minigrpo.config import Recipe
from minigrpo.objective import OBJECTIVES, TIE
from minigrpo.packing import pack
from minigrpo.plan import tokens_per_pass
from minigrpo.rollout import PromptSampler, prompts_of, rollout
from minigrpo.types import Completion, Engine, Grade, Group, Sampling, Task

Report = Callable[[int, int, str], None]

ENOUGH_GROUPS = 8
"""Groups looked at, at least: with 8, a task whose groups teach one time in three is seen to teach 24 times in 25."""

MEASURED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen, and what to turn."""

    what: str
    change: str

    def __str__(self) -> str:
        return f"{self.what} {self.change}"


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares from 0 to 1, times in seconds; None where it could not be measured.

    `step_seconds` is what one training step will take: a rollout, and a training pass over the groups that teach.
    `pass_seconds` is that pass if all groups teach.
    """

    groups: int
    completions: int
    formed: float
    solved: float
    reward_mean: float
    reward_std: float
    group_spread: float
    informative: float
    truncated: float
    mean_tokens: float
    tokens_per_second: float
    rollout_seconds: float
    pass_seconds: float
    step_seconds: float
    training_seconds: float
    peak_memory_gb: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`go`: nothing was found that would keep training from working. `reasons` block, `warnings` do not."""

    go: bool
    reasons: tuple[Finding, ...]
    warnings: tuple[str, ...]
    figures: Figures
    samples: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def preflight(recipe: Recipe, task: Task, policy: Any, engine: Engine, report: Report | None = None) -> Verdict:
    """Leaves the policy as it was."""
    knobs = recipe.rollout
    sampler = PromptSampler(prompts_of(task, "train"), recipe.seed)
    # Two rollouts at least: the first pays for warming up, so only the later ones are timed.
    rollouts = max(2, -(-ENOUGH_GROUPS // knobs.prompts))
    groups: list[Group] = []
    seconds: list[float] = []
    for step in range(rollouts):
        sampling = Sampling(knobs.temperature, knobs.max_tokens, seed=recipe.seed + step)
        prompts = sampler.take(step, knobs.prompts)
        start = time.perf_counter()
        groups += rollout(engine, task, prompts, n=knobs.completions, sampling=sampling, tokenizer=policy.tokenizer)
        seconds.append(time.perf_counter() - start)
        if report:
            report(step + 1, rollouts, f"{len(groups)} groups")
    pass_seconds = seconds_per_pass(policy, groups[-knobs.prompts :], recipe)
    figures = figures_of(groups, recipe, rollout_seconds=fmean(seconds[1:]), pass_seconds=pass_seconds)
    reasons = tuple(faults(figures, groups, recipe))
    warnings = (*policy.warnings, *(str(finding) for finding in worries(figures, recipe)))
    return Verdict(not reasons, reasons, warnings, figures, evidence(groups))


def figures_of(groups: Sequence[Group], recipe: Recipe, *, rollout_seconds: float, pass_seconds: float) -> Figures:
    grades = [grade for group in groups for grade in group.grades]
    completions = [completion for group in groups for completion in group.completions]
    rewards = [grade.reward for grade in grades]
    informative = fmean(teaches(group) for group in groups)
    mean_tokens = fmean(len(completion.token_ids) for completion in completions)
    step_tokens = mean_tokens * recipe.rollout.prompts * recipe.rollout.completions
    # Groups that tie skip their training pass, unless a KL term pulls on every token.
    trained = 1.0 if recipe.objective.kl else informative
    step_seconds = rollout_seconds + trained * pass_seconds
    return Figures(
        groups=len(groups),
        completions=len(completions),
        formed=fmean(grade.formed for grade in grades),
        solved=fmean(grade.solved for grade in grades),
        reward_mean=fmean(rewards),
        reward_std=pstdev(rewards),
        group_spread=fmean(group.spread for group in groups),
        informative=informative,
        truncated=fmean(cut(completion) for completion in completions),
        mean_tokens=mean_tokens,
        tokens_per_second=step_tokens / max(rollout_seconds, 1e-9),
        rollout_seconds=rollout_seconds,
        pass_seconds=pass_seconds,
        step_seconds=step_seconds,
        training_seconds=recipe.train.steps * step_seconds,
        peak_memory_gb=peak_memory_gb(),
    )


def teaches(group: Group) -> bool:
    return group.spread > TIE


def cut(completion: Completion) -> bool:
    return completion.finish == "length"


def seconds_per_pass(policy: Any, groups: Sequence[Group], recipe: Recipe) -> float:
    """Time of forward and backward over one step's groups. Longest part first: memory runs out here, not later.

    Gradients are dropped, and nothing else of the policy changes.
    """
    objective = OBJECTIVES[recipe.objective.name]
    # As if a KL term pulled on every token: groups that tie would otherwise be left out.
    batch = replace(pack(groups, objective, recipe.rollout.max_tokens), needs_all=True)
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


def faults(figures: Figures, groups: Sequence[Group], recipe: Recipe) -> list[Finding]:
    """Why training could not work: the cause nearest to the model first, and nothing that follows from it."""
    limit = recipe.rollout.max_tokens
    if always_cut(figures):
        return [
            Finding(
                f"{figures.truncated:.0%} of the completions were cut off at {limit} tokens.",
                f"Let them finish: --rollout.max_tokens {2 * limit}. If the model never stops, its chat template or "
                "eos token does not fit it: use the instruct version.",
            )
        ]
    if figures.formed == 0:
        return [
            Finding(
                f"Not one of {figures.completions} completions has the form that the task asks for.",
                "Show the form in the system prompt with one worked example, use an instruct model, or warm the model "
                "up on a few written answers; GRPO can only strengthen what the model already does sometimes.",
            )
        ]
    if figures.informative == 0:
        return [tied(figures, groups, recipe)]
    return []


def always_cut(figures: Figures) -> bool:
    """A task may pay for unfinished answers; then being cut off is no reason to stop."""
    return figures.truncated > 0.95 and figures.solved == 0


def tied(figures: Figures, groups: Sequence[Group], recipe: Recipe) -> Finding:
    """Why every group's siblings earn the same, and what separates them again."""
    what = f"In all {figures.groups} groups the siblings earned the same reward, so there is nothing to compare."
    if figures.solved == 1:
        return Finding(what, "The model already solves every prompt: choose a harder task.")
    more = 2 * recipe.rollout.completions
    if all(len({completion.text for completion in group.completions}) == 1 for group in groups):
        return Finding(what, "Siblings say the same, too: raise --rollout.temperature, or use a less certain model.")
    if figures.solved == 0:
        return Finding(
            what,
            "The answers have the form and none is right: make the task easier, give part of the reward for part of "
            f"the way, use a stronger model, or look longer for a lucky one: --rollout.completions {more}.",
        )
    return Finding(
        what, f"Prompts are either always or never solved: mix the difficulty, or --rollout.completions {more}."
    )


def worries(figures: Figures, recipe: Recipe) -> list[Finding]:
    """What will make training slow or lame, without keeping it from working."""
    found = []
    if figures.truncated > 0.2 and not always_cut(figures):
        found.append(
            Finding(
                f"{figures.truncated:.0%} of the completions were cut off at {recipe.rollout.max_tokens} tokens.",
                f"They earn what an unfinished answer earns; if they were on the right way: "
                f"--rollout.max_tokens {2 * recipe.rollout.max_tokens}.",
            )
        )
    if 0 < figures.formed < 0.1:
        found.append(
            Finding(
                f"Only {figures.formed:.0%} of the completions have the form.",
                "The first steps will teach the form alone; one worked example in the system prompt speeds that up.",
            )
        )
    if 0 < figures.informative < 0.25:
        found.append(
            Finding(
                f"Only {figures.informative:.0%} of the groups teach anything.",
                f"More siblings find more differences: --rollout.completions {2 * recipe.rollout.completions}.",
            )
        )
    if 0.9 < figures.solved < 1:
        found.append(Finding(f"{figures.solved:.0%} of the completions are right already.", "Little is left to learn."))
    return found


def evidence(groups: Sequence[Group]) -> tuple[dict[str, Any], ...]:
    """The best completion, the worst, and one that was cut off: read them before believing a verdict."""
    listed = [(g, c, r) for g in groups for c, r in zip(g.completions, g.grades, strict=True)]
    by_reward = sorted(listed, key=lambda each: each[2].reward)
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
        "reward": grade.reward,
        "parts": dict(grade.parts),
        "formed": grade.formed,
        "solved": grade.solved,
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
    }
