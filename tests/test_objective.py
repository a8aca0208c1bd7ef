"""The objectives against rows computed by hand."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from minigrpo.config import ObjectiveKnobs
from minigrpo.objective import OBJECTIVES, centered, importance, k3, per_budget, per_sequence, per_token, standardized


@dataclass(frozen=True)
class Row:
    """Two completions, of one token and of two."""

    advantages_N: Tensor
    weights_N: Tensor
    engine_N: Tensor
    old_N: Tensor | None = None
    ref_N: Tensor | None = None


def row(advantages: list[float], **others: Tensor) -> Row:
    advantages_N = torch.tensor(advantages, dtype=torch.float64)
    return Row(
        advantages_N, torch.full_like(advantages_N, 1 / len(advantages)), torch.zeros_like(advantages_N), **others
    )


def test_two_siblings_stand_at_plus_and_minus_seven_tenths() -> None:
    advantages_PG = standardized(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert advantages_PG.tolist() == [pytest.approx([expected, -expected])]


def test_a_group_that_ties_within_noise_has_no_advantage_at_all() -> None:
    rewards_PG = torch.tensor([[0.1 + 1e-9, 0.1, 0.1 - 1e-9], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert standardized(rewards_PG)[0].tolist() == [0, 0, 0]
    assert centered(rewards_PG)[1].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_weights_sum_to_one_or_for_dr_grpo_to_the_mean_length_over_the_limit() -> None:
    lengths_B = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    for weights in (per_sequence, per_token):
        assert float((weights(lengths_B, 10) * lengths_B).sum()) == pytest.approx(1)
    assert float((per_budget(lengths_B, 10) * lengths_B).sum()) == pytest.approx(8 / 3 / 10)


def test_per_sequence_gives_every_completion_the_same_say_and_per_token_every_token() -> None:
    lengths_B = torch.tensor([1.0, 4.0])
    assert per_sequence(lengths_B, 10).tolist() == pytest.approx([0.5, 0.125])
    assert per_token(lengths_B, 10).tolist() == pytest.approx([0.2, 0.2])


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_its_gradient_is_the_policy_gradient() -> None:
    logprobs_N = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss = OBJECTIVES["grpo"].loss(logprobs_N, row([1.0, -0.5])).total
    loss.backward()
    assert float(loss) == pytest.approx(-0.25)
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([-0.5, 0.25])


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "moves"),
    [
        (1.0, 1.5, -1.2, False),  # already 20 % likelier: no further reward
        (1.0, 0.5, -0.5, True),  # less likely than before: pulled up from wherever it is
        (-1.0, 0.5, 0.8, False),
        (-1.0, 1.5, 1.5, True),
    ],
)
def test_the_surrogate_is_clipped_on_the_side_that_flatters(
    advantage: float, ratio: float, expected: float, moves: bool
) -> None:
    logprobs_N = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = OBJECTIVES["grpo"].loss(logprobs_N, row([advantage], old_N=torch.zeros(1, dtype=torch.float64))).total
    loss.backward()
    assert float(loss) == pytest.approx(expected)
    assert logprobs_N.grad is not None
    assert bool(logprobs_N.grad.abs() > 0) is moves


def test_dapo_lets_rising_tokens_rise_further() -> None:
    part = row([1.0], old_N=torch.zeros(1, dtype=torch.float64))
    logprobs_N = torch.tensor([math.log(1.5)], dtype=torch.float64)
    assert float(OBJECTIVES["dapo"].loss(logprobs_N, part).total) == pytest.approx(-1.28)


def test_k3_is_zero_at_equality_and_positive_elsewhere() -> None:
    logprobs_N = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    ref_N = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    assert k3(logprobs_N, ref_N).tolist() == pytest.approx([0, math.exp(-1), math.exp(0.5) - 1.5])


def test_the_kl_term_joins_under_the_same_weights() -> None:
    ref_N = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    objective = replace(OBJECTIVES["grpo"], kl=0.1)
    logprobs_N = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    loss = objective.loss(logprobs_N, row([0.0, 0.0], ref_N=ref_N))
    assert float(loss.total) == pytest.approx(0.1 * math.exp(-1) / 2)
    assert float(loss.figures["kl"]) == pytest.approx(math.exp(-1) / 2)


def test_importance_weights_are_capped_above_only_and_carry_no_gradient() -> None:
    old_N = torch.tensor([0.0, 0.0], requires_grad=True)
    weights_N = importance(old_N, torch.tensor([-3.0, 3.0]), cap=2.0)
    assert weights_N.tolist() == pytest.approx([2.0, math.exp(-3)])
    assert not weights_N.requires_grad


def test_importance_correction_is_on_by_itself_where_weights_are_sixteen_bit() -> None:
    knobs = ObjectiveKnobs()
    assert OBJECTIVES["grpo"].with_knobs(knobs, sixteen_bit=False).importance_cap is None
    assert OBJECTIVES["grpo"].with_knobs(knobs, sixteen_bit=True).importance_cap == knobs.importance_cap


def test_a_recipe_bends_only_what_it_names() -> None:
    bent = OBJECTIVES["dapo"].with_knobs(ObjectiveKnobs(clip_low=0.1, kl=0.04), sixteen_bit=False)
    assert (bent.clip_low, bent.clip_high, bent.kl) == (0.1, 0.28, 0.04)
