"""Training on a pretended GPU: the CPU's first step, the same again from a checkpoint, and few synchronizations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_table
from minigrpo.config.load import load_recipe, recipe_names
from minigrpo.models.logprobs import GPU_CHUNK_LOGITS
from tests.rehearsal.conftest import Play, saved

pytestmark = pytest.mark.needs("pretended_gpu")

Folder = Callable[..., Path]

SYNCHRONIZATIONS = 3
"""Times that an update may let the host wait for the GPU, however many passes it has."""
COUNTED_SYNCHRONIZATIONS = 2
"""What the page says of them."""
HOST_COPIES_A_PASS = 8
LINEAR_LAYERS = 2 * 7
"""Of the tiny models' two layers; the head is none of them."""
EIGHT_BIT_MAPS = 2
"""Maps between 8 bit and numbers, which bitsandbytes' optimizer copies to the GPU in its first step."""
LAUNCHES_A_LAYER_AND_PASS = {"kept": 235, "recomputed": 336}
"""Forward and backward, a layer of Qwen2 in 16 bit with adapters everywhere; with its activations recomputed."""
LAUNCHES_BESIDES = 80
"""Those of embedding, norm and head, and of the last layer, whose prompt tokens are cut off and replaced by zeros."""
HEAD_LAUNCHES = 24
"""Of a piece of logits in 16 bit, forward, its gradient included."""
CLOSE = {"loss": (0.0, 5e-3), "grad_norm": (0.02, 0.0), "entropy": (0.01, 0.0), "reward": (1e-9, 0.0)}
"""Relative and absolute distance of the first step's figures to the CPU's: in 16 bit attention and its gradient round
otherwise. The loss is a sum of advantages that cancel out, near 0."""

CHANGES: Mapping[str, Mapping[str, str]] = {
    "gsm8k-best": {"objective.overlong": "4", "eval.every": "1", "eval.held_out": "4"},
    "gsm8k-full": {"model.dtype": "float32"},
}
"""Knobs that make sense at the recipe's own size only."""
ARCHITECTURES = {"gsm8k": "qwen2", "sudoku-ministral": "ministral3", "quickstart": "qwen3", "sudoku-tiny": "qwen3"}
DTYPES = {"T4": "float16", "L4": "bfloat16", "H100": "bfloat16"}


def rehearse(recipe: str, card: str, play: Play, tiny_folder: Folder, **more: str) -> dict[str, Any]:
    arch = next(arch for name, arch in ARCHITECTURES.items() if recipe.startswith(name))
    changes = {**CHANGES.get(recipe, {}), **more}
    found: dict[str, Any] = play("train", card, recipe=recipe, folder=str(tiny_folder(arch)), changes=changes)
    return found


def judge(found: dict[str, Any], recipe: str, card: str, engine: str = "slots") -> None:
    """Compare the run with the CPU's and with itself, resumed."""
    own = load_recipe(recipe)
    auto = "float32" if own.train.full else DTYPES[card]
    assert found["device"] == "cuda:0"
    assert (found["engine"], found["dtype"]) == (engine, auto if own.model.dtype == "auto" else own.model.dtype)
    assert (found["scale"] > 1) == (found["dtype"] == "float16")
    first, second = found["whole"]["figures"]
    assert first["skipped"] == second["skipped"] == 0
    on_cpu = found["cpu"]["figures"][0]
    assert found["whole"]["texts"][: len(found["cpu"]["texts"])] == found["cpu"]["texts"]
    for name, (relative, absolute) in CLOSE.items():
        assert first[name] == pytest.approx(on_cpu[name], rel=relative, abs=absolute), name
    assert json.dumps(found["resumed"]) == json.dumps(found["whole"])


def hold_to_ceilings(found: dict[str, Any]) -> None:
    for update in found["updates"]:
        assert update["launches"] > 100
        assert sum(update["synchronizations"].values()) <= SYNCHRONIZATIONS, update["synchronizations"]
        assert sum(update["host_copies"].values()) <= HOST_COPIES_A_PASS * update["passes"], update["host_copies"]


def test_a_t4_trains_in_float16_with_a_scaled_loss_and_resumes(play: Play, tiny_folder: Folder) -> None:
    found = rehearse("gsm8k-fast", "T4", play, tiny_folder)
    judge(found, "gsm8k-fast", "T4")
    hold_to_ceilings(found)
    assert max(update["passes"] for update in found["updates"]) > 1
    assert {sum(each["synchronizations"].values()) for each in found["updates"]} == {COUNTED_SYNCHRONIZATIONS}


def test_an_l4_trains_in_bfloat16_and_evaluates_in_between(play: Play, tiny_folder: Folder) -> None:
    found = rehearse("gsm8k-best", "L4", play, tiny_folder)
    judge(found, "gsm8k-best", "L4")
    hold_to_ceilings(found)
    assert "eval/accuracy" in found["whole"]["figures"][0]


def test_a_pass_launches_no_more_than_these(play: Play, tmp_path: Path) -> None:
    folders = {layers: str(saved(tmp_path / str(layers), "qwen2", num_hidden_layers=layers)) for layers in (2, 4)}
    found = play("a_pass", "T4", folders=folders)
    for way, ceiling in LAUNCHES_A_LAYER_AND_PASS.items():
        a_layer = (found[way]["4"] - found[way]["2"]) / 2
        assert a_layer <= ceiling, way
        assert found[way]["2"] - 2 * a_layer <= LAUNCHES_BESIDES
    estimated = gpu_table.PASS_LAUNCHES, gpu_table.RECOMPUTED_LAUNCHES, gpu_table.HEAD_LAUNCHES
    assert estimated == (*LAUNCHES_A_LAYER_AND_PASS.values(), LAUNCHES_BESIDES)


def test_the_head_scores_in_few_large_pieces(play: Play, tiny_folder: Folder) -> None:
    found = play("scoring", "T4", folder=str(tiny_folder()))
    assert found["tokens"] == 40
    assert 5 < found["launches"] <= HEAD_LAUNCHES
    a_token = HEAD_LAUNCHES / (GPU_CHUNK_LOGITS // 151_936)
    assert a_token == pytest.approx(0.1, rel=0.2)  # as the page says
    assert not found["synchronizations"]


@pytest.mark.extra("qlora")
@pytest.mark.long
def test_weights_in_four_bit_train_as_on_the_cpu_and_wait_no_oftener(play: Play, tiny_folder: Folder) -> None:
    found = rehearse("sudoku-ministral", "T4", play, tiny_folder, **{"model.quantize": "nf4"})
    judge(found, "sudoku-ministral", "T4", engine="native")
    assert found["packed"] == LINEAR_LAYERS
    assert all("bitsandbytes.dequantize_4bit.default" in update["bitsandbytes"] for update in found["updates"])
    hold_to_ceilings(found)


@pytest.mark.extra("qlora")
@pytest.mark.long
def test_moments_in_eight_bit_train_as_on_the_cpu_and_wait_once_a_trained_tensor(
    play: Play, tiny_folder: Folder
) -> None:
    large = {"train.optimizer": "adamw8bit", "lora.rank": "128", "lora.targets": "all-linear"}
    found = rehearse("gsm8k-fast", "L4", play, tiny_folder, **large)
    judge(found, "gsm8k-fast", "L4")
    for update in found["updates"]:
        assert "bitsandbytes.optimizer_update_8bit_blockwise.default" in update["bitsandbytes"]
        own = {site: n for site, n in update["synchronizations"].items() if "torch.cuda.synchronize" not in site}
        assert sum(own.values()) <= SYNCHRONIZATIONS + EIGHT_BIT_MAPS, own
        assert sum(update["synchronizations"].values()) - sum(own.values()) == 2 * LINEAR_LAYERS


@pytest.mark.long
@pytest.mark.parametrize("card", DTYPES)
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_packaged_recipe_takes_its_first_steps_on_every_card(
    recipe: str, card: str, play: Play, tiny_folder: Folder
) -> None:
    found = rehearse(recipe, card, play, tiny_folder)
    judge(found, recipe, card)
    hold_to_ceilings(found)


@pytest.mark.long
def test_options_that_no_recipe_takes_hold_on_a_t4_too(play: Play, tiny_folder: Folder) -> None:
    options = {"entropy": "0.01", "kl": "0.02"}
    more = {
        **{f"objective.{name}": value for name, value in options.items()},
        "train.inner_epochs": "2",
        "lora.dropout": "0",
    }
    judge(rehearse("gsm8k-fast", "T4", play, tiny_folder, **more), "gsm8k-fast", "T4")
