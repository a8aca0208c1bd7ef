"""How rewards become a loss: advantages, weights, the clipped surrogate, the KL penalty. A variant is a value.

Shapes: P prompts, G siblings, B = P * G completions, N scored tokens of all completions, one after the other.

Three kinds of past log-probability, never mixed up: `old` is the policy's own before the first update of this batch
and enters the ratio; `engine` is what the sampler reported and enters only the importance weight; `ref` is the
reference policy and enters only the KL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from minigrpo.config import ObjectiveKnobs

TIE = 1e-6
"""Rewards closer than this are the same reward: noise over a tiny deviation would pass for a huge advantage."""


class Scored(Protocol):
    """What the loss needs to know of N tokens besides their log-probabilities. None: not in play."""

    @property
    def advantages_N(self) -> Tensor: ...
    @property
    def weights_N(self) -> Tensor: ...
    @property
    def engine_N(self) -> Tensor: ...
    @property
    def old_N(self) -> Tensor | None: ...
    @property
    def ref_N(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Loss:
    """`total` is to be differentiated; `figures` are shares of it for the log, which add up over micro-batches."""

    total: Tensor
    figures: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """One member of the GRPO family.

    `advantages`: rewards_PG -> advantages_PG. `weights`: (lengths_B, longest allowed) -> the weight of each token of
    completion b; they are taken once over the whole sampled batch, so that every loss is a plain sum, and cutting
    the batch into micro-batches (or ranks) cannot change the gradient.
    """

    name: str
    advantages: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor, int], Tensor]
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    importance_cap: float | None = None

    def loss(self, logprobs_N: Tensor, part: Scored) -> Loss:
        """Weighted sum over tokens of -min(r A, clip(r) A) * importance + kl * k3."""
        advantages_N, weights_N = part.advantages_N.to(logprobs_N), part.weights_N.to(logprobs_N)
        old_N = logprobs_N.detach() if part.old_N is None else part.old_N
        ratio_N = torch.exp(logprobs_N - old_N)
        clipped_N = ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
        if self.importance_cap is not None:
            surrogate_N = surrogate_N * importance(old_N, part.engine_N.to(logprobs_N), self.importance_cap)
        total = (weights_N * surrogate_N).sum()
        figures = {
            "clip_ratio/low_mean": (weights_N * ((ratio_N < 1 - self.clip_low) & (advantages_N < 0))).sum(),
            "clip_ratio/high_mean": (weights_N * ((ratio_N > 1 + self.clip_high) & (advantages_N > 0))).sum(),
        }
        if part.ref_N is not None:
            penalty_N = k3(logprobs_N, part.ref_N)
            total = total + self.kl * (weights_N * penalty_N).sum()
            figures["kl"] = (weights_N * penalty_N).sum()
        return Loss(total, {"loss": total.detach(), **{name: value.detach() for name, value in figures.items()}})

    def with_knobs(self, knobs: ObjectiveKnobs, *, sixteen_bit: bool) -> Objective:
        """This objective as a recipe bends it. `sixteen_bit`: sampler and policy round differently."""
        corrected = knobs.importance not in ("auto", "off") or (knobs.importance == "auto" and sixteen_bit)
        return replace(
            self,
            clip_low=self.clip_low if knobs.clip_low is None else knobs.clip_low,
            clip_high=self.clip_high if knobs.clip_high is None else knobs.clip_high,
            kl=knobs.kl,
            importance_cap=knobs.importance_cap if corrected else None,
        )


def centered(rewards_PG: Tensor) -> Tensor:
    """R - mean of the group; exactly 0 where all siblings tie. Dr. GRPO, arXiv 2503.20783, section 3.2."""
    spread_P1 = rewards_PG.amax(1, True) - rewards_PG.amin(1, True)
    return torch.where(spread_P1 > TIE, rewards_PG - rewards_PG.mean(1, True), 0.0)


def standardized(rewards_PG: Tensor) -> Tensor:
    """(R - mean) / (std + 1e-4) in each group, std over G - 1. GRPO, arXiv 2402.03300, section 4.1.2."""
    return centered(rewards_PG) / (rewards_PG.std(1, keepdim=True) + 1e-4)


def per_sequence(lengths_B: Tensor, longest: int) -> Tensor:
    """Mean over a completion's tokens, then over completions. GRPO, arXiv 2402.03300, equation 3."""
    return 1.0 / (len(lengths_B) * lengths_B)


def per_token(lengths_B: Tensor, longest: int) -> Tensor:
    """Every token of the whole batch counts the same. DAPO, arXiv 2503.14476, equation 8."""
    return torch.ones_like(lengths_B) / lengths_B.sum()


def per_budget(lengths_B: Tensor, longest: int) -> Tensor:
    """Token sum over a constant, the longest completion allowed. Dr. GRPO, arXiv 2503.20783, section 3.2."""
    return torch.full_like(lengths_B, 1.0 / (len(lengths_B) * longest))


def k3(logprobs_N: Tensor, ref_N: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = ref - logp: never negative, unbiased for KL(policy || ref) on policy samples.

    Schulman, "Approximating KL divergence" (2020); GRPO, arXiv 2402.03300, equation 4.
    """
    d_N = ref_N - logprobs_N
    return torch.exp(d_N) - d_N - 1


def importance(old_N: Tensor, engine_N: Tensor, cap: float) -> Tensor:
    """min(p_policy / p_sampler, cap), a constant: samples came from the engine, whose rounding differs slightly.

    Truncated importance sampling; the lower side is left open, as in "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training" (2025).
    """
    return torch.exp(old_N - engine_N).clamp(max=cap).detach()


OBJECTIVES: Mapping[str, Objective] = {
    "grpo": Objective("grpo", standardized, per_sequence),
    "dr_grpo": Objective("dr_grpo", centered, per_budget),
    "dapo": Objective("dapo", standardized, per_token, clip_high=0.28),
}
