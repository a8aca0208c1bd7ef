"""Keep a policy from becoming certain too early: the weight of the entropy bonus, and which tokens are learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minigrpo.config.schema import ObjectiveConfig

BONUS_STRIDES = 20
"""Steps in which an adaptive bonus goes from nothing to its largest weight."""


@dataclass(frozen=True, slots=True)
class EntropyBonus:
    """The weight of the entropy bonus from step to step.

    With a target it rises by a stride after every step whose entropy was at or below it, sinks after the others, and
    counts only while entropy is at or below it: c_{k+1} = c_k +- stride, alpha_k = c_k [e_k <= target]. Skywork-OR1,
    arXiv 2505.22312, section 4.5.
    """

    largest: float
    target: float | None
    adaptive_weight: float = 0.0
    last_entropy: float = math.inf

    @classmethod
    def of(cls, config: ObjectiveConfig) -> EntropyBonus:
        return cls(config.entropy, config.entropy_target)

    @property
    def weight(self) -> float:
        if self.target is None:
            return self.largest
        return self.adaptive_weight if self.last_entropy <= self.target else 0.0

    def after(self, entropy: float | None) -> EntropyBonus:
        """Return the bonus of the next step. `entropy`: of this step, in nats, or None where nothing was scored."""
        if self.target is None or entropy is None:
            return self
        stride = self.largest / BONUS_STRIDES * (1 if entropy <= self.target else -1)
        return replace(
            self, adaptive_weight=min(max(self.adaptive_weight + stride, 0.0), self.largest), last_entropy=entropy
        )


def chosen_tokens(
    entropies: Sequence[Tensor],
    counted: Sequence[Tensor],
    share: float,
    *,
    of_batch: Callable[[Tensor], Tensor] = lambda known_N: known_N,
) -> list[Tensor]:
    """Tell for each token whether it is in the `share` of highest entropy among the `counted` tokens of the batch.

    One mask for each micro-batch. `of_batch`: completes the entropies, where others have the rest of the batch.

    These forking tokens carry what is learned: "Beyond the 80/20 Rule", arXiv 2506.01939, equation 6.
    """
    pairs = list(zip(entropies, counted, strict=True))
    known_N = of_batch(torch.cat([entropy_N[counted_N] for entropy_N, counted_N in pairs]) if pairs else torch.zeros(0))
    if not len(known_N):
        return list(counted)
    threshold = torch.quantile(known_N.float(), 1 - share).to(known_N.dtype)
    return [(entropy_N >= threshold) & counted_N for entropy_N, counted_N in pairs]
