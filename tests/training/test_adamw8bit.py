"""Moments in 8 bit: nearly the same steps, a quarter of the memory, and a resume that nobody can tell."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigrpo.config.schema import AdapterConfig, ModelConfig, Recipe, RolloutConfig, SaveConfig, TrainConfig
from minigrpo.errors import ModelError
from minigrpo.models.policy import open_policy
from minigrpo.models.quantize import eight_bit_adamw, moment_bytes
from minigrpo.runs.rundir import RunDir
from minigrpo.training.grpo import open_optimizer
from minigrpo.training.memory.planner import Device, make_plan
from tests.helpers.tiny import tiny_config
from tests.models.test_quantize import train

pytestmark = pytest.mark.extra("qlora")


def recipe_for(folder: Path, steps: int = 4) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(folder)),
        lora=AdapterConfig(rank=128, alpha=128),  # small layers: at this rank their moments are packed
        rollout=RolloutConfig(prompts=3, completions=4, max_tokens=8),
        train=TrainConfig(steps=steps, lr=2e-3, tokens_per_pass=90, optimizer="adamw8bit"),
        save=SaveConfig(every=2),
    )


def test_steps_are_nearly_those_of_adamw() -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(128, 64, generator=draw)
    moved = []
    for make in (torch.optim.AdamW, eight_bit_adamw):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)  # type: ignore[operator]
        noise = torch.Generator().manual_seed(1)
        for _ in range(10):
            weight.grad = start + torch.randn(128, 64, generator=noise)
            optimizer.step()
        moved.append(weight.detach() - start)
    assert not torch.equal(*moved)
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.05


def test_a_resumed_run_ends_at_the_same_bits(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    expected = train(recipe_for(tiny_folder()), whole)
    train(recipe_for(tiny_folder(), steps=2), cut)
    found = train(recipe_for(tiny_folder()), cut)
    assert all(torch.equal(a, b) for a, b in zip(expected.trainable, found.trainable, strict=True))


def test_the_moments_take_the_bytes_that_the_plan_counts(tiny_folder: Callable[..., Path]) -> None:
    recipe = recipe_for(tiny_folder())
    policy = open_policy(recipe)
    optimizer = open_optimizer(recipe.train, policy)
    for parameter in policy.trainable:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = ("state1", "state2", "absmax1", "absmax2")
    held = sum(state[name].nbytes for state in optimizer.state.values() for name in names if name in state)
    assert held == moment_bytes(policy.trainable, "adamw8bit")
    assert held < 0.5 * moment_bytes(policy.trainable, "adamw")


def test_the_plan_shows_what_is_spared() -> None:
    lines = []
    for optimizer in ("adamw", "adamw8bit"):
        recipe = Recipe(train=TrainConfig(optimizer=optimizer), lora=AdapterConfig(rank=128))  # type: ignore[arg-type]
        config = tiny_config("qwen2", hidden_size=256, intermediate_size=512)
        lines.append(make_plan(config, recipe, Device("cuda", torch.bfloat16, 10**10), 20).line("optimizer"))
    assert 0.24 < lines[1] / lines[0] < 0.27


def test_without_bitsandbytes_the_knob_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"train\.optimizer adamw8bit needs bitsandbytes.*pip install"):
        eight_bit_adamw([torch.nn.Parameter(torch.ones(2))], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
