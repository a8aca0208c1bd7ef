"""Engines say on a pretended GPU what they say on the CPU, token for token, at a known price."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_table
from benchmarks.cards import CARDS
from minigrpo.rollouts.engines.cuda_graph import CHECK_EVERY
from tests.helpers.tiny import LLAMA_LIKE
from tests.rehearsal.conftest import Play, saved

pytestmark = pytest.mark.needs("pretended_gpu")

Folder = Callable[..., Path]
PAGE = gpu_table.PAGE.read_text(encoding="utf-8")

LAUNCHES_A_LAYER = 56
"""Kernels of a layer and token in a graph of the slot engine: a layer of Qwen2 in 16 bit, with adapters everywhere."""
LAUNCHES_BESIDES = 72
"""Those of embedding, masks, head and drawing from a vocabulary of up to 1,024 tokens."""
NATIVE_LAUNCHES_A_LAYER = 64
LAUNCHES_A_LAYER_BY_KIND: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "RMSNorm, twice": (14, ("Norm.__call__", "UnitRms.__call__")),
    "products with the base's weights": (7, ("Projection.parts.<locals>.<listcomp>",)),
    "products with the adapters'": (11, ("Projection.parts",)),
    "q, k and v put together": (1, ("Projection.__call__",)),
    "rotation of q and k": (3, ("Decoder._project",)),
    "attention, its cache written": (16, ("Step._attend", "Step._to_grid", "Step._from_grid")),
    "residuals added": (2, ("Projection.add_to",)),
    "activation, and its product": (2, ("Decoder._mlp",)),
}
"""The same by what they are for, with the functions of ours that launch them: the list of docs/gpu.md."""


def ids(rounds: list[list[list[list[Any]]]]) -> list[Any]:
    return [[tokens, finish] for round_ in rounds for own in round_ for tokens, _, finish in own]


@pytest.mark.parametrize("engine", ["native", "slots", "transformers"])
def test_each_engine_says_what_it_says_on_the_cpu(engine: str, play: Play, tiny_folder: Folder) -> None:
    found = play("engines", "T4", folder=str(tiny_folder()), engine=engine, dtype="float32")
    assert found["device"] == "cuda:0"
    assert found["launches"] > 100
    assert (found["replays"] > 50) == (engine == "slots")
    assert ids(found["gpu"]) == ids(found["cpu"])
    assert ids(found["gpu"][:1]) != ids(found["gpu"][1:])  # the second round has other weights


@pytest.mark.parametrize(("card", "dtype"), [("T4", "float16"), ("L4", "bfloat16"), ("H100", "bfloat16")])
def test_auto_takes_graphs_and_the_cards_own_number_type(
    card: str, dtype: str, play: Play, tiny_folder: Folder
) -> None:
    found = play("engines", card, folder=str(tiny_folder()), engine="auto", dtype="auto")
    assert (found["engine"], found["dtype"]) == ("slots", dtype)
    assert found["gpu"] == found["cpu"]  # log-probabilities, too: the same arithmetic in the same order
    assert ids(found["gpu"][:1]) != ids(found["gpu"][1:])
    assert found["graphs"] >= 3
    assert (found["streams"], found["pools"], found["modes"]) == (1, 1, ["thread_local"])


def test_the_second_card_is_the_current_one_where_it_is_named(play: Play, tiny_folder: Folder) -> None:
    found = play("engines", "T4", folder=str(tiny_folder()), engine="auto", dtype="auto", device="cuda:1")
    assert found["device"] == "cuda:1"
    assert found["replays"] > 50
    assert found["gpu"] == found["cpu"]


def test_an_evaluation_does_not_throw_trainings_graphs_away(play: Play, tiny_folder: Folder) -> None:
    captured = play("shapes", "T4", folder=str(tiny_folder()))["captured"]
    assert min(captured[:2]) > 0
    assert captured[2:] == [0, 0]


def test_a_token_costs_no_more_launches_and_synchronizations_than_these(
    play: Play, tmp_path: Path, tiny_folder: Folder
) -> None:
    folders = {2: str(tiny_folder()), 4: str(saved(tmp_path / "four", "qwen2", num_hidden_layers=4))}
    found = play("a_token", "T4", folders=folders)
    slots, native = found["slots"], found["native"]
    a_layer = (slots["4"] - slots["2"]) / 2
    assert a_layer <= LAUNCHES_A_LAYER
    assert slots["2"] - 2 * a_layer <= LAUNCHES_BESIDES
    assert (native["4"] - native["2"]) / 2 <= NATIVE_LAUNCHES_A_LAYER
    assert set(found["native_waits"].values()) == {1}  # a token, where no row ends
    assert (a_layer, slots["2"] - 2 * a_layer) == (gpu_table.GRAPH_LAUNCHES, gpu_table.TOKEN_LAUNCHES)
    assert (native["4"] - native["2"]) / 2 == gpu_table.NATIVE_LAUNCHES
    kinds = {name: (n - found["kinds"]["2"][name]) / 2 for name, n in found["kinds"]["4"].items()}
    for kind, (launches, functions) in LAUNCHES_A_LAYER_BY_KIND.items():
        assert sum(n for name, n in kinds.items() if name.partition(":")[2] in functions) == launches, kind
        assert f"| {kind} | {launches} |" in PAGE
    assert sum(launches for launches, _ in LAUNCHES_A_LAYER_BY_KIND.values()) == a_layer
    # In 64 tokens of which none ends a row. What begins a rollout copies from main memory, and waits for nothing.
    assert sum(found["synchronizations"].values()) <= 64 / CHECK_EVERY, found["synchronizations"]
    assert sum(found["host_copies"].values()) <= 8, found["host_copies"]


@pytest.mark.parametrize("card", CARDS)
def test_the_page_says_what_a_card_takes(card: str, play: Play, tiny_folder: Folder) -> None:
    found = play("choices", card, recipe="gsm8k-fast", folder=str(tiny_folder()), changes={})
    assert f"\n| {card} | {found['dtype']} | {found['engine']} |" in table_of("gsm8k-fast")


@pytest.mark.extra("qlora")
@pytest.mark.long
def test_the_page_says_what_a_card_takes_with_weights_in_four_bit(play: Play, tiny_folder: Folder) -> None:
    card = "RTX 3060"  # too small for the recipe in 16 bit
    changes = {"model.quantize": "nf4"}
    found = play("choices", card, recipe="sudoku-ministral", folder=str(tiny_folder("ministral3")), changes=changes)
    row = f"\n| {card} | {found['dtype']}, `--model.quantize nf4` | {found['engine']} |"
    assert row in table_of("sudoku-ministral")


def table_of(recipe: str) -> str:
    """Return what the page says of a recipe, card by card."""
    return PAGE.partition(gpu_table.BEGIN)[2].partition(f"\n`{recipe}`,")[2].partition("\n`")[0]


@pytest.mark.long
@pytest.mark.parametrize("card", ["T4", "L4"])
@pytest.mark.parametrize("engine", ["native", "slots", "transformers"])
@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_every_architecture_and_engine_in_the_cards_own_number_type(
    arch: str, engine: str, card: str, play: Play, tiny_folder: Folder
) -> None:
    found = play("engines", card, folder=str(tiny_folder(arch)), engine=engine, dtype="auto")
    assert found["device"] == "cuda:0"
    assert ids(found["gpu"]) == ids(found["cpu"])
