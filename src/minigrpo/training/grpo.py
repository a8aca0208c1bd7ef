"""GRPO (Shao et al., "DeepSeekMath", arXiv 2402.03300), top to bottom.

Where it departs from the paper, unless a recipe says otherwise: there is no KL term and so no reference model
(kl = 0); one update per batch, so the ratio starts at 1 exactly and `old` needs no pass of its own; groups whose
siblings all tie are left out of the passes (they count in the weights all the same); a group is one row of tokens
with its prompt once (algorithms/packing.py).

Shapes: P prompts, G siblings, N scored tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minigrpo.algorithms.entropy import chosen_tokens
from minigrpo.algorithms.length_penalty import with_overlong_penalty
from minigrpo.algorithms.objective import Objective, open_objective
from minigrpo.algorithms.packing import Batch, MicroBatch, pack
from minigrpo.config.schema import Recipe
from minigrpo.models.context import check_prompts, longest_prompt
from minigrpo.models.policy import Policy
from minigrpo.models.quantize import eight_bit_adamw
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.groups import prompts_of, rollout
from minigrpo.runs.logger import RunLogger
from minigrpo.training.group_source import GroupSource, StepGroups
from minigrpo.training.metrics import Clock, batch_metrics, group_metrics
from minigrpo.training.oom import clear_gradients, rehearse, retry_on_oom
from minigrpo.training.prompt_sampler import PromptSampler, split_held_out
from minigrpo.training.supervisor import Supervisor
from minigrpo.types import Engine, Group, Prompt, Sampling, Task
from minigrpo.utils.process import process_settings
from minigrpo.utils.rng import name_key
from minigrpo.utils.signals import finish_first


@process_settings()
def grpo(recipe: Recipe, task: Task, policy: Policy, engine: Engine, track: RunLogger) -> None:
    """Train the policy; the run's folder is the track's. Begins where the newest checkpoint ends, if there is one."""
    G, longest = recipe.rollout.completions, recipe.rollout.max_tokens
    objective = open_objective(recipe, sixteen_bit=policy.dtype in (torch.bfloat16, torch.float16))
    optimizer = open_optimizer(recipe, policy)
    training, held_out = split_held_out(prompts_of(task, "train"), recipe)
    check_prompts([*training, *held_out], policy.tokenizer, longest, policy.model)
    source = GroupSource(PromptSampler(training, recipe.seed, recipe.groups), recipe.rollout.prompts, recipe.groups)
    keeper = Supervisor(recipe, track, policy, optimizer, source)
    prompt = longest_prompt(training, policy.tokenizer)
    start = keeper.restore(prompt, getattr(engine, "rows", 0))
    rises = rehearse(policy, objective, recipe, prompt, keeper)
    engine.update(policy)
    with track, Grader.of(task, recipe.task, track.say) as grader, finish_first() as interrupted:
        asking = RolloutContext(engine, task, policy.tokenizer, grader, recipe)
        for step in range(start, recipe.train.steps):
            clock = Clock(policy.device.type)

            # 1. Sample G completions of P prompts from the policy as it is now, and grade their text.
            ask = partial(asking.groups, n=G, sampling=sampling_at(recipe, step))
            gathered = source.gather(step, ask, teaches=partial(teaches, objective, longest))
            clock.lap("rollout")

            # 2. Compare siblings: advantages, and weights over the whole batch.
            batch = pack(gathered.groups, objective, longest)

            # 3. Improve. Weights are shares of the whole batch, so micro-batches add up exactly.
            rate, knobs = learning_rate(recipe, step), recipe.train
            pace = UpdateConfig(step, keeper.budget, rate, knobs.grad_norm, knobs.inner_epochs)
            with keeper.updating(rises, step):
                weighed = replace(objective, entropy=keeper.bonus.weight)
                figures, budget = improve(policy, optimizer, weighed, batch, pace)
            keeper.shrink(budget)
            clock.lap("update")
            engine.update(policy)
            clock.lap("sync")

            # 4. Record, save; stop where the numbers can no longer be used.
            metrics = step_metrics(gathered, batch, figures)
            if recipe.eval.every and (step + 1) % recipe.eval.every == 0:
                metrics |= held_out_metrics(asking.groups(held_out, n=1, sampling=Sampling(0.0, longest)))
                clock.lap("eval")
            metrics |= clock.metrics(gathered.sampled)
            keeper.record(step + 1, metrics, gathered, batch)
            stop = interrupted()
            keeper.settle(step + 1, last=stop or step + 1 == recipe.train.steps)
            if stop:
                return
    keeper.finish()
    engine.update(policy)


@dataclass(frozen=True, slots=True)
class RolloutContext:
    """Who answers and who judges: all that is needed to turn prompts into graded groups."""

    engine: Engine
    task: Task
    tokenizer: Any
    grader: Grader
    recipe: Recipe

    def groups(self, prompts: Sequence[Prompt], *, n: int, sampling: Sampling) -> list[Group]:
        groups = rollout(
            self.engine, self.task, prompts, n=n, sampling=sampling, tokenizer=self.tokenizer, grader=self.grader
        )
        return with_overlong_penalty(groups, self.recipe.objective.overlong, self.recipe.rollout.max_tokens)


def teaches(objective: Objective, longest: int, group: Group) -> bool:
    """Whether the group's siblings differ in what the objective compares."""
    return pack([group], objective, longest).teaches


@dataclass(frozen=True, slots=True)
class UpdateConfig:
    """How a batch is used: `budget` tokens a pass, `epochs` updates of learning rate `rate` and norm up to `limit`."""

    step: int
    budget: int
    rate: float
    limit: float
    epochs: int


def improve(
    policy: Policy, optimizer: torch.optim.Optimizer, objective: Objective, batch: Batch, pace: UpdateConfig
) -> tuple[dict[str, float], int]:
    """One update for each inner epoch; the figures of the loss, means over the epochs, and the tokens per pass with
    which the batch went through: fewer than `pace.budget` where memory ran out.

    `old` is what the first epoch's pass found before any update: it needs no pass of its own, and there the ratio is
    1 exactly.
    """
    budget = pace.budget
    parts = list(batch.split(budget)) if batch.moves else []
    if objective.top_entropy < 1:
        choose = partial(with_chosen_tokens, policy, objective, step=pace.step)
        parts, budget = retry_on_oom(choose, parts, budget, clear=partial(clear_gradients, policy))
    epochs: list[dict[str, float]] = []
    for _ in range(pace.epochs):
        parts, sums, norm, budget = update(policy, optimizer, objective, parts, replace(pace, budget=budget))
        finite = math.isfinite(norm)
        epochs.append(sums | {"grad_norm": norm, "skipped": float(not finite)})
        if not finite:
            break
    means = {name: sum(epoch[name] for epoch in epochs) / len(epochs) for name in epochs[0]}
    # Engine and policy are compared where both had the same weights: before the first update.
    before = {name: epochs[0][name] for name in SAMPLED if name in epochs[0]}
    skipped = float(any(epoch["skipped"] for epoch in epochs))
    return means | before | {"learning_rate": pace.rate, "skipped": skipped}, budget


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    parts: Sequence[MicroBatch],
    pace: UpdateConfig,
) -> tuple[list[MicroBatch], dict[str, float], float, int]:
    """One update; what `accumulate` returns, the norm of the gradient, and the tokens per pass that had room.

    A pass whose scaled loss overflowed float16 is done again with a smaller scale: a rollout costs more than a pass.
    """
    before, budget = policy.loss_scale, pace.budget
    while True:
        whole = partial(accumulate, policy, objective, step=pace.step)
        (parts, sums), budget = retry_on_oom(whole, parts, budget, clear=partial(clear_gradients, policy))
        norm = optimise(policy, optimizer, pace.rate, pace.limit) if parts else 0.0
        if math.isfinite(norm):
            policy.loss_scale = policy.loss_scale.after_success() if parts else before
            return list(parts), sums, norm, budget
        if not (policy.loss_scale.can_fall and math.isfinite(sums["loss"])):
            policy.loss_scale = before  # it was not the scale
            return list(parts), sums, norm, budget
        policy.loss_scale = policy.loss_scale.after_overflow()


def accumulate(
    policy: Policy, objective: Objective, parts: Sequence[MicroBatch], *, step: int
) -> tuple[list[MicroBatch], dict[str, float]]:
    """Add the gradient of the whole batch, micro-batch by micro-batch; the figures of the loss, summed likewise.

    Returns the micro-batches with `old` and `ref` filled in, for further epochs.
    """
    done: list[MicroBatch] = []
    sums: dict[str, Tensor] = {}
    for part in parts:
        if objective.kl > 0 and part.ref_N is None:
            part = replace(part, ref_N=policy.reference(part))
        scores = policy.logprobs(part, step=step, entropy_learns=objective.entropy > 0)
        loss = objective.loss(scores.logprobs_N, part, scores.entropy_N)
        policy.loss_scale.scaled(loss.total).backward()
        for name, value in {**loss.figures, **sampler_gap(scores, part)}.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach().cpu()
        done.append(part if part.old_N is not None else replace(part, old_N=scores.logprobs_N.detach()))
    return done, {name: float(total) for name, total in sums.items()}


def with_chosen_tokens(
    policy: Policy, objective: Objective, parts: Sequence[MicroBatch], step: int
) -> list[MicroBatch]:
    """The tokens of highest entropy of the whole batch: which they are, only a pass over all of it can tell."""
    with torch.no_grad():
        entropies = [policy.logprobs(part, step=step).entropy_N for part in parts]
    counted = [(part.shares_N > 0).to(entropy_N.device) for part, entropy_N in zip(parts, entropies, strict=True)]
    chosen = chosen_tokens(entropies, counted, objective.top_entropy)
    count = sum(int(chosen_N.sum()) for chosen_N in chosen)
    return [
        replace(part, chosen_N=chosen_N, shares_N=chosen_N / count)
        for part, chosen_N in zip(parts, chosen, strict=True)
    ]


SAMPLED = ("gap_sum", "entropy_sum", "scored_tokens")


def sampler_gap(scores: Any, part: MicroBatch) -> dict[str, Tensor]:
    """Sums over tokens: how far engine and policy disagree on what was sampled, and the policy's entropy."""
    gap_N = (scores.logprobs_N.detach() - part.engine_N.to(scores.logprobs_N)).abs()
    count = torch.tensor(float(len(gap_N)))
    return {"gap_sum": gap_N.sum(), "entropy_sum": scores.entropy_N.detach().sum(), "scored_tokens": count}


def optimise(policy: Policy, optimizer: torch.optim.Optimizer, rate: float, limit: float) -> float:
    """One AdamW step on the accumulated gradient; returns its norm. A gradient that is not finite is thrown away."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    policy.loss_scale.unscale(trained)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, limit))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over a share of the steps, then constant, or falling to 0 (linear, cosine) at the last step."""
    knobs = recipe.train
    rising = math.ceil(knobs.warmup * knobs.steps)
    if step < rising:
        return knobs.lr * (step + 1) / rising
    done = (step - rising) / max(1, knobs.steps - rising)
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return knobs.lr * fall[knobs.schedule]


def sampling_at(recipe: Recipe, step: int) -> Sampling:
    """Every step has a random stream of its own, so a resumed run needs none restored."""
    return Sampling(recipe.rollout.temperature, recipe.rollout.max_tokens, name_key(recipe.seed, "rollout", step))


def open_optimizer(recipe: Recipe, policy: Policy) -> torch.optim.Optimizer:
    """AdamW with the defaults of its paper; one kernel for all parameters."""
    knobs: dict[str, Any] = {"lr": recipe.train.lr, "betas": (0.9, 0.999), "weight_decay": recipe.train.weight_decay}
    if recipe.train.optimizer == "adamw8bit":
        return eight_bit_adamw(policy.trainable, **knobs)
    return torch.optim.AdamW(policy.trainable, **knobs, fused=True)


def step_metrics(gathered: StepGroups, batch: Batch, figures: Mapping[str, float]) -> dict[str, float]:
    """Progress is judged by the groups that were not chosen for what they earned."""
    metrics = group_metrics(gathered.fair) | dict(gathered.figures) | batch_metrics(batch, figures)
    if gathered.figures.get("replayed_groups") and "engine_gap" in metrics:
        # An older policy sampled some of these tokens: the gap says nothing of the engine.
        metrics["off_policy_gap"] = metrics.pop("engine_gap")
    return metrics


def held_out_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How the likeliest answers to prompts that are never trained on fare."""
    figures = group_metrics(groups)
    return {f"eval/{name}": figures[name] for name in ("accuracy", "reward", "format")}
