"""Factors of groups: by prompt, or by prompt and step; nothing else is touched."""

import pytest
import torch

from minigrpo.errors import RecipeError
from minigrpo.training.group_factor import check_factors, scale_groups
from tests.helpers.models import made_up_groups


def test_a_factor_holds_for_its_prompt_or_for_one_step_of_it():
    groups, advantages = made_up_groups(), torch.ones(3, 3, dtype=torch.float64)
    factors = {"p0": 0.0, "p1@4": -1.0, "p0@5": 2.0}
    assert scale_groups(advantages, groups, factors, 4)[:, 0].tolist() == [0, -1, 1]
    assert scale_groups(advantages, groups, factors, 5)[:, 0].tolist() == [2, 1, 1]
    assert scale_groups(advantages, groups, {}, 4) is advantages


def test_a_name_that_is_no_prompt_is_refused_with_the_nearest():
    prompts = [group.prompt for group in made_up_groups()]
    check_factors({"p0": 0, "p2@17": -1}, prompts)
    with pytest.raises(RecipeError, match="names 'p7'"):
        check_factors({"p7": 0}, prompts)
