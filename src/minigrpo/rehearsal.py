"""The longest pass that a run could meet, before its first step: where memory runs out, it does so now."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from minigrpo.budget import largest_part
from minigrpo.config import Recipe
from minigrpo.objective import Objective
from minigrpo.packing import Part
from minigrpo.plan import free_memory, plan_of
from minigrpo.policy import Policy
from minigrpo.shadow import UnplannableError
from minigrpo.shortage import TIGHT, with_room


def rehearse(policy: Policy, objective: Objective, recipe: Recipe, prompt: int, keeper: Any) -> int:
    """Bytes that an update takes at its height. A pass of the largest shape goes forward and back, its gradient is
    thrown away, and the keeper's budget is halved until it can.

    On a CPU it is spared where memory is ample. `prompt`: tokens of the longest prompt.
    """
    try:
        fixed = recipe.train.model_copy(update={"tokens_per_pass": keeper.budget})
        plan = plan_of(policy, recipe.model_copy(update={"train": fixed}), prompt)
        rises = plan.update_rises + plan.line("optimizer")
    except UnplannableError:
        rises = 1 << 62
    if policy.device.type == "cpu" and rises * TIGHT <= free_memory(policy.device):
        return rises
    vocabulary = policy.model.config.get_text_config().vocab_size
    parts = [largest_part(recipe, prompt, keeper.budget, vocabulary)]
    with keeper.updating(rises, -1):
        work = partial(_forward_and_back, policy, objective)
        _, budget = with_room(work, parts, keeper.budget, clear=partial(clear_gradients, policy))
    clear_gradients(policy)
    keeper.shrink(budget)
    return rises


def _forward_and_back(policy: Policy, objective: Objective, parts: Sequence[Part]) -> None:
    for part in parts:
        scores = policy.logprobs(part, step=0, entropy_learns=objective.entropy > 0)
        (scores.logprobs_N.sum() + (scores.entropy_N.sum() if objective.entropy > 0 else 0.0)).backward()


def clear_gradients(policy: Policy) -> None:
    """Throw away what a pass added."""
    for parameter in policy.trainable:
        parameter.grad = None
