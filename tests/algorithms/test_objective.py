"""The objectives against rows computed by hand."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from minigrpo.algorithms.objective import (
    OBJECTIVES,
    Importance,
    Objective,
    kl_k3,
    off_policy_mask,
    open_objective,
    per_budget_weights,
    per_sequence_weights,
    per_token_weights,
    sequence_ratio,
)
from minigrpo.config.schema import ObjectiveConfig, Recipe


@dataclass(frozen=True)
class Row:
    """Completions of the given lengths, by default of one token each."""

    advantages_N: Tensor
    weights_N: Tensor
    engine_N: Tensor
    lengths: list[int] = field(default_factory=list)
    old_N: Tensor | None = None
    ref_N: Tensor | None = None
    chosen_N: Tensor | None = None

    @property
    def shares_N(self) -> Tensor:
        return self.weights_N


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def row(advantages: list[float], **others: object) -> Row:
    advantages_N = floats(*advantages)
    made = Row(advantages_N, torch.full_like(advantages_N, 1 / len(advantages)), torch.zeros_like(advantages_N))
    return replace(made, **{"lengths": [1] * len(advantages), **others})


def pull(objective: Objective, ratio: float, advantage: float) -> tuple[float, float]:
    """Return (loss, its derivative in the log-probability) of one token with the given ratio."""
    logprobs_N = floats(math.log(ratio)).requires_grad_()
    loss = objective.loss(logprobs_N, row([advantage], old_N=floats(0.0))).total
    loss.backward()
    assert logprobs_N.grad is not None
    return float(loss), float(logprobs_N.grad)


def test_weights_sum_to_one_or_for_dr_grpo_to_the_mean_length_over_the_limit() -> None:
    lengths_B, kept_B = floats(1, 3, 4), floats(1, 1, 1)
    for weights in (per_sequence_weights, per_token_weights):
        assert float((weights(lengths_B, kept_B, 10) * lengths_B).sum()) == pytest.approx(1)
    assert float((per_budget_weights(lengths_B, kept_B, 10) * lengths_B).sum()) == pytest.approx(8 / 3 / 10)


def test_per_sequence_gives_every_completion_the_same_say_and_per_token_every_token() -> None:
    lengths_B, kept_B = floats(1, 4), floats(1, 1)
    assert per_sequence_weights(lengths_B, kept_B, 10).tolist() == pytest.approx([0.5, 0.125])
    assert per_token_weights(lengths_B, kept_B, 10).tolist() == pytest.approx([0.2, 0.2])


def test_a_masked_completion_weighs_nothing_and_its_tokens_are_not_counted() -> None:
    lengths_B, kept_B = floats(1, 4), floats(1, 0)
    assert per_sequence_weights(lengths_B, kept_B, 10).tolist() == pytest.approx([0.5, 0])
    assert per_token_weights(lengths_B, kept_B, 10).tolist() == pytest.approx([1.0, 0])
    assert per_token_weights(lengths_B, floats(0, 0), 10).tolist() == [0, 0]


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
    assert kl_k3(logprobs_N, ref_N).tolist() == pytest.approx([0, math.exp(-1), math.exp(0.5) - 1.5])


def test_the_kl_term_joins_under_the_same_weights() -> None:
    ref_N = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    objective = replace(OBJECTIVES["grpo"], kl=0.1)
    logprobs_N = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    loss = objective.loss(logprobs_N, row([0.0, 0.0], ref_N=ref_N))
    assert float(loss.total) == pytest.approx(0.1 * math.exp(-1) / 2)
    assert float(loss.figures["kl"]) == pytest.approx(math.exp(-1) / 2)


def test_importance_weights_are_capped_above_only_and_carry_no_gradient() -> None:
    old_N = floats(0, 0).requires_grad_()
    weights_N = Importance(cap=2.0).weights(old_N, floats(-3, 3), [1, 1])
    assert weights_N.tolist() == pytest.approx([2.0, math.exp(-3)])
    assert not weights_N.requires_grad


def test_importance_of_a_sequence_is_the_product_over_its_tokens_and_a_mask_drops_what_lies_outside() -> None:
    old_N, engine_N = floats(0.1, 0.2, -2.0), floats(0, 0, 0)
    whole = Importance(cap=2.0, sequence=True).weights(old_N, engine_N, [2, 1])
    assert whole.tolist() == pytest.approx([math.exp(0.3), math.exp(0.3), math.exp(-2)])
    masked = Importance(cap=2.0, floor=0.5, mask=True).weights(old_N, engine_N, [2, 1])
    assert masked.tolist() == pytest.approx([math.exp(0.1), math.exp(0.2), 0])
    assert Importance(cap=2.0, floor=0.5).weights(old_N, engine_N, [2, 1]).tolist()[2] == 0.5


def test_importance_correction_is_on_by_itself_where_weights_are_sixteen_bit_or_groups_are_replayed() -> None:
    assert open_objective(Recipe(), inexact_engine=False).importance is None
    assert open_objective(Recipe(), inexact_engine=True).importance == Importance(cap=2.0)
    replaying = Recipe.model_validate({"groups": {"replay": 2}})
    assert open_objective(replaying, inexact_engine=False).importance == Importance(cap=2.0)
    off = Recipe.model_validate({"objective": {"importance": "off"}})
    assert open_objective(off, inexact_engine=True).importance is None


def test_a_recipe_changes_only_the_options_it_names() -> None:
    bent = OBJECTIVES["dapo"].with_config(ObjectiveConfig(clip_low=0.1, kl=0.04), inexact_sampler=False)
    assert (bent.clip_low, bent.clip_high, bent.kl) == (0.1, 0.28, 0.04)
    assert bent == replace(OBJECTIVES["dapo"], clip_low=0.1, kl=0.04)


def test_gspo_clips_the_mean_of_a_completion_and_all_its_tokens_share_one_fate() -> None:
    ratio_N = sequence_ratio(floats(0.3, -0.1, 0.5), [2, 1])
    assert ratio_N.tolist() == pytest.approx([math.exp(0.1), math.exp(0.1), math.exp(0.5)])
    logprobs_N = floats(0.3, -0.1).requires_grad_()
    part = row([1.0, 1.0], old_N=floats(0, 0), lengths=[2])
    OBJECTIVES["gspo"].loss(logprobs_N, part).total.backward()
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == [0, 0]  # the second token alone had become less likely


def test_dual_clip_bounds_what_one_bad_answer_can_weigh_and_leaves_good_ones_alone() -> None:
    objective = replace(OBJECTIVES["grpo"], clip_dual=3.0)
    assert pull(objective, 5.0, -1.0) == (pytest.approx(3.0), 0)
    assert pull(objective, 2.0, -1.0) == (pytest.approx(2.0), pytest.approx(2.0))
    assert pull(objective, 5.0, 1.0) == pull(OBJECTIVES["grpo"], 5.0, 1.0)


def test_cispo_caps_the_weight_but_never_the_gradient() -> None:
    objective = OBJECTIVES["cispo"]
    assert pull(objective, 3.0, 1.0)[1] == pytest.approx(-3)
    assert pull(objective, 50.0, 1.0)[1] == pytest.approx(-5)
    assert pull(objective, 50.0, -1.0)[1] == pytest.approx(5)


def test_sapo_is_the_policy_gradient_at_ratio_one_and_fades_away_from_it_sooner_for_bad_answers() -> None:
    objective = OBJECTIVES["sapo"]
    assert pull(objective, 1.0, 1.0)[1] == pytest.approx(-1)
    assert pull(objective, 1.0, -1.0)[1] == pytest.approx(1)
    good, bad = -pull(objective, 4.0, 1.0)[1], pull(objective, 4.0, -1.0)[1]
    assert 0 < bad < good < 4


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_on_policy_every_objective_is_the_policy_gradient(name: str, advantage: float) -> None:
    assert pull(OBJECTIVES[name], 1.0, advantage)[1] == pytest.approx(-advantage)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("log_ratio", [-400.0, 400.0])
def test_a_ratio_that_overflows_leaves_every_gradient_finite(name: str, log_ratio: float) -> None:
    logprobs_N = torch.tensor([log_ratio, 0.0]).requires_grad_()
    part = row([1.0, -1.0], old_N=torch.zeros(2))
    OBJECTIVES[name].loss(logprobs_N, part).total.backward()
    assert logprobs_N.grad is not None
    assert bool(logprobs_N.grad.isfinite().all())


def test_the_unbiased_kl_is_the_kl_times_the_ratio_and_its_gradient_goes_through_both() -> None:
    objective = replace(OBJECTIVES["grpo"], kl=1.0, kl_unbiased=True)
    logprobs_N = floats(-1.0).requires_grad_()
    part = row([0.0], old_N=floats(-1.5), ref_N=floats(-1.2))
    loss = objective.loss(logprobs_N, part).total
    ratio, d = math.exp(0.5), -0.2
    penalty = math.exp(d) - d - 1
    assert float(loss) == pytest.approx(ratio * penalty)
    loss.backward()
    assert logprobs_N.grad is not None
    assert float(logprobs_N.grad) == pytest.approx(ratio * penalty + ratio * (1 - math.exp(d)))


def test_bad_answers_that_the_policy_has_left_are_dropped_and_good_ones_kept() -> None:
    drift_N = floats(0.9, 0.3, 0.9, 0.3, 0.1, 0.1)
    kept_N = off_policy_mask(drift_N, floats(-1, -1, 1, 1, -1, -1), [2, 2, 2], limit=0.5)
    assert kept_N.tolist() == [0, 0, 1, 1, 1, 1]


def test_tokens_that_are_not_chosen_do_not_learn_from_the_advantage_but_stay_near_the_reference() -> None:
    objective = replace(OBJECTIVES["grpo"], kl=0.5)
    logprobs_N = floats(-1, -1).requires_grad_()
    part = row([1.0, 1.0], ref_N=floats(-2, -2), chosen_N=torch.tensor([True, False]))
    objective.loss(logprobs_N, part).total.backward()
    assert logprobs_N.grad is not None
    chosen, other = logprobs_N.grad.tolist()
    assert chosen - other == pytest.approx(-0.5)
    assert other == pytest.approx(0.5 * 0.5 * (1 - math.exp(-1)))


def test_the_entropy_bonus_lowers_the_loss_by_the_mean_entropy() -> None:
    objective = replace(OBJECTIVES["grpo"], entropy=0.1)
    entropy_N = floats(2.0, 4.0).requires_grad_()
    loss = objective.loss(floats(-1, -1), row([0.0, 0.0]), entropy_N).total
    assert float(loss) == pytest.approx(-0.3)
    loss.backward()
    assert entropy_N.grad is not None
    assert entropy_N.grad.tolist() == pytest.approx([-0.05, -0.05])
