"""The number type of a model's weights, where the recipe leaves the choice open."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minigrpo.errors import ModelError
from minigrpo.models import loading
from minigrpo.models.loading import LARGE_WIDTH, pick_dtype
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
def test_where_every_parameter_is_trained_weights_stay_in_float32() -> None:
    assert pick_dtype("auto", CPU, config(LARGE_WIDTH), full=True) == torch.float32


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
