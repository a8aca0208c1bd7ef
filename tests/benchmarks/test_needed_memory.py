"""What the proof takes is counted before a model is loaded, and the proof goes the way that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import needed_memory, proof
from benchmarks.cards import CARDS
from benchmarks.models import SHAPES, config_of
from benchmarks.needed_memory import BESIDE, SPARE, must_recompute, passes_that_fit, proof_bytes
from benchmarks.ours import recipe_of
from benchmarks.sides import BenchmarkError, Setup
from benchmarks.trls import trainer_options
from benchmarks.workloads import WORKLOADS
from minigrpo.training.memory.machine import gpu_of_size, recomputes

MINI = WORKLOADS["mini"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("needed")
    MINI.kind.make(folder / "mini")
    return Setup(MINI, folder / "mini", folder / "runs", threads=1, dtype="float32", steps=1)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many bytes be free."""
    return lambda size: monkeypatch.setattr(needed_memory, "free_memory", lambda device: int(size))


def needed(name: str, limit: int, *, recompute: bool) -> int:
    workload = replace(WORKLOADS[name].on_gpu(), limit=limit)
    recipe = recipe_of(Setup(workload, Path("-"), Path("-"), 1, "float32", 1, "cuda"), lora__dropout=0.0)
    config = config_of(SHAPES[name])
    return proof_bytes(config, recipe, workload.prompt_tokens, "cuda", recompute=recompute)


def test_the_proof_of_3b_fits_a_card_of_24_gb_with_activations_recomputed() -> None:
    limit = WORKLOADS["3b"].limit
    kept, recomputed = (needed("3b", limit, recompute=recompute) for recompute in (False, True))
    assert SPARE * recomputed < gpu_of_size(CARDS["L4"].memory / 1e9, torch.float32).free < SPARE * kept


def counted(setup: Setup) -> tuple[int, int]:
    """Return what mini's proof takes, with activations kept and recomputed."""
    config, prompt = needed_memory.facts_of(setup, prompts=1)
    recipe = recipe_of(setup, lora__dropout=0.0)
    kept, recomputed = (proof_bytes(config, recipe, prompt, "cpu", recompute=way) for way in (False, True))
    return kept, recomputed


def test_activations_are_recomputed_where_they_have_no_room_and_where_the_model_has_none_that_is_said(
    setup: Setup, free: Callable[[float], None]
) -> None:
    recipe = recipe_of(setup, lora__dropout=0.0)
    kept, recomputed = counted(setup)
    assert recomputed < kept
    for size, way in ((SPARE * kept, False), (SPARE * kept - 2, True), (SPARE * recomputed, True)):
        free(size)
        assert must_recompute(setup, recipe) is way
    free(SPARE * recomputed - 2)
    with pytest.raises(BenchmarkError, match=r"workload mini computes in float32: it takes .* GB are free.*--no-proof"):
        must_recompute(setup, recipe)


def test_trl_takes_a_step_in_as_few_passes_as_fit_and_they_add_up_to_it(
    setup: Setup, free: Callable[[float], None]
) -> None:
    rows = MINI.prompts * MINI.completions
    found = []
    for size in (6e6, 4e6, 3e6):  # counted: 5.5 MB for four rows at once, 3.5 for two, 2.4 for one
        free(size / (1 - BESIDE))
        found.append(passes_that_fit(setup))
        options = trainer_options(replace(setup, passes=found[-1]))
        assert options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] == rows
    assert found == [1, 2, 4]
    free(2e6)
    with pytest.raises(BenchmarkError, match=r"TRL takes .* for workload mini with one completion a pass"):
        passes_that_fit(setup)


def test_with_autocast_a_pass_is_counted_in_the_wider_type(setup: Setup, free: Callable[[float], None]) -> None:
    free(6e6 / (1 - BESIDE))
    assert passes_that_fit(replace(setup, dtype="bfloat16+autocast")) == passes_that_fit(setup) == 1
    free(5e6 / (1 - BESIDE))
    assert passes_that_fit(replace(setup, dtype="bfloat16")) == 1
    assert passes_that_fit(replace(setup, dtype="bfloat16+autocast")) == 2


@pytest.mark.extra("bench")
@pytest.mark.parametrize("way", ["kept", "recomputed"])
def test_the_proof_goes_the_way_that_fits_with_all_tokens_of_its_first_prompt(
    way: str, setup: Setup, free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own pass, which takes long to load, stands for itself in tests/rehearsal/test_users.py."""
    seen: list[bool] = []

    def same(setup: Setup, model: Any, groups: Any) -> None:
        seen.append(recomputes(type("Policy", (), {"model": model})))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(proof, "backward_with_trl", same)
    free(SPARE * dict(zip(("kept", "recomputed"), counted(setup), strict=True))[way])
    assert proof.prove(setup).tokens == sum(MINI.lengths_B[: MINI.completions])
    assert seen == [way == "recomputed"]
