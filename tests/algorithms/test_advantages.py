"""Advantages against rows computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from minigrpo.algorithms.advantages import Rewards, batch_standardized, centered, gdpo, standardized
from minigrpo.types import Completion, Grade, Group, Prompt
from tests.helpers.models import made_up_groups

NAN = math.nan


def earned(*rewards_PG: tuple[float, ...]) -> Rewards:
    return Rewards.only(torch.tensor(rewards_PG, dtype=torch.float64))


def parts(*parts_FPG: tuple[tuple[float, ...], ...], weights: tuple[float, ...]) -> Rewards:
    values = torch.tensor(parts_FPG, dtype=torch.float64)
    weights_F = torch.tensor(weights, dtype=torch.float64)
    total_PG = (weights_F[:, None, None] * values).nansum(0)
    return Rewards(total_PG, values, weights_F)


def test_two_siblings_stand_at_plus_and_minus_seven_tenths() -> None:
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert standardized(earned((1.0, 0.0))).tolist() == [pytest.approx([expected, -expected])]


def test_a_group_that_ties_within_noise_has_no_advantage_at_all() -> None:
    rewards = earned((0.1 + 1e-9, 0.1, 0.1 - 1e-9), (1.0, 0.0, 0.0))
    assert standardized(rewards)[0].tolist() == [0, 0, 0]
    assert centered(rewards)[1].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_the_least_spread_that_counts_can_be_set() -> None:
    rewards = earned((0.1, 0.0, 0.0), (1.0, 0.0, 0.0))
    assert bool((standardized(rewards, 0.2)[0] == 0).all())
    assert bool((standardized(rewards, 0.2)[1] != 0).all())


def test_a_reward_that_could_not_be_told_takes_no_part_and_gets_no_advantage() -> None:
    with_gap, without = standardized(earned((1.0, NAN, 0.0, 0.5))), standardized(earned((1.0, 0.0, 0.5)))
    assert with_gap[0, 1] == 0
    assert with_gap[0, [0, 2, 3]].tolist() == pytest.approx(without[0].tolist())


@pytest.mark.parametrize("compare", [centered, standardized, batch_standardized, gdpo])
@pytest.mark.parametrize("rewards_G", [(NAN, NAN, NAN), (NAN, 1.0, NAN), (2.0, 2.0, NAN)])
def test_where_fewer_than_two_known_rewards_differ_nothing_is_compared(
    compare: type, rewards_G: tuple[float, ...]
) -> None:
    advantages_PG: Tensor = compare(earned(rewards_G, (1.0, 0.0, 0.0)), 1e-6)
    assert advantages_PG[0].tolist() == [0, 0, 0]
    assert bool(advantages_PG.isfinite().all())


def test_the_batchs_deviation_lets_a_wide_group_pull_harder_than_a_narrow_one() -> None:
    rewards = earned((1.0, 0.0), (0.1, 0.0))
    wide, narrow = batch_standardized(rewards).abs().amax(1).tolist()
    assert wide == pytest.approx(10 * narrow)
    assert standardized(rewards).abs().amax(1).tolist() == pytest.approx([0.707, 0.707], abs=2e-3)


def test_gdpo_forgets_the_scale_of_a_reward_function_but_not_its_weight() -> None:
    small = parts(((1, 0, 0, 1),), ((0, 1, 0, 1),), weights=(1.0, 2.0))
    large = parts(((100, 0, 0, 100),), ((0, 1, 0, 1),), weights=(1.0, 2.0))
    torch.testing.assert_close(gdpo(small), gdpo(large), rtol=1e-3, atol=1e-3)
    assert float(gdpo(small)[0, 1]) > float(gdpo(small)[0, 0])


def test_with_gdpo_a_tie_in_the_sum_is_not_a_tie_in_the_parts() -> None:
    rewards = parts(((1, 0), (0, 0)), ((0, 1), (0, 0)), weights=(1.0, 3.0))
    level = Rewards(torch.zeros(2, 2, dtype=torch.float64), rewards.parts_FPG, rewards.weights_F)
    assert standardized(level)[0].tolist() == [0, 0]
    assert bool((gdpo(level)[0] != 0).all())
    assert gdpo(level)[1].tolist() == [0, 0]


def test_a_reward_function_that_does_not_apply_to_a_sibling_leaves_its_comparison_to_the_others() -> None:
    rewards = parts(((1, 0, NAN),), ((0, 0, 1),), weights=(1.0, 1.0))
    first, second, third = gdpo(rewards)[0].tolist()
    assert third > second
    assert first > second


def test_parts_and_weights_are_read_from_the_grades_by_name() -> None:
    def group(*grades: Grade) -> Group:
        return Group(Prompt("p", ()), (1, 2), tuple(Completion("", (3,), (0.0,), "stop") for _ in grades), grades)

    weights = {"a": 2.0, "b": 0.5}
    rewards = Rewards.of(
        [group(Grade(2.0, {"a": 1.0}, weights=weights), Grade(1.5, {"a": 0.5, "b": 1.0}, weights=weights))]
    )
    assert rewards.weights_F.tolist() == [2.0, 0.5]
    assert rewards.parts_FPG[0].tolist() == [[1.0, 0.5]]
    assert math.isnan(rewards.parts_FPG[1, 0, 0])
    assert rewards.parts_FPG[1, 0, 1] == 1.0


def test_grades_without_parts_are_one_reward_function() -> None:
    rewards = Rewards.of(made_up_groups())
    assert torch.equal(rewards.parts_FPG[0], rewards.total_PG)
