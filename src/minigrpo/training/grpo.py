"""GRPO (Shao et al., "DeepSeekMath", arXiv 2402.03300), top to bottom.

A step samples G completions of each of P prompts, grades them, compares the completions of one prompt (siblings) with
one another, and moves the policy towards those that earned more.

Departures from the paper, unless a recipe says otherwise:
- No KL term, so no reference model (kl = 0).
- One update per batch, so the ratio p_new / p_old is exactly 1, and `old` needs no pass of its own.
- A group whose siblings all earn the same has no gradient: no pass is spent on it, but it counts in the weights.
- A group is one row of tokens in which its prompt stands once, and no padding.

Names from elsewhere:
    Engine        samples completions from the policy's weights (rollouts/engines/)
    Group         a prompt, its G completions and their grades (types.py)
    Objective     how rewards become advantages, lengths weights, and ratios a loss (algorithms/objective.py)
    pack, Batch   the groups of a step with advantages and weights; `split` cuts it (algorithms/packing.py)
    MicroBatch    the tokens of one pass through the model, with what the loss needs to know of each
    Policy        base model and adapter; `logprobs` scores the tokens of a MicroBatch (models/policy.py)
    Supervisor    what surrounds the algorithm: rollouts, log, checkpoints, alarms, memory (training/supervisor.py)

Shapes: P prompts, G siblings, N scored tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minigrpo.algorithms.objective import Objective, open_objective
from minigrpo.algorithms.packing import Batch, MicroBatch, pack
from minigrpo.config.schema import Recipe, TrainConfig
from minigrpo.models.policy import Policy
from minigrpo.models.quantize import eight_bit_adamw
from minigrpo.runs.logger import RunLogger
from minigrpo.training.metrics import epoch_means, sampler_gap
from minigrpo.training.retry import update_with_retries
from minigrpo.training.supervisor import Supervisor
from minigrpo.training.top_entropy import select_top_entropy
from minigrpo.types import Engine, Task
from minigrpo.utils.process import process_settings


@process_settings()
def grpo(recipe: Recipe, task: Task, policy: Policy, engine: Engine, logger: RunLogger) -> None:
    """Train the policy. Begins where the newest checkpoint of the logger's run ends, if there is one.

    Raises DivergenceError where training has broken the model.
    """
    objective = open_objective(recipe, sixteen_bit=policy.dtype in (torch.bfloat16, torch.float16))
    optimizer = open_optimizer(recipe.train, policy)
    with Supervisor(
        recipe, task, policy, engine, optimizer=optimizer, objective=objective, logger=logger
    ) as supervisor:
        for step in supervisor.steps():
            # 1. Sample G completions of each of P prompts from the policy as it is now, and grade their text.
            sampled = supervisor.sample_groups(step)

            # 2. Compare siblings: advantages, and weights over the whole batch.
            batch = pack(sampled.groups, objective, recipe.rollout.max_tokens)

            # 3. Improve the policy. Weights are shares of the whole batch, so micro-batches add up exactly.
            config = UpdateConfig(
                step,
                tokens_per_pass=supervisor.tokens_per_pass,
                lr=learning_rate(recipe.train, step),
                max_grad_norm=recipe.train.grad_norm,
                epochs=recipe.train.inner_epochs,
            )
            with supervisor.update_phase(step):
                with_bonus = replace(objective, entropy=supervisor.entropy_weight)
                figures, tokens_per_pass = improve(policy, optimizer, with_bonus, batch, config)
            engine.update(policy)

            # 4. Log the step; save; stop where the numbers can no longer be used.
            supervisor.finish_step(step, sampled, batch, figures, tokens_per_pass=tokens_per_pass)


@dataclass(frozen=True, slots=True)
class UpdateConfig:
    """How a step uses its batch: in passes of how many tokens, for how many updates, how large ones."""

    step: int
    tokens_per_pass: int
    lr: float
    max_grad_norm: float
    epochs: int


def improve(
    policy: Policy, optimizer: torch.optim.Optimizer, objective: Objective, batch: Batch, config: UpdateConfig
) -> tuple[dict[str, float], int]:
    """Update the policy once per inner epoch.

    Returns the figures of the loss, means over the epochs, and the tokens per pass that memory had room for.
    `old` is what the first epoch's pass finds before any update.
    """
    tokens_per_pass = config.tokens_per_pass
    micro_batches = list(batch.split(tokens_per_pass)) if batch.moves else []
    if objective.top_entropy < 1:
        select = partial(select_top_entropy, policy, objective, step=config.step)
        micro_batches, tokens_per_pass = select(micro_batches, tokens_per_pass)
    epochs: list[dict[str, float]] = []
    for _ in range(config.epochs):
        # The gradient of the whole batch, then one step of the optimizer. Where memory runs out it is done again in
        # smaller passes, and where float16 overflows with a smaller loss scale: the update is the same.
        gradient = partial(accumulate_gradient, policy, objective, step=config.step)
        descend = partial(step_optimizer, policy, optimizer, config)
        update = update_with_retries(policy, gradient, descend, micro_batches, tokens_per_pass)
        micro_batches, tokens_per_pass = update.micro_batches, update.tokens_per_pass
        epochs.append(update.figures)
        if update.skipped:
            break
    return epoch_means(epochs) | {"learning_rate": config.lr}, tokens_per_pass


def accumulate_gradient(
    policy: Policy, objective: Objective, micro_batches: Sequence[MicroBatch], *, step: int
) -> tuple[list[MicroBatch], dict[str, float]]:
    """Add up the gradient of the whole batch, micro-batch by micro-batch.

    Returns the micro-batches with `old` and `ref` filled in, for further epochs, and the figures of the loss, summed.
    """
    done: list[MicroBatch] = []
    sums: dict[str, Tensor] = {}
    for micro_batch in micro_batches:
        if objective.kl > 0 and micro_batch.ref_N is None:
            micro_batch = replace(micro_batch, ref_N=policy.reference(micro_batch))
        scores = policy.logprobs(micro_batch, step=step, entropy_learns=objective.entropy > 0)
        loss = objective.loss(scores.logprobs_N, micro_batch, scores.entropy_N)
        policy.loss_scale.scaled(loss.total).backward()
        for name, value in {**loss.figures, **sampler_gap(scores, micro_batch)}.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.detach().cpu()
        if micro_batch.old_N is None:
            micro_batch = replace(micro_batch, old_N=scores.logprobs_N.detach())
        done.append(micro_batch)
    return done, {name: float(total) for name, total in sums.items()}


def step_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, config: UpdateConfig) -> float:
    """Clip the accumulated gradient and take one step. Returns its norm; one that is not finite is thrown away."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    policy.loss_scale.unscale(trained)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = config.lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def open_optimizer(config: TrainConfig, policy: Policy) -> torch.optim.Optimizer:
    """Open AdamW with the defaults of its paper (arXiv 1711.05101), one kernel for all parameters."""
    options: dict[str, Any] = {"lr": config.lr, "betas": (0.9, 0.999), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        return eight_bit_adamw(policy.trainable, **options)
    return torch.optim.AdamW(policy.trainable, **options, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rise linearly over the warm-up; then stay constant, or fall to 0 (linear, cosine) at the last step."""
    rising = math.ceil(config.warmup * config.steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    done = (step - rising) / max(1, config.steps - rising)
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.lr * fall[config.schedule]
