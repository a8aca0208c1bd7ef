"""One step's updates: the same whatever the cut into micro-batches, for every option that looks at the whole batch."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES, Objective
from minigrpo.algorithms.packing import Batch, pack
from minigrpo.config.schema import ObjectiveConfig
from minigrpo.models.policy import Policy
from minigrpo.training.grpo import UpdateSettings, accumulate_gradient, update_policy
from minigrpo.training.top_entropy import mark_top_entropy
from minigrpo.types import Group
from tests.helpers.models import gradients, made_up_groups, make_policy

EVERYTHING = 10_000


def bent(**knobs: Any) -> Objective:
    made = ObjectiveConfig(**knobs)
    return OBJECTIVES[made.name].with_config(made, inexact_sampler=False)


def sampled_by(policy: Policy, groups: list[Group]) -> list[Group]:
    """Return the groups with log-probabilities of a sampler near the policy; the longest completion was cut off."""
    (part,) = pack(groups, OBJECTIVES["grpo"], 60).split(EVERYTHING)
    with torch.no_grad():
        now_N = policy.logprobs(part, step=0).logprobs_N
    told = iter((now_N + 0.2 * torch.sin(torch.arange(len(now_N)))).split(part.lengths))
    return [
        replace(
            group,
            completions=tuple(
                replace(
                    one, logprobs=tuple(next(told).tolist()), finish="length" if len(one.token_ids) == 60 else "stop"
                )
                for one in group.completions
            ),
        )
        for group in groups
    ]


OPTIONS: list[dict[str, Any]] = [
    {"entropy": 0.1},
    {"top_entropy": 0.3},
    {"top_entropy": 0.3, "entropy": 0.1, "mask_truncated": True},
    {"importance": "sequence_truncate", "name": "gspo"},
    {"importance": "token_mask", "importance_floor": 0.9, "importance_cap": 1.1, "off_policy": 0.01},
    {"mask_truncated": True, "kl": 0.1, "kl_unbiased": True},
    {"compare": "gdpo", "name": "cispo"},
]


@pytest.mark.parametrize("knobs", OPTIONS, ids=lambda knobs: "-".join(f"{k}={v}" for k, v in knobs.items()))
def test_the_gradient_does_not_depend_on_the_cut(knobs: dict[str, Any]) -> None:
    policy, objective = make_policy(double=True), bent(**knobs)
    batch = pack(sampled_by(policy, made_up_groups()), objective, 60)
    results = []
    for budget in (EVERYTHING, 120, 1):
        parts = list(batch.split(budget))
        if objective.top_entropy < 1:
            parts = mark_top_entropy(policy, objective, parts, 3)
        accumulate_gradient(policy, objective, parts, step=3)
        results.append(gradients(policy))
    assert max(float(g.abs().max()) for g in results[0]) > 1e-3
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert float((left - right).abs().max()) < 1e-12


def updated(
    policy: Policy, objective: Objective, batch: Batch, budget: int, epochs: int
) -> tuple[Any, dict[str, float]]:
    optimizer = torch.optim.AdamW(policy.trainable, weight_decay=0.0)
    figures, _ = update_policy(policy, optimizer, objective, batch, UpdateSettings(3, budget, 1e-2, 1.0, epochs))
    return [weight.detach().clone() for weight in policy.trainable], figures


def test_inner_epochs_end_at_the_same_weights_whatever_the_cut_and_only_later_ones_are_clipped() -> None:
    policy = make_policy(double=True)
    batch = pack(made_up_groups(), bent(kl=0.05), 60)
    ends = [updated(copy.deepcopy(policy), bent(kl=0.05), batch, budget, 3) for budget in (EVERYTHING, 60)]
    for left, right in zip(ends[0][0], ends[1][0], strict=True):
        assert float((left - right).abs().max()) < 1e-9
    assert ends[0][1]["clip_ratio/region_mean"] > 0
    assert updated(copy.deepcopy(policy), bent(), batch, EVERYTHING, 1)[1]["clip_ratio/region_mean"] == 0


def test_the_second_inner_epoch_measures_its_ratio_from_before_the_first() -> None:
    policy, objective = make_policy(double=True), bent()
    (part,) = pack(made_up_groups(), objective, 60).split(EVERYTHING)
    first = policy.logprobs(part, step=0).logprobs_N.detach()
    done, _ = accumulate_gradient(policy, objective, [part], step=0)
    assert done[0].old_N is not None
    torch.testing.assert_close(done[0].old_N, first)
    with torch.no_grad():
        for weight in policy.trainable:
            weight += 0.01
    again, _ = accumulate_gradient(policy, objective, done, step=0)
    assert again[0].old_N is done[0].old_N


def test_a_step_in_which_nothing_teaches_changes_no_weight() -> None:
    policy = make_policy(double=True)
    before = [weight.detach().clone() for weight in policy.trainable]
    tied = [
        replace(group, grades=tuple(replace(grade, reward=1.0) for grade in group.grades)) for group in made_up_groups()
    ]
    after, figures = updated(policy, bent(), pack(tied, bent(), 60), EVERYTHING, 2)
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert figures == {"grad_norm": 0.0, "skipped": 0.0, "learning_rate": 1e-2}


def test_a_bonus_alone_raises_entropy() -> None:
    policy, objective = make_policy(double=True), bent(entropy=1.0)
    tied = [
        replace(group, grades=tuple(replace(grade, reward=1.0) for grade in group.grades)) for group in made_up_groups()
    ]
    batch = pack(tied, objective, 60)
    first = updated(policy, objective, batch, EVERYTHING, 5)[1]["entropy_sum"]
    assert updated(policy, objective, batch, EVERYTHING, 1)[1]["entropy_sum"] > first + 0.1


def test_a_gradient_that_is_not_finite_ends_the_step_and_is_counted() -> None:
    policy = make_policy(double=True)
    with torch.no_grad():
        policy.trainable[0].fill_(torch.inf)
    before = [weight.detach().clone() for weight in policy.trainable]
    after, figures = updated(policy, bent(), pack(made_up_groups(), bent(), 60), EVERYTHING, 3)
    assert figures["skipped"] == 1
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
