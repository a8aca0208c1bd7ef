"""GRPO (Shao et al., "DeepSeekMath", arXiv 2402.03300), top to bottom.

Where it departs from the paper, unless a recipe says otherwise: there is no KL term and so no reference model
(kl = 0); one update per batch, so the ratio starts at 1 exactly and `old` needs no pass of its own; groups whose
siblings all tie are left out of the passes (they count in the weights all the same); a group is one row of tokens
with its prompt once (packing.py).

Shapes: P prompts, G siblings, N scored tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minigrpo import checkpoint
from minigrpo.config import Recipe
from minigrpo.errors import DivergenceError
from minigrpo.interrupt import finish_first
from minigrpo.metrics import Clock, batch_metrics, group_metrics
from minigrpo.noise import name_key
from minigrpo.objective import OBJECTIVES, Objective
from minigrpo.packing import Batch, pack
from minigrpo.plan import tokens_per_pass
from minigrpo.policy import Policy
from minigrpo.rollout import PromptSampler, prompts_of, rollout
from minigrpo.rundir import RunDir
from minigrpo.track import Track
from minigrpo.types import Engine, Sampling, Task

PATIENCE = 5
"""Steps in a row whose gradient is not finite before the run stops."""


def grpo(recipe: Recipe, task: Task, policy: Policy, engine: Engine, track: Track) -> None:
    """Train the policy; the run's folder is the track's. Begins where the newest checkpoint ends, if there is one."""
    P, G = recipe.rollout.prompts, recipe.rollout.completions
    objective = open_objective(recipe, policy)
    optimizer = open_optimizer(recipe, policy)
    sampler = PromptSampler(prompts_of(task, "train"), recipe.seed)
    start, budget = restore(recipe, policy, optimizer, track)
    engine.update(policy)
    failures = 0
    with track, finish_first() as interrupted:
        for step in range(start, recipe.train.steps):
            clock = Clock()

            # 1. Sample G completions of P prompts from the policy as it is now, and grade their text.
            prompts = sampler.take(step, P)
            groups = rollout(engine, task, prompts, n=G, sampling=sampling_at(recipe, step), tokenizer=policy.tokenizer)
            clock.lap("rollout")

            # 2. Compare siblings: advantages, and weights over the whole batch.
            batch = pack(groups, objective, recipe.rollout.max_tokens)

            # 3. Improve. Weights are shares of the whole batch, so micro-batches add up exactly.
            figures = accumulate(policy, objective, batch, step, budget)
            rate = learning_rate(recipe, step)
            norm = optimise(policy, optimizer, rate, recipe.train.grad_norm) if batch.moves else 0.0
            clock.lap("update")
            engine.update(policy)
            clock.lap("sync")

            # 4. Record, save; stop where the numbers can no longer be used.
            failures = 0 if math.isfinite(norm) else failures + 1
            figures |= {"learning_rate": rate, "grad_norm": norm, "skipped": float(not math.isfinite(norm))}
            metrics = group_metrics(groups) | batch_metrics(batch, figures) | clock.metrics(groups)
            track.record(step + 1, metrics, groups, batch.advantages_PG.tolist())
            last = step + 1 == recipe.train.steps or interrupted()
            if (step + 1) % recipe.save.every == 0 or last:
                checkpoint.save(track.run, step + 1, policy, optimizer, track.positions())
                checkpoint.prune(track.run, recipe.save.keep)
            stop_if_diverged(failures, track.run)
            if interrupted():
                return


def accumulate(policy: Policy, objective: Objective, batch: Batch, step: int, budget: int) -> dict[str, float]:
    """Add the gradient of the whole batch, micro-batch by micro-batch; the figures of the loss, summed likewise."""
    totals: dict[str, Tensor] = {}
    for part in batch.split(budget) if batch.moves else ():
        scores = policy.logprobs(part, step=step)
        if objective.kl > 0:
            part = replace(part, ref_N=policy.reference(part))
        loss = objective.loss(scores.logprobs_N, part)
        loss.total.backward()
        for name, value in {**loss.figures, **sampler_gap(scores, part)}.items():
            totals[name] = totals.get(name, torch.zeros(())) + value.detach().cpu()
    return {name: float(total) for name, total in totals.items()}


def sampler_gap(scores: Any, part: Any) -> dict[str, Tensor]:
    """Sums over tokens: how far engine and policy disagree on what was sampled, and the policy's entropy."""
    gap_N = (scores.logprobs_N.detach() - part.engine_N.to(scores.logprobs_N)).abs()
    count = torch.tensor(float(len(gap_N)))
    return {"gap_sum": gap_N.sum(), "entropy_sum": scores.entropy_N.sum(), "scored_tokens": count}


def optimise(policy: Policy, optimizer: torch.optim.Optimizer, rate: float, limit: float) -> float:
    """One AdamW step on the accumulated gradient; returns its norm. A gradient that is not finite is thrown away."""
    norm = float(torch.nn.utils.clip_grad_norm_(policy.trainable, limit))
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


def open_objective(recipe: Recipe, policy: Policy) -> Objective:
    sixteen_bit = policy.dtype in (torch.bfloat16, torch.float16)
    return OBJECTIVES[recipe.objective.name].with_knobs(recipe.objective, sixteen_bit=sixteen_bit)


def open_optimizer(recipe: Recipe, policy: Policy) -> torch.optim.Optimizer:
    """AdamW with the defaults of its paper; one kernel for all parameters."""
    return torch.optim.AdamW(
        policy.trainable, lr=recipe.train.lr, betas=(0.9, 0.999), weight_decay=recipe.train.weight_decay, fused=True
    )


def restore(recipe: Recipe, policy: Policy, optimizer: Any, track: Track) -> tuple[int, int]:
    """(first step to do, tokens per pass). Makes the arithmetic repeatable; takes up the newest whole checkpoint."""
    if policy.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    run = track.run
    then = checkpoint.read_machine(run)
    if then is not None:
        torch.set_num_threads(then.threads)
    budget = then.tokens_per_pass if then else tokens_per_pass(policy, recipe)
    now = checkpoint.this_machine(budget, policy.device, policy.dtype)
    if then is None:
        checkpoint.write_machine(run, now)
    elif different := now.differences(then):
        track.say(f"Not the machine that began this run ({'; '.join(different)}): the last bits will differ.")
    found, complaints = checkpoint.latest(run)
    for complaint in complaints:
        track.say(complaint)
    track.rewind(found.positions if found else {})
    if not policy.shares_prompts:
        kind = policy.model.config.model_type
        track.say(f"{kind} may mix tokens outside attention: trained on one padded row per completion.")
    if found is None:
        return 0, budget
    checkpoint.load(found, policy, optimizer)
    track.say(f"Resumed after step {found.step} of {recipe.train.steps}.")
    return found.step, budget


def stop_if_diverged(failures: int, run: RunDir) -> None:
    if failures >= PATIENCE:
        raise DivergenceError(
            f"The gradient was not finite in {failures} steps in a row; the weights are those before them. "
            f"Their prompts and answers stand in {run.groups}. A lower --train.lr is the usual cure."
        )
