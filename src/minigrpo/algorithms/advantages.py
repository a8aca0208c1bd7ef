"""Turn rewards into advantages: what each completion earned, compared with its siblings.

Shapes: P prompts, G siblings, F reward functions. A reward of NaN is unknown: it takes no part in any mean, and
its advantage is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigrpo.types import Group

TIE_TOLERANCE = 1e-6
"""Rewards closer than this are the same reward: noise over a tiny deviation would pass for a huge advantage."""

STD_EPSILON = 1e-4
"""Added to a deviation before it divides. TRL's value; the papers leave it open."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards of a batch. `parts_FPG`: of each reward function, unweighted, NaN where it did not apply."""

    total_PG: Tensor
    parts_FPG: Tensor
    weights_F: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Rewards:
        total_PG = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
        grades = [grade for group in groups for grade in group.grades]
        weights = {name: grade.weights.get(name, 1.0) for grade in grades for name in grade.parts}
        if not weights:
            return cls(total_PG, total_PG[None], torch.ones(1, dtype=torch.float64))
        parts_FB = [[grade.parts.get(name, torch.nan) for grade in grades] for name in weights]
        parts_FPG = torch.tensor(parts_FB, dtype=torch.float64).unflatten(1, total_PG.shape)
        return cls(total_PG, parts_FPG, torch.tensor(list(weights.values()), dtype=torch.float64))

    @classmethod
    def only(cls, total_PG: Tensor) -> Rewards:
        """Make the rewards of a single reward function, of weight 1."""
        return cls(total_PG, total_PG[None], torch.ones(1, dtype=total_PG.dtype))


def centered(rewards: Rewards, tie: float = TIE_TOLERANCE) -> Tensor:
    """Return R - mean of the group; exactly 0 where all siblings tie. Dr. GRPO, arXiv 2503.20783, section 3.2."""
    return _center_groups(rewards.total_PG, tie)


def standardized(rewards: Rewards, tie: float = TIE_TOLERANCE) -> Tensor:
    """Return (R - mean) / (std + 1e-4) in each group, std over G - 1. GRPO, arXiv 2402.03300, section 4.1.2."""
    return _standardize_groups(rewards.total_PG, tie)


def batch_standardized(rewards: Rewards, tie: float = TIE_TOLERANCE) -> Tensor:
    """Return (R - mean of the group) / (std of the batch + 1e-4).

    An easy group and a hard one keep their own spreads. "Lite PPO", arXiv 2508.08221, section 4.
    """
    return _center_groups(rewards.total_PG, tie) / (_sample_std(rewards.total_PG.flatten()[None]) + STD_EPSILON)


def gdpo(rewards: Rewards, tie: float = TIE_TOLERANCE) -> Tensor:
    """Standardise each reward function in its group, take the weighted sum, standardise that over the batch.

    A tie in the sum is not a tie in the parts, so such groups still have a gradient. The scale of a reward function
    is lost: only its weight counts. GDPO, arXiv 2601.05242, equations 4 to 6.
    """
    parts_FPG = torch.stack([_standardize_groups(part_PG, tie) for part_PG in rewards.parts_FPG])
    sum_PG = (rewards.weights_F[:, None, None] * parts_FPG).sum(0)
    sum_PG = sum_PG.masked_fill(rewards.total_PG.isnan(), torch.nan)
    advantages_PG = (sum_PG - sum_PG.nanmean()) / (_sample_std(sum_PG.flatten()[None]) + STD_EPSILON)
    # Without this a group in which nothing differs would keep the rounding of the batch's mean.
    return torch.where((parts_FPG != 0).any(0).any(1, True), advantages_PG, 0.0).nan_to_num(0.0)


def _center_groups(rewards_PG: Tensor, tie: float) -> Tensor:
    known_PG = ~rewards_PG.isnan()
    highest_P1 = rewards_PG.nan_to_num(-torch.inf).amax(1, True)
    lowest_P1 = torch.where(known_PG, rewards_PG, torch.inf).amin(1, True)
    differs_PG = (highest_P1 - lowest_P1 > tie) & known_PG
    return torch.where(differs_PG, rewards_PG - rewards_PG.nanmean(1, True), 0.0)


def _standardize_groups(rewards_PG: Tensor, tie: float) -> Tensor:
    return _center_groups(rewards_PG, tie) / (_sample_std(rewards_PG) + STD_EPSILON)


def _sample_std(values_PG: Tensor) -> Tensor:
    """Return the [P, 1] sample standard deviation (n - 1) of each row's known values; 0 for fewer than two."""
    known_P1 = (~values_PG.isnan()).sum(1, True)
    squares_P1 = (values_PG - values_PG.nanmean(1, True)).square().nansum(1, True)
    return torch.where(known_P1 > 1, squares_P1 / (known_P1 - 1).clamp(min=1), 0.0).sqrt()
