"""The number type of a model's weights, where the recipe leaves the choice open."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from minigrpo.config.schema import Recipe
from minigrpo.errors import ModelError
from minigrpo.models import loading
from minigrpo.models.loading import LARGE_WIDTH, pick_dtype
from minigrpo.models.policy import open_policy
from minigrpo.training.memory.estimate import forecast
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "bfloat16_instructions", lambda: ("avx512_bf16",))
    monkeypatch.setattr(loading, "check_dtype_support", lambda dtype: None)


def config(width: int) -> Any:
    return tiny_config("qwen2", hidden_size=width)


@pytest.mark.usefixtures("hardware")
def test_a_cpu_with_bfloat16_takes_it_for_large_models_only() -> None:
    assert pick_dtype("auto", CPU, config(LARGE_WIDTH)) == torch.bfloat16
    assert pick_dtype("auto", CPU, config(LARGE_WIDTH // 2)) == torch.float32


@pytest.mark.usefixtures("hardware")
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "mps"])
def test_where_every_parameter_is_trained_weights_stay_in_float32_on_any_device(device: str) -> None:
    assert pick_dtype("auto", torch.device(device), config(LARGE_WIDTH), full=True) == torch.float32


@pytest.mark.parametrize(("true_bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_takes_the_16_bits_that_its_hardware_has(
    true_bfloat16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: true_bfloat16)
    assert pick_dtype("auto", torch.device("cuda"), config(64)) == dtype


def test_full_training_in_16_bits_is_refused_before_anything_is_loaded_by_plan_and_run() -> None:
    recipe = Recipe(model={"path": "no/such/model", "dtype": "bfloat16"}, train={"full": True})  # type: ignore[arg-type]
    for open_recipe in (open_policy, forecast, partial(forecast, gpu_memory=15.0)):
        with pytest.raises(ModelError, match=r"model\.dtype is bfloat16: .* --model\.dtype auto"):
            open_recipe(recipe)


@pytest.mark.usefixtures("hardware")
def test_a_cpu_that_only_emulates_it_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "bfloat16_instructions", tuple)
    assert pick_dtype("auto", CPU, config(LARGE_WIDTH)) == torch.float32


@pytest.mark.usefixtures("hardware")
def test_a_machine_that_does_not_execute_what_it_announces_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dtype: str) -> None:
        raise ModelError("it would be killed")

    monkeypatch.setattr(loading, "check_dtype_support", refuse)
    assert pick_dtype("auto", CPU, config(LARGE_WIDTH)) == torch.float32
    with pytest.raises(ModelError, match="it would be killed"):
        pick_dtype("bfloat16", CPU, config(LARGE_WIDTH))
