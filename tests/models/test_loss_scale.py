"""float16: small gradients arrive, an overflow costs a pass and no step; nothing changes where no scale is needed."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import MicroBatch, pack
from minigrpo.config.schema import AdapterConfig, ModelConfig, Recipe, RolloutConfig, SaveConfig, TrainConfig
from minigrpo.models.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, MAX_SCALE, MIN_SCALE, LossScale
from minigrpo.models.policy import Policy
from minigrpo.runs.rundir import RunDir
from minigrpo.training.grpo import UpdateSettings, accumulate_gradient, update_policy
from tests.helpers.models import gradients, made_up_groups, make_policy
from tests.models.test_quantize import train

EVERYTHING = 1 << 30
HALF = LossScale.of(torch.float16)


def half(policy: Policy) -> Policy:
    """Return the same weights in float16 under a float32 adapter."""
    for parameter in policy.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.half()
    policy.dtype, policy.loss_scale = torch.float16, HALF
    return policy


def batch_of(weight: float) -> list[MicroBatch]:
    """Return one micro-batch whose tokens weigh as little as those of a batch of 1 / weight tokens."""
    (part,) = pack(made_up_groups(), OBJECTIVES["grpo"], 60).split(EVERYTHING)
    share = weight / float(part.weights_N.max())
    return [replace(part, weights_N=part.weights_N * share)]


def gradient(policy: Policy, parts: list[MicroBatch]) -> list[torch.Tensor]:
    accumulate_gradient(policy, OBJECTIVES["grpo"], parts, step=3)
    policy.loss_scale.unscale(policy.trainable)
    return gradients(policy)


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the norm of the difference over the norm of the expected values."""
    left, right = (torch.cat([g.flatten() for g in many]) for many in (found, expected))
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("weight", [1 / 5000, 1e-7])
def test_a_scaled_gradient_equals_float32s_to_the_accuracy_of_float16(weight: float, dropout: float) -> None:
    exact = gradient(make_policy(dropout=dropout), batch_of(weight))
    scaled = gradient(half(make_policy(dropout=dropout)), batch_of(weight))
    assert all(g.dtype == torch.float32 for g in scaled)
    assert distance(scaled, exact) < 0.01
    unscaled = half(make_policy(dropout=dropout))
    unscaled.loss_scale = LossScale()
    assert distance(gradient(unscaled, batch_of(weight)), exact) > (0.9 if weight < 1e-6 else 0)


def test_the_scale_doubles_after_many_good_updates_and_halves_at_an_overflow() -> None:
    scale = HALF
    for _ in range(GROWTH_INTERVAL - 1):
        scale = scale.after_success()
    assert scale.scale == INITIAL_SCALE
    assert scale.after_success() == LossScale(2 * INITIAL_SCALE, 0, True)
    assert scale.after_overflow() == LossScale(INITIAL_SCALE / 2, 0, True)
    assert LossScale(MAX_SCALE, GROWTH_INTERVAL - 1, True).after_success().scale == MAX_SCALE
    assert LossScale(MIN_SCALE, 0, True).after_overflow().scale == MIN_SCALE
    assert not LossScale(MIN_SCALE, 0, True).can_fall


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_number_types_have_a_scale_that_does_nothing(dtype: torch.dtype) -> None:
    scale, loss = LossScale.of(dtype), torch.tensor(0.3)
    assert scale.after_success() == scale.after_overflow() == scale
    assert scale.scaled(loss) is loss
    assert not scale.can_fall


def updated(policy: Policy, epochs: int = 1) -> dict[str, float]:
    optimizer = torch.optim.AdamW(policy.trainable, weight_decay=0.0)
    batch = pack(made_up_groups(), OBJECTIVES["grpo"], 60)
    figures, _ = update_policy(
        policy, optimizer, OBJECTIVES["grpo"], batch, UpdateSettings(3, EVERYTHING, 1e-3, 1.0, epochs)
    )
    return figures


def test_a_scale_that_is_too_high_costs_passes_and_no_step() -> None:
    policy = half(make_policy())
    low, high = copy.deepcopy(policy), copy.deepcopy(policy)
    low.loss_scale, high.loss_scale = LossScale(256.0, 0, True), LossScale(2.0**24, 0, True)
    figures = [updated(one) for one in (low, high)]
    assert [each["skipped"] for each in figures] == [0, 0]
    assert high.loss_scale.scale < 2.0**24
    assert figures[0]["grad_norm"] == pytest.approx(figures[1]["grad_norm"], rel=1e-2)
    assert figures[0]["loss"] == figures[1]["loss"]


def test_a_gradient_that_is_not_finite_at_any_scale_is_a_failure_and_leaves_the_scale() -> None:
    policy = half(make_policy())
    before = [weight.detach().clone() for weight in policy.trainable]
    policy.trainable[0].register_hook(lambda found: found * float("nan"))
    assert updated(policy)["skipped"] == 1
    assert policy.loss_scale == HALF
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trainable, strict=True))


def test_a_loss_that_is_not_finite_is_a_failure_after_one_pass() -> None:
    policy, passes = half(make_policy()), []
    with torch.no_grad():
        policy.trainable[0].fill_(torch.inf)
    policy.model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    assert updated(policy)["skipped"] == 1
    assert len(passes) == 1


def half_recipe(folder: Path, steps: int = 4) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(folder), dtype="float16"),
        lora=AdapterConfig(rank=8, alpha=16),
        rollout=RolloutConfig(prompts=3, completions=4, max_tokens=8),
        train=TrainConfig(steps=steps, lr=2e-2, tokens_per_pass=90),
        save=SaveConfig(every=2),
    )


def test_a_model_in_float16_learns_under_a_float32_adapter(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    policy = train(half_recipe(tiny_folder(), steps=15), run)
    assert policy.dtype == torch.float16
    assert {weight.dtype for weight in policy.trainable} == {torch.float32}
    rewards = [json.loads(line)["reward"] for line in run.metrics.read_text().splitlines()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_a_resumed_run_goes_on_with_the_scale_that_it_had_reached(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigrpo.models.loss_scale.GROWTH_INTERVAL", 3)
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    expected = train(half_recipe(tiny_folder(), steps=4), whole)
    train(half_recipe(tiny_folder(), steps=2), cut)
    found = train(half_recipe(tiny_folder(), steps=4), cut)
    assert found.loss_scale == expected.loss_scale == LossScale(2 * INITIAL_SCALE, 1, True)
    assert all(torch.equal(a, b) for a, b in zip(expected.trainable, found.trainable, strict=True))
