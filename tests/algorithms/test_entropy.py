"""The entropy bonus from step to step, and the tokens of high entropy."""

import pytest
import torch

from minigrpo.algorithms.entropy import EntropyBonus, chosen_tokens
from minigrpo.config.schema import ObjectiveConfig


def test_without_a_target_the_bonus_stays_as_it_is() -> None:
    bonus = EntropyBonus.of(ObjectiveConfig(entropy=0.1))
    assert bonus.weight == 0.1
    assert bonus.after(0.0).weight == 0.1


def test_with_a_target_it_grows_while_entropy_is_low_and_is_off_while_it_is_high() -> None:
    bonus = EntropyBonus.of(ObjectiveConfig(entropy=0.2, entropy_target=1.0))
    assert bonus.weight == 0
    for _ in range(5):
        bonus = bonus.after(0.5)
    assert bonus.weight == pytest.approx(0.05)
    assert bonus.after(1.5).weight == 0
    assert bonus.after(1.5).after(0.9).weight == pytest.approx(0.05)


def test_it_never_exceeds_its_largest_weight_nor_falls_below_none() -> None:
    bonus = EntropyBonus.of(ObjectiveConfig(entropy=0.2, entropy_target=1.0))
    for _ in range(50):
        bonus = bonus.after(0.0)
    assert bonus.weight == pytest.approx(0.2)
    for _ in range(50):
        bonus = bonus.after(2.0)
    assert bonus.adaptive_weight == 0


def test_a_step_in_which_nothing_was_scored_changes_nothing() -> None:
    bonus = EntropyBonus.of(ObjectiveConfig(entropy=0.2, entropy_target=1.0)).after(0.5)
    assert bonus.after(None) == bonus


def test_the_chosen_tokens_are_the_same_however_the_batch_is_cut() -> None:
    entropy_N = torch.rand(100, generator=torch.Generator().manual_seed(0))
    all_N = torch.ones(100, dtype=torch.bool)
    (whole,) = chosen_tokens([entropy_N], [all_N], 0.2)
    cut = chosen_tokens(list(entropy_N.split(17)), list(all_N.split(17)), 0.2)
    assert torch.equal(torch.cat(cut), whole)
    assert int(whole.sum()) == 20


def test_tokens_that_are_left_out_are_neither_chosen_nor_counted() -> None:
    entropy_N, counted_N = torch.tensor([9.0, 1.0, 2.0, 3.0]), torch.tensor([False, True, True, True])
    (chosen_N,) = chosen_tokens([entropy_N], [counted_N], 0.34)
    assert chosen_N.tolist() == [False, False, False, True]
