"""GRPO (Shao et al., "DeepSeekMath", arXiv 2402.03300), top to bottom.

A step samples G completions of each of P prompts, grades them, compares the completions of one prompt (siblings) with
one another, and moves the policy towards those that earned more.

As in the paper's experiments, a batch is used for one update, so the ratio p_new / p_old is exactly 1 and `old` needs
no pass of its own. Departures from the paper, unless a recipe says otherwise:
- A LoRA adapter is trained, not the whole model. Probabilities are taken at the sampling temperature.
- No KL term, so no reference model. With one, the reference is the model that training began with and stays so.
- Where the engine rounds differently from the policy (16-bit weights, vLLM), the policy term of each token is
  multiplied by p_old / p_engine, cut off at 2 (truncated importance sampling).
- The standard deviation of a group is taken over G - 1, plus 1e-4; the gradient's norm is clipped at 1.
- A group whose siblings all earn the same has no gradient, so no pass is spent on it (a KL term or an entropy bonus
  would give it one). Its completions are counted when the loss is divided by the number of completions.
- A group is one row of tokens in which its prompt stands once, and no padding.
- A recipe may sample the next step's groups while this step is updated, by the policy before the update
  (rollout.ahead, training/ahead.py). The same importance weights correct for it.
- Several processes, the ranks, may share the work of a step (docs/scale.md): each samples some of its groups, and
  passes some through the model; `ranks` adds up their gradients. A process that is alone exchanges nothing.

Names from elsewhere:
    Engine        samples completions from the policy's weights (rollouts/engines/)
    Group         a prompt, its G completions and their grades (types.py)
    Objective     how rewards become advantages, lengths weights, and ratios a loss (algorithms/objective.py)
    Batch         the groups of a step with advantages and weights; `split` cuts it (algorithms/packing.py)
    MicroBatch    the tokens of one pass through the model, with what the loss needs to know of each
    Policy        base model and adapter; `logprobs` computes those of a MicroBatch (models/policy.py)
    Supervisor    what surrounds the algorithm: rollouts, log, checkpoints, alarms, memory (training/supervisor.py)
    Ranks         this process among those that train the run, `ALONE` for most runs (distributed/ranks.py)

Log-probabilities of the sampled tokens: `old` by the policy before the first update of this batch, `ref` by the
reference model, `engine` by the engine that sampled them.

Shapes: P prompts, G siblings, N sampled tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minigrpo.algorithms.advantages import Rewards
from minigrpo.algorithms.objective import Objective, open_objective
from minigrpo.algorithms.packing import Batch, MicroBatch, weigh
from minigrpo.config.schema import Recipe, TrainConfig
from minigrpo.distributed.ranks import ALONE, Ranks
from minigrpo.models.policy import Policy
from minigrpo.models.quantize import eight_bit_adamw
from minigrpo.runs.logger import RankLog, RunLogger
from minigrpo.training.group_factor import scale_groups
from minigrpo.training.metrics import epoch_means, sampler_gap
from minigrpo.training.passes import own_micro_batches
from minigrpo.training.retry import update_with_retries
from minigrpo.training.supervisor import Supervisor
from minigrpo.training.top_entropy import select_top_entropy
from minigrpo.types import Engine, Task
from minigrpo.utils.process import process_settings


@process_settings()  # what the run sets for its process (threads, determinism, the heap) is restored at its end
def grpo(
    recipe: Recipe, task: Task, policy: Policy, engine: Engine, logger: RunLogger | RankLog, *, ranks: Ranks = ALONE
) -> None:
    """Train the policy, from the newest checkpoint in the logger's run folder if there is one.

    Raise DivergenceError where training has broken the model.
    """
    objective = open_objective(recipe, inexact_engine=policy.is_sixteen_bit or not engine.is_exact)
    optimizer = open_optimizer(recipe.train, policy)
    with Supervisor(
        recipe, task, policy, engine, optimizer=optimizer, objective=objective, logger=logger, ranks=ranks
    ) as supervisor:
        for step in supervisor.steps():
            # 1. Sample G completions of each of P prompts from the policy as it is now, and grade their text. A recipe
            #    may replace groups whose siblings all earn the same (dynamic sampling), and make long answers cost.
            sampled = supervisor.sample_groups(step)

            # 2. Compare siblings: in GRPO a completion's advantage is A = (reward - mean) / (std + 1e-4) of its group,
            #    or 0 where the rewards of the group differ by no more than `tie`. A what-if may leave a group out.
            advantages_PG = objective.advantages(Rewards.of(sampled.groups), objective.tie)
            advantages_PG = scale_groups(advantages_PG, sampled.groups, recipe.groups.factor, step + 1)

            # 3. Weigh each token: in GRPO by 1 / (completions in the batch * tokens of this completion). The weights
            #    are shares of the whole batch, so the gradients of micro-batches simply add up.
            batch = weigh(sampled.groups, advantages_PG, objective, recipe.rollout.max_tokens)

            # 4. Update the policy: minimise the sum over tokens of weight * -min(ratio * A, clip(ratio) * A), with a KL
            #    term or an entropy bonus where the recipe has one. Clipping acts from the second inner epoch on.
            settings = UpdateSettings(
                step,
                tokens_per_pass=supervisor.tokens_per_pass,
                lr=learning_rate(recipe.train, step),
                max_grad_norm=recipe.train.grad_norm,
                inner_epochs=recipe.train.inner_epochs,
            )
            with supervisor.update_phase(step):
                step_objective = replace(objective, entropy=supervisor.entropy_weight)  # the entropy bonus may adapt
                figures, tokens_per_pass = update_policy(
                    policy, optimizer, step_objective, batch, settings, ranks=ranks
                )
            engine.update(policy)  # from now on the engine samples with the new weights

            # 5. Log the step; save; stop where the numbers can no longer be used.
            supervisor.finish_step(step, sampled, batch, figures, tokens_per_pass=tokens_per_pass)


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """The settings of one step's updates: this step's learning rate, and the tokens per pass that memory allows."""

    step: int
    tokens_per_pass: int
    lr: float
    max_grad_norm: float
    inner_epochs: int


def update_policy(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batch: Batch,
    settings: UpdateSettings,
    *,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, float], int]:
    """Update the policy once per inner epoch (the paper's mu), each time with the gradient of the whole batch.

    Return the figures to log, means over the inner epochs, and the tokens per pass, fewer where memory ran out.
    """
    tokens_per_pass = settings.tokens_per_pass
    micro_batches = own_micro_batches(policy, batch, tokens_per_pass, ranks)
    if objective.top_entropy < 1:  # mark the tokens of highest entropy, the only ones to learn from: one more pass
        select = partial(select_top_entropy, policy, objective, step=settings.step, ranks=ranks)
        micro_batches, tokens_per_pass = select(micro_batches, tokens_per_pass)
    accumulate = partial(accumulate_gradient, policy, objective, step=settings.step)
    take_step = partial(step_optimizer, policy, optimizer, settings, ranks=ranks)
    figures: list[dict[str, float]] = []
    for _ in range(settings.inner_epochs):
        # Accumulate, add up over the ranks, then step. An update that runs out of memory is repeated in smaller passes,
        # one that overflows float16 with a smaller loss scale: the result is the same.
        update = update_with_retries(policy, accumulate, take_step, micro_batches, tokens_per_pass, ranks=ranks)
        micro_batches, tokens_per_pass = update.micro_batches, update.tokens_per_pass
        figures.append(update.figures)
        if update.skipped:  # the gradient was not finite, and another one from the same weights would not be either
            break
    return epoch_means(figures) | {"learning_rate": settings.lr}, tokens_per_pass


def accumulate_gradient(
    policy: Policy, objective: Objective, micro_batches: Sequence[MicroBatch], *, step: int
) -> tuple[list[MicroBatch], dict[str, float]]:
    """Add up the gradient of the whole batch, micro-batch by micro-batch.

    Return the micro-batches with `old` and `ref` filled in, for further inner epochs, and the figures of the loss,
    summed. `old` is what the first pass computes: nothing has been updated before it.
    """
    done: list[MicroBatch] = []
    sums: dict[str, Tensor] = {}
    for micro_batch in micro_batches:
        if objective.kl > 0 and micro_batch.ref_N is None:
            micro_batch = replace(micro_batch, ref_N=policy.reference(micro_batch))
        scores = policy.logprobs(micro_batch, step=step, entropy_learns=objective.entropy > 0)
        micro_batch = micro_batch.beside(scores.logprobs_N)
        loss = objective.loss(scores.logprobs_N, micro_batch, scores.entropy_N)
        policy.loss_scale.scaled(loss.total).backward()  # the scale is 1 except in float16
        for name, value in {**loss.figures, **sampler_gap(scores, micro_batch)}.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        if micro_batch.old_N is None:
            micro_batch = replace(micro_batch, old_N=scores.logprobs_N.detach())
        done.append(micro_batch)
    # Read in one piece and only now: a GPU is waited for once, not once for each figure of each pass.
    totals = torch.stack(list(sums.values())).tolist() if sums else []
    return done, dict(zip(sums, totals, strict=True))


def step_optimizer(
    policy: Policy, optimizer: torch.optim.Optimizer, settings: UpdateSettings, *, ranks: Ranks = ALONE
) -> float:
    """Clip the accumulated gradient, take one step with it, and return its norm before clipping.

    A gradient whose norm is not finite is dropped: no weight changes.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    policy.loss_scale.unscale(trained)
    norm = ranks.clip_gradient(trained, settings.max_grad_norm)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def open_optimizer(config: TrainConfig, policy: Policy) -> torch.optim.Optimizer:
    """Open AdamW (arXiv 1711.05101), with 8-bit moments where the recipe asks for them."""
    options: dict[str, Any] = {"lr": config.lr, "betas": (0.9, 0.999), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        return eight_bit_adamw(policy.trainable, **options)
    return torch.optim.AdamW(policy.trainable, **options, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return a step's learning rate: rising linearly in the warm-up, then constant or falling (linear, cosine).

    A falling rate is still above 0 in the last step; it would reach 0 one step later.
    """
    rising = math.ceil(config.warmup * config.steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    done = (step - rising) / max(1, config.steps - rising)
    fall = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.lr * fall[config.schedule]
