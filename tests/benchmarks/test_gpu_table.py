"""The tables of docs/gpu.md: memory is the planner's own, time follows from what a card is said to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_table
from benchmarks.cards import CARDS
from benchmarks.gpu_table import (
    BANDWIDTH_SHARE,
    CASES,
    PAGE,
    engine_of,
    estimate,
    layers_of,
    model_config,
    planned,
    rounded,
    row_of,
    seconds_of,
    seconds_of_rollout,
    seconds_of_run,
    seconds_of_step,
    span,
    tables,
    with_tables,
)
from benchmarks.shapes import Lengths, Shape, decode
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.delivery.parity import place
from minigrpo.delivery.parity.place import SPARE, model_bytes, pick_proof_place
from minigrpo.errors import ModelError
from minigrpo.models.loading import model_class
from minigrpo.models.model_files import BaseFiles
from minigrpo.training.memory.planner import Plan

FAST = CASES[0]
SUDOKU = PAGE.parents[1] / "notebooks/sudoku_colab.ipynb"


def plan_of(**values: object) -> Plan:
    """A plan of which only what time depends on matters."""
    facts = {
        "recompute": False,
        "budget": 0,
        "prompt": 0,
        "completion": 0,
        "tokens_per_pass": 4096,
        "pass_tokens": 4096,
        "rows": 256,
    }
    return Plan("cuda", "float16", lines=(), **{**facts, **values})  # type: ignore[arg-type]


def test_a_row_of_the_page_is_what_the_plan_and_the_estimate_say_now() -> None:
    assert f"| {' | '.join(row_of(estimate(FAST, 'H100')))} |" in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_row_of_the_page_is_what_the_plan_and_the_estimate_say_now() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, tables()) == page


@pytest.mark.long
def test_the_notebook_for_sudoku_says_what_the_plan_and_the_estimate_say_of_colabs_cards() -> None:
    told = " ".join(SUDOKU.read_text(encoding="utf-8").replace('\\n",\n    "', " ").split())
    case, t4 = CASES[-1], CARDS["T4"]
    wide, packed = (load_recipe(case.recipe, {"model.quantize": kind}) for kind in ("none", "nf4"))
    plans = [planned(case, t4, wide), planned(case, t4, packed)]
    large = planned(case, CARDS["L4"], wide)
    assert all(plan.fits for plan in (*plans, large))
    gigabytes = [f"{size / 1e9:.1f}" for size in (large.peak, t4.memory, *(plan.peak for plan in plans))]
    assert "takes {} GB of an L4. A T4 ({} GB) holds it in 16 bit, too, in {} GB;".format(*gigabytes) in told
    assert f"it takes {gigabytes[3]} GB there and, by estimate, about half of the time" in told
    hours = [
        seconds_of_run(case, t4, recipe, plan, engine_of(case, recipe), long=True)
        for recipe, plan in zip((wide, packed), plans, strict=True)
    ]
    assert 0.4 < hours[1] / hours[0] < 0.6


def test_colabs_main_memory_has_room_for_ministrals_proof_in_16_bits_and_says_so_where_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = model_class(model_config("3b")).from_config(model_config("3b"), dtype=torch.bfloat16)
    tensors: Any = dict(model.named_parameters())
    base = BaseFiles(tmp_path, {}, {}, tensors, torch.bfloat16)
    told = SUDOKU.read_text(encoding="utf-8")
    for dtype, words in ((torch.bfloat16, "it takes {:.1f} in the"), (torch.float32, "and {:.1f} in float32")):
        assert words.format(SPARE * model_bytes(base, dtype) / 1e9) in told
    monkeypatch.setattr(place, "free_memory", lambda device: int(12.7e9 - 3e9))
    assert pick_proof_place(base, torch.device("cpu")).dtype == torch.bfloat16
    monkeypatch.setattr(place, "free_memory", lambda device: int(12.7e9 - 5e9))
    with pytest.raises(ModelError, match="restart a notebook that has trained"):
        pick_proof_place(base, torch.device("cpu"))


def test_the_vision_part_that_is_loaded_beside_ministral_has_the_parameters_that_its_card_names() -> None:
    config = model_config("3b")
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=torch.bfloat16)
    beside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.get_decoder().parameters())
    assert beside == pytest.approx(0.4e9, rel=0.1)


def test_a_token_of_one_row_takes_its_weights_over_the_bandwidth() -> None:
    card, shape = CARDS["T4"], Shape.of(model_config("half"))
    work = decode(shape, Lengths((2,), ((1,),)), 0)
    reading = 2 * shape.entries / (BANDWIDTH_SHARE * card.bandwidth)
    assert seconds_of(card, work) == pytest.approx(reading, rel=1e-3)
    packed = seconds_of(card, work, layers_of(shape))
    head = 2 * shape.vocab * shape.hidden / (BANDWIDTH_SHARE * card.bandwidth)
    assert packed - head == pytest.approx((reading - head) * gpu_table.PACKED_BYTES / 2, rel=1e-2)


def test_what_is_launched_one_by_one_takes_longer_than_a_graph_on_a_quick_card() -> None:
    recipe, lengths = load_recipe("gsm8k-fast"), Lengths((213,) * 8, ((150, 150),) * 8)
    graph, single = (seconds_of_rollout(FAST, CARDS["H100"], recipe, engine, lengths) for engine in ("slots", "native"))
    assert 2 < single / graph < 10
    assert seconds_of_rollout(FAST, CARDS["T4"], recipe, "slots", lengths) > 1.5 * graph


def test_a_step_takes_longer_with_longer_answers_groups_tried_again_and_activations_recomputed() -> None:
    recipe, card = load_recipe("gsm8k-fast"), CARDS["T4"]
    again = load_recipe("gsm8k-fast", {"groups.resample": "1.0"})

    def seconds(own: Recipe = recipe, *, long: bool = True, **plan: object) -> float:
        return seconds_of_step(FAST, card, own, plan_of(**plan), "slots", long=long)

    assert 1.5 < seconds() / seconds(long=False) < 2.5
    assert 1.5 < seconds(again) / seconds() < 2
    assert seconds(again, long=False) == seconds(long=False)
    assert seconds(recompute=True) > 1.05 * seconds()
    assert seconds(rows=4) > 2 * seconds()
    packed = load_recipe("gsm8k-fast", {"model.quantize": "nf4"})
    # 8 prompts and 16 answers of 300 are 6,496 tokens: 13 passes or 2, each of which unpacks all layers twice.
    shape = Shape.of(model_config("half"))
    unpacking = 2 * (gpu_table.PACKED_BYTES + 2) * (shape.entries - shape.vocab * shape.hidden)
    more = seconds(packed, pass_tokens=512) - seconds(packed)
    assert more == pytest.approx((13 - 2) * unpacking / (BANDWIDTH_SHARE * card.bandwidth), rel=1e-3)


def test_a_span_has_two_digits_and_the_unit_of_its_longer_end() -> None:
    assert span((0.05, 0.1)) == "3.0 to 6.0 min"
    assert span((0.55, 2.345)) == "0.6 to 2.3 h"
    assert [rounded(value) for value in (0.04, 0.6, 9.96, 31.4, 118.2)] == ["0.04", "0.6", "10.0", "31", "118"]


def test_a_page_without_its_marks_is_refused_and_the_rest_of_it_stays() -> None:
    page = f"before\n{gpu_table.BEGIN}\n\nold\n\n{gpu_table.END}\nafter"
    assert with_tables(page, "new") == page.replace("old", "new")
    with pytest.raises(AssertionError, match="one place"):
        with_tables("nothing", "new")
