"""Objectives of the GRPO family: advantages, weights, ratio, surrogate, KL, entropy. A variant is a value.

Shapes: P prompts, G siblings, B = P * G completions, F reward functions, N scored tokens of all completions, one
after the other.

Three kinds of past log-probability, never mixed up: `old` is the policy's own before the first update of this batch
and enters the ratio; `engine` is what the sampler reported and enters only the importance weight (and the test of how
far a completion is off-policy); `ref` is the reference policy and enters only the KL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from minigrpo.algorithms.advantages import TIE_TOLERANCE, Rewards, batch_standardized, centered, gdpo, standardized
from minigrpo.config.schema import ObjectiveConfig, Recipe

LOG_RATIO_LIMIT = 20.0
"""exp beyond it is useless, and an infinite ratio makes NaN gradients under a clipped, finite loss."""


class ScoredTokens(Protocol):
    """What the loss needs to know of N tokens besides their log-probabilities. None: not used."""

    @property
    def advantages_N(self) -> Tensor: ...
    @property
    def weights_N(self) -> Tensor: ...
    @property
    def shares_N(self) -> Tensor: ...
    @property
    def engine_N(self) -> Tensor: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def old_N(self) -> Tensor | None: ...
    @property
    def ref_N(self) -> Tensor | None: ...
    @property
    def chosen_N(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a micro-batch: `total`, differentiable, and `figures` to log, which add up over micro-batches."""

    total: Tensor
    figures: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Importance:
    """Importance weights for a sampler that differs from the policy: w = p_policy / p_sampler, without gradient.

    `sequence`: w is the product over the completion, else each token's own. `mask`: what lies outside [floor, cap] is
    dropped (masked importance sampling, IcePop), else w is brought to the nearer bound (truncated; TIS proper has
    the upper bound only). "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025).
    """

    cap: float = 2.0
    floor: float = 0.0
    sequence: bool = False
    mask: bool = False

    def weights(self, old_N: Tensor, engine_N: Tensor, lengths: list[int]) -> Tensor:
        log_N = (old_N - engine_N).detach()
        if self.sequence:
            log_N = repeat_per_token([log_n.sum() for log_n in log_N.split(lengths)], lengths)
        weight_N = torch.exp(log_N)
        if self.mask:
            return weight_N.masked_fill((weight_N < self.floor) | (weight_N > self.cap), 0.0)
        return weight_N.clamp(self.floor, self.cap)


@dataclass(frozen=True, slots=True)
class Objective:
    """One member of the GRPO family.

    `advantages`: (Rewards, tie) -> advantages_PG. `weights`: (lengths_B, kept_B, longest allowed) -> the weight of
    each token of completion b; they are taken once over the whole sampled batch, so that every loss is a plain sum,
    and cutting the batch into micro-batches (or ranks) cannot change the gradient. `ratio`: (log ratio_N, lengths) ->
    ratio_N. `surrogate`: (objective, ratio_N, logprobs_N, advantages_N) -> the loss of each token.
    """

    name: str
    advantages: Callable[[Rewards, float], Tensor]
    weights: Callable[[Tensor, Tensor, int], Tensor]
    ratio: Callable[[Tensor, list[int]], Tensor]
    surrogate: Callable[[Objective, Tensor, Tensor, Tensor], Tensor]
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float | None = None
    kl: float = 0.0
    kl_unbiased: bool = False
    importance: Importance | None = None
    off_policy: float | None = None
    entropy: float = 0.0
    top_entropy: float = 1.0
    mask_truncated: bool = False
    tie: float = TIE_TOLERANCE

    @property
    def needs_all(self) -> bool:
        """Tell whether a term other than the advantages (KL, entropy) gives every completion a gradient."""
        return self.kl > 0 or self.entropy > 0

    def loss(self, logprobs_N: Tensor, tokens: ScoredTokens, entropy_N: Tensor | None = None) -> Loss:
        """Return the sum over tokens of weight * (surrogate * trust + kl * k3) - entropy bonus."""
        advantages_N, weights_N = tokens.advantages_N.to(logprobs_N), tokens.weights_N.to(logprobs_N)
        old_N = logprobs_N.detach() if tokens.old_N is None else tokens.old_N
        ratio_N = self.ratio((logprobs_N - old_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), tokens.lengths)
        trust_N = self.trust_weights(logprobs_N.detach(), old_N, advantages_N, tokens)
        total = (weights_N * trust_N * self.surrogate(self, ratio_N, logprobs_N, advantages_N)).sum()
        low_N = (ratio_N < 1 - self.clip_low) & (advantages_N < 0)
        high_N = (ratio_N > 1 + self.clip_high) & (advantages_N > 0)
        figures = {
            "clip_ratio/low_mean": (weights_N * low_N).sum(),
            "clip_ratio/high_mean": (weights_N * high_N).sum(),
            "clip_ratio/region_mean": (weights_N * (low_N | high_N)).sum(),
        }
        if tokens.ref_N is not None:
            penalty_N = kl_k3(logprobs_N, tokens.ref_N)
            penalty_N = penalty_N * ratio_N if self.kl_unbiased else penalty_N
            figures["kl"] = (weights_N * penalty_N).sum()
            total = total + self.kl * figures["kl"]
        if self.entropy > 0 and entropy_N is not None:
            total = total - self.entropy * (tokens.shares_N.to(logprobs_N) * entropy_N).sum()
        return Loss(total, {"loss": total.detach(), **{name: value.detach() for name, value in figures.items()}})

    def trust_weights(self, logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, tokens: ScoredTokens) -> Tensor:
        """Return each token's constant factor: importance weight * off-policy mask * top-entropy mask."""
        trust_N = torch.ones_like(logprobs_N)
        engine_N = tokens.engine_N.to(logprobs_N)
        if self.importance is not None:
            trust_N = trust_N * self.importance.weights(old_N, engine_N, tokens.lengths)
        if self.off_policy is not None:
            behaviour_N = old_N if self.importance is None else engine_N
            trust_N = trust_N * off_policy_mask(behaviour_N - logprobs_N, advantages_N, tokens.lengths, self.off_policy)
        return trust_N if tokens.chosen_N is None else trust_N * tokens.chosen_N

    def with_config(self, config: ObjectiveConfig, *, inexact_sampler: bool, tie: float = TIE_TOLERANCE) -> Objective:
        """Return this objective with a recipe's options.

        `inexact_sampler`: the sampler rounds differently, or was an older policy.
        """
        importance = None
        if config.importance not in ("auto", "off") or (config.importance == "auto" and inexact_sampler):
            sequence, mask = config.importance.startswith("sequence"), config.importance.endswith("mask")
            importance = Importance(config.importance_cap, config.importance_floor, sequence, mask)
        own = ("kl", "kl_unbiased", "clip_dual", "off_policy", "entropy", "top_entropy", "mask_truncated")
        return replace(
            self,
            **{name: getattr(config, name) for name in own},
            advantages=ADVANTAGES.get(config.compare, self.advantages),
            clip_low=self.clip_low if config.clip_low is None else config.clip_low,
            clip_high=self.clip_high if config.clip_high is None else config.clip_high,
            importance=importance,
            tie=tie,
        )


def open_objective(recipe: Recipe, *, inexact_engine: bool) -> Objective:
    """Return the objective that a recipe describes.

    `inexact_engine`: engine and policy round differently, so that they disagree about the same weights.
    """
    # An older policy sampled the groups that are replayed, or were sampled ahead.
    inexact = inexact_engine or recipe.groups.replay > 0 or recipe.rollout.ahead > 0
    return OBJECTIVES[recipe.objective.name].with_config(
        recipe.objective, inexact_sampler=inexact, tie=recipe.groups.min_spread
    )


def token_ratio(log_ratio_N: Tensor, lengths: list[int]) -> Tensor:
    """Return each token's own ratio. PPO, arXiv 1707.06347."""
    return torch.exp(log_ratio_N)


def sequence_ratio(log_ratio_N: Tensor, lengths: list[int]) -> Tensor:
    """Return exp of the completion's mean log ratio, for each of its tokens. GSPO, arXiv 2507.18071, equation 7."""
    return torch.exp(repeat_per_token([log_n.mean() for log_n in log_ratio_N.split(lengths)], lengths))


def clipped_surrogate(objective: Objective, ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Return -min(r A, clip(r) A). PPO, arXiv 1707.06347, equation 7; asymmetric bounds: DAPO, arXiv 2503.14476.

    Dual clip: where A < 0 the ratio counts up to `clip_dual` only, or one bad answer that the policy has come to like
    outweighs the batch. INTELLECT-2, arXiv 2505.07291, section 3.4; first in arXiv 1912.09729.
    """
    bounded_N = ratio_N.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.clip_dual is not None:
        ratio_N = ratio_N.clamp(max=objective.clip_dual)
    return -torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)


def cispo_surrogate(objective: Objective, ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Return -stopgrad(min(r, cap)) A logp: no token loses its gradient.

    CISPO, arXiv 2506.13585, equation 4.

    The cap is 1 + clip_high, as everywhere here; the paper's e_max is this sum.
    """
    return -ratio_N.detach().clamp(max=1 + objective.clip_high) * advantages_N * logprobs_N


def sapo_surrogate(objective: Objective, ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Return -(4 / tau) sigmoid(tau (r - 1)) A: a soft clip, tighter for A < 0. SAPO, arXiv 2511.20347."""
    tau_N = torch.where(advantages_N > 0, SAPO_TEMPERATURES[0], SAPO_TEMPERATURES[1]).to(ratio_N)
    return -(4 / tau_N) * torch.sigmoid(tau_N * (ratio_N - 1)) * advantages_N


SAPO_TEMPERATURES = (1.0, 1.05)
"""tau for good and for bad answers."""


def repeat_per_token(values: list[Tensor], lengths: list[int]) -> Tensor:
    """Repeat each completion's value for its tokens. Not x[index], whose gradient varies between runs on a CPU."""
    return torch.cat([value.expand(n) for value, n in zip(values, lengths, strict=True)])


def off_policy_mask(drift_N: Tensor, advantages_N: Tensor, lengths: list[int], limit: float) -> Tensor:
    """Return 0 for tokens of bad completions whose mean drift (behaviour - policy, nats) exceeds the limit, else 1.

    DeepSeek-V3.2, arXiv 2512.02556, section 3.1: learning to avoid what the policy no longer says is unstable.
    """
    drift_N = repeat_per_token([drift_n.mean() for drift_n in drift_N.split(lengths)], lengths)
    return ((advantages_N >= 0) | (drift_N <= limit)).to(drift_N)


def per_sequence_weights(lengths_B: Tensor, kept_B: Tensor, longest: int) -> Tensor:
    """Weigh for the mean over each completion, then over completions. GRPO, arXiv 2402.03300, equation 3."""
    return kept_B / (len(lengths_B) * lengths_B)


def per_token_weights(lengths_B: Tensor, kept_B: Tensor, longest: int) -> Tensor:
    """Weigh every token of the whole batch equally. DAPO, arXiv 2503.14476, equation 8, does so within each group."""
    return kept_B / (lengths_B * kept_B).sum().clamp(min=1.0)


def per_budget_weights(lengths_B: Tensor, kept_B: Tensor, longest: int) -> Tensor:
    """Weigh for the token sum over the longest completion allowed. Dr. GRPO, arXiv 2503.20783, section 3.2."""
    return kept_B / (len(lengths_B) * longest)


def kl_k3(logprobs_N: Tensor, ref_N: Tensor) -> Tensor:
    """Return exp(d) - d - 1 with d = ref - logp: never negative, unbiased for KL(policy || ref) on policy samples.

    Schulman, "Approximating KL divergence" (2020); GRPO, arXiv 2402.03300, equation 4.
    """
    d_N = ref_N - logprobs_N
    return torch.exp(d_N) - d_N - 1


ADVANTAGES: Mapping[str, Callable[[Rewards, float], Tensor]] = {
    "group": standardized,
    "batch": batch_standardized,
    "none": centered,
    "gdpo": gdpo,
}

OBJECTIVES: Mapping[str, Objective] = {
    "grpo": Objective("grpo", standardized, per_sequence_weights, token_ratio, clipped_surrogate),
    "dr_grpo": Objective("dr_grpo", centered, per_budget_weights, token_ratio, clipped_surrogate),
    "dapo": Objective("dapo", standardized, per_token_weights, token_ratio, clipped_surrogate, clip_high=0.28),
    # BNPO divides by the tokens of each micro-batch; a micro-batch is no unit here, so the whole batch is the divisor.
    "bnpo": Objective("bnpo", standardized, per_token_weights, token_ratio, clipped_surrogate),
    "gspo": Objective(
        "gspo", standardized, per_sequence_weights, sequence_ratio, clipped_surrogate, clip_low=3e-4, clip_high=4e-4
    ),
    "cispo": Objective("cispo", standardized, per_token_weights, token_ratio, cispo_surrogate, clip_high=4.0),
    "sapo": Objective("sapo", standardized, per_sequence_weights, token_ratio, sapo_surrogate),
}
