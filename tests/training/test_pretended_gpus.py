"""Plans on cards that are not here: as torch would describe them, number type and memory follow from the card."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minigrpo.config.load import load_recipe
from minigrpo.training.memory.estimate import forecast
from tests.helpers.cards import GB, H100, T4, Card, pretend


@pytest.mark.parametrize("card", [T4, H100], ids=["T4", "H100"])
def test_the_plan_of_a_gpu_has_the_number_type_that_its_run_will_have(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(card, monkeypatch)
    knobs = {"model.dtype": "auto", "rollout.prompts": 2, "rollout.completions": 2, "rollout.max_tokens": 16}
    found = {full: forecast(load_recipe("quickstart", {**knobs, "train.full": full})) for full in (True, False)}
    assert {full: plan.dtype for full, plan in found.items()} == {
        True: "float32",
        False: "bfloat16" if card.true_bfloat16 else "float16",
    }
    assert {plan.device for plan in found.values()} == {"cuda"}


@pytest.mark.parametrize("name", ["quickstart", "gsm8k-tiny", "sudoku-tiny"])
def test_the_embedded_models_train_in_float32_on_a_gpu_as_on_a_cpu(name: str) -> None:
    """Their figures in the documents were measured so."""
    assert load_recipe(name).model.dtype == "float32"


def test_what_torch_keeps_for_its_next_tensors_counts_as_free_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later stages of a process plan as the first one did, although the first one's memory was not given back."""
    recipe = load_recipe("quickstart", {"rollout.max_tokens": 16, "rollout.prompts": 2})
    pretend(T4, monkeypatch)
    first = forecast(recipe)
    pretend(replace(T4, free=GB // 10, cached=T4.free - GB // 10), monkeypatch)
    assert forecast(recipe) == first
    pretend(replace(T4, free=GB // 10), monkeypatch)  # another program has it
    assert forecast(recipe).budget < first.budget / 10
