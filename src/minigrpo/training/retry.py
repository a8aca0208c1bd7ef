"""Retry an update where memory ran out (smaller passes) or float16 overflowed (smaller loss scale)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from minigrpo.algorithms.packing import MicroBatch
from minigrpo.distributed.ranks import ALONE, Ranks
from minigrpo.models.policy import Policy
from minigrpo.training.oom import clear_gradients, retry_on_oom

AccumulateGradient = Callable[[Sequence[MicroBatch]], tuple[list[MicroBatch], dict[str, float]]]
StepOptimizer = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Update:
    """One finished update: its micro-batches, their largest size in tokens, and its metrics.

    `skipped`: whether the gradient was not finite, so that no weight changed.
    """

    micro_batches: list[MicroBatch]
    tokens_per_pass: int
    figures: dict[str, float]
    skipped: bool


def update_with_retries(
    policy: Policy,
    accumulate: AccumulateGradient,
    step_optimizer: StepOptimizer,
    micro_batches: Sequence[MicroBatch],
    tokens_per_pass: int,
    *,
    ranks: Ranks = ALONE,
) -> Update:
    """Accumulate the gradient of the micro-batches, add up that of all ranks, and step the optimizer.

    Where float16 overflowed, the pass is done again with a smaller loss scale: a rollout costs more than a pass.
    Raises RecipeError where memory runs out and no smaller pass is left.
    """
    scale_before = policy.loss_scale
    while True:
        clear = partial(clear_gradients, policy)
        (done, sums), tokens_per_pass = retry_on_oom(
            accumulate, micro_batches, tokens_per_pass, clear=clear, can_cut=not policy.is_sharded
        )
        micro_batches = done
        sums = ranks.add_up(policy.replicated, sums)
        norm = step_optimizer() if sums else 0.0
        finite = math.isfinite(norm)
        if finite and sums:
            policy.loss_scale = policy.loss_scale.after_success()
        if not finite and policy.loss_scale.can_fall and math.isfinite(sums["loss"]):
            policy.loss_scale = policy.loss_scale.after_overflow()
            continue
        if not finite or not sums:
            policy.loss_scale = scale_before  # it was not the scale
        return Update(done, tokens_per_pass, sums | {"grad_norm": norm, "skipped": float(not finite)}, not finite)
