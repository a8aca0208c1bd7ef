"""Count each pass and each rollout once, however many plans ask for it: on meta tensors a count takes seconds.

A run plans three times before its first step (rows, tokens per pass, the trial pass), for one model and one recipe.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from minigrpo.algorithms.packing import MicroBatch
from minigrpo.config.schema import Recipe
from minigrpo.models.policy import Policy
from minigrpo.rollouts.engines.decoder import decoder_supports
from minigrpo.training.memory.meta import PassCost, UnplannableError, meta_policy, training_pass
from minigrpo.training.memory.rollout_cost import (
    RolloutCost,
    RolloutShape,
    native_rollout_cost,
    slot_rollout_cost,
    transformers_rollout_cost,
)

ROLLOUT_COSTS = {
    "native": native_rollout_cost,
    "slots": slot_rollout_cost,
    "transformers": transformers_rollout_cost,
}
KEPT = 2
"""Models whose counts are kept: that of the run, and one that a plan is asked for beside it."""


class Counts:
    """What passes and rollouts of one model take under one recipe. `bare`: the model on meta tensors."""

    def __init__(self, config: Any, recipe: Recipe, dtype: torch.dtype, device: str) -> None:
        self._config, self._recipe, self._dtype, self._device = copy.deepcopy(config), recipe, dtype, device
        self.bare = self._policy(recompute=False)
        self._passes: dict[tuple[bool, int, int, int], PassCost] = {}
        self._rollouts: dict[tuple[str, RolloutShape], RolloutCost] = {}

    def _policy(self, *, recompute: bool) -> Policy:
        return meta_policy(self._config, self._recipe, self._dtype, device=self._device, recompute=recompute)

    def training(self, micro_batch: MicroBatch, *, recompute: bool) -> PassCost:
        """Return the cost of a forward and backward pass over groups that all have one shape.

        Raises UnplannableError.
        """
        groups = micro_batch.groups
        key = recompute, len(groups), len(groups[0].prompt_ids), micro_batch.tokens
        if key not in self._passes:
            self._passes[key] = training_pass(
                self._policy(recompute=True) if recompute else self.bare,
                micro_batch,
                self._device,
                entropy_learns=self._recipe.objective.entropy > 0,
            )
        return self._passes[key]

    def rollout(self, engine: str, shape: RolloutShape) -> RolloutCost:
        """Return the cost of one batch whose completions all reach the limit. Raises UnplannableError."""
        if (engine, shape) not in self._rollouts:
            count = ROLLOUT_COSTS[engine] if decoder_supports(self.bare.model) else transformers_rollout_cost
            try:
                cost = count(self.bare, shape, self._recipe.rollout.temperature, self._device)
            except (NotImplementedError, RuntimeError) as fault:
                raise UnplannableError(str(fault).splitlines()[0]) from fault
            self._rollouts[engine, shape] = cost
        return self._rollouts[engine, shape]


_kept: dict[tuple[str, ...], Counts] = {}


def counts_of(config: Any, recipe: Recipe, dtype: torch.dtype, device: str) -> Counts:
    """Return the counts of this model under this recipe, those of an earlier plan where there was one.

    Raises RecipeError where lora.targets fits no layer, ModelError where no model can be made of the config.
    """
    attention = str(getattr(config, "_attn_implementation", None))
    # What differs between the plans of one run, and changes no count.
    fixed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens_per_pass": 0, "memory": None})})
    key = (config.to_json_string(use_diff=False), attention, repr(fixed.model_dump()), str(dtype), device)
    counts = _kept.pop(key, None) or Counts(config, fixed, dtype, device)
    _kept[key] = counts  # the newest last
    while len(_kept) > KEPT:
        del _kept[next(iter(_kept))]
    return counts
