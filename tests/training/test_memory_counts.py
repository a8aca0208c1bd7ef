"""What a plan counts on meta tensors is counted once a run, and a plan made from it is the plan made afresh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minigrpo.config.schema import Recipe
from minigrpo.training.memory import counts, planner
from minigrpo.training.memory.planner import Device, make_plan
from tests.helpers.tiny import tiny_config

DEVICE = Device("cpu", torch.float32, 8 << 30)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often each count is made, from now on, with nothing kept from before."""
    monkeypatch.setattr(counts, "_kept", {})
    made: Counter[str] = Counter()

    def counting(name: str, count: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: made.update([name]) or count(*given, **named)

    monkeypatch.setattr(counts, "training_pass", counting("pass", counts.training_pass))
    monkeypatch.setitem(counts.ROLLOUT_COSTS, "native", counting("rollout", counts.native_rollout_cost))
    monkeypatch.setattr(counts, "meta_policy", counting("model", counts.meta_policy))
    return made


def with_train(recipe: Recipe, **knobs: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=knobs)})


def test_the_plans_of_a_run_count_each_pass_and_rollout_once(counted: Counter[str]) -> None:
    config, recipe = tiny_config("qwen2"), Recipe()
    first = make_plan(config, recipe, DEVICE, 20)
    before = Counter(counted)
    assert before["model"] == before["pass"] == 1
    again = make_plan(config, recipe, DEVICE, 20)
    make_plan(config, with_train(recipe, tokens_per_pass=first.tokens_per_pass), replace(DEVICE, free=7 << 30), 20)
    assert (again, counted) == (first, before)


@pytest.mark.parametrize(
    "changed",
    [
        lambda config, recipe: (tiny_config("qwen2", num_hidden_layers=3), recipe, 20),
        lambda config, recipe: (config, recipe, 31),
        lambda config, recipe: (config, with_train(recipe, full=True), 20),
        lambda config, recipe: (config, recipe.model_copy(update={"rollout": longer(recipe)}), 20),
    ],
    ids=["another model", "a longer prompt", "all weights trained", "longer completions"],
)
def test_what_changes_a_count_is_counted_anew(
    changed: Callable[[Any, Recipe], tuple[Any, Recipe, int]], counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, recipe = tiny_config("qwen2"), Recipe()
    before = make_plan(config, recipe, DEVICE, 20)
    other, knobs, prompt = changed(config, recipe)
    after = make_plan(other, knobs, DEVICE, prompt)
    monkeypatch.setattr(counts, "_kept", {})
    assert after == make_plan(other, knobs, DEVICE, prompt)
    assert after.lines != before.lines


def longer(recipe: Recipe) -> Any:
    return recipe.rollout.model_copy(update={"max_tokens": recipe.rollout.max_tokens * 2})


def test_a_pass_of_the_most_useful_size_is_not_counted_again_with_activations_recomputed(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed activations would leave room for more tokens a pass, of which a CPU has no use."""
    monkeypatch.setattr(planner, "CPU_PASS_WORK", 0)  # at most 1,024 tokens: one group of 619
    knobs = {"prompts": 4, "completions": 2, "max_tokens": 300}
    recipe = Recipe().model_copy(update={"rollout": Recipe().rollout.model_copy(update=knobs)})
    plan = make_plan(tiny_config("qwen2"), recipe, DEVICE, 20)
    assert (plan.pass_tokens, plan.tokens_per_pass, plan.recompute) == (619, 1024, False)
    assert counted["pass"] == 1


def test_only_the_counts_of_two_models_are_kept(counted: Counter[str]) -> None:
    for layers in (1, 2, 3, 1):
        make_plan(tiny_config("qwen2", num_hidden_layers=layers), Recipe(), DEVICE, 20)
    assert len(counts._kept) == counts.KEPT
    assert counted["model"] == 4


def test_a_path_that_is_no_utf8_is_counted_like_any_other() -> None:
    """What a name's bytes become where they have no characters."""
    recipe = Recipe().model_copy(update={"model": Recipe().model.model_copy(update={"path": "caf\udcc3"})})
    assert make_plan(tiny_config("qwen2"), recipe, DEVICE, 20) == make_plan(tiny_config("qwen2"), Recipe(), DEVICE, 20)
