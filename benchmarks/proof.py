"""Prove that both sides compute the same: one batch through both, the adapter's gradients compared.

Always in float32, on all completions of the workload's first prompt. The adapter is moved away from zero first, or half
of its gradient would be zero on both sides.

A 3B takes 14 GB in float32, so both sides use one model in turn, and it is sampled from by transformers, which copies
no weights. What the rest takes is counted from the shapes first: where the activations have no room, both sides
recompute them; where the model has none, that is said before it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import ours, trls
from benchmarks.needed_memory import must_recompute
from benchmarks.sides import Setup, StepGate
from minigrpo.algorithms.objective import open_objective
from minigrpo.algorithms.packing import pack
from minigrpo.models.policy import open_policy, recompute_activations
from minigrpo.training.grpo import accumulate_gradient
from minigrpo.training.oom import clear_gradients
from minigrpo.types import Group

TOLERANCE = 1e-4
NOISE = 0.005
"""Size of the numbers by which the adapter is moved: a pretrained model still speaks. Noise of 0.02 makes a 0.5B
stammer, with a gradient 200 times as long, in which rounding to float32 alone comes to 2.6e-4; here it is 7e-6."""


@dataclass(frozen=True, slots=True)
class Proof:
    """`gap`: norm of the difference of the two gradients over the norm of TRL's. (The loss itself is 0 where ratios
    are 1 and advantages are centered: it would prove nothing.)"""

    gap: float
    tokens: int

    @property
    def holds(self) -> bool:
        return self.gap <= TOLERANCE


def run(setup: Setup, gate: StepGate) -> None:
    """Run as a side that takes no step: it only reports the proof."""
    gate.ready(asdict(prove(replace(setup, dtype="float32"))))


def prove(setup: Setup) -> Proof:
    recipe = ours.recipe_of(setup, lora__dropout=0.0)  # each side draws masks of its own
    torch.set_num_threads(setup.threads)
    recompute = must_recompute(setup, recipe)
    policy = open_policy(recipe)
    if recompute:
        recompute_activations(policy.model)
    move_from_zero(policy.trainable)
    groups = ours.first_batch(setup, policy, recipe)
    objective = open_objective(recipe, inexact_engine=False)
    batch = pack(groups, objective, setup.workload.limit)
    accumulate_gradient(policy, objective, list(batch.split(10**6)), step=0)
    mine = gradient(policy.model)
    clear_gradients(policy)
    backward_with_trl(setup, policy.model, groups)
    his = gradient(policy.model)
    gap = float((mine - his).norm() / his.norm())
    return Proof(gap, tokens=sum(len(c.token_ids) for group in groups for c in group.completions))


@torch.no_grad()
def move_from_zero(weights: Iterable[Tensor]) -> None:
    """Add the same numbers on any device: each has a generator of its own, with other numbers."""
    for weight in weights:
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        weight.add_(drawn.to(weight.device), alpha=NOISE)


def backward_with_trl(setup: Setup, model: Any, groups: list[Group]) -> None:
    """Accumulate TRL's gradient for these completions: it pads, rewards, compares and scores them itself."""
    model.get_base_model().set_attn_implementation("sdpa")
    rows = [(group, completion) for group in groups for completion in group.completions]
    answers = {
        "prompt_ids": [list(group.prompt_ids) for group, _ in rows],
        "completion_ids": [list(completion.token_ids) for _, completion in rows],
        "logprobs": None,
    }
    trainer = trls.open_trainer(setup, model, rollout_func=lambda prompts, trainer: dict(answers))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    asked = [trls.row(group.prompt) for group, _ in rows]
    inputs = trainer._generate_and_score_completions(asked)
    trainer.compute_loss(trainer.model, inputs).backward()


def gradient(model: Any) -> Tensor:
    """Return the gradient of all trainable parameters as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
