"""The tables of docs/gpu.md: memory is the planner's own, time follows from what a card is said to do."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_table
from benchmarks.cards import CARDS
from benchmarks.gpu_table import (
    BANDWIDTH_SHARE,
    CASES,
    PAGE,
    estimate,
    layers_of,
    model_config,
    rounded,
    row_of,
    seconds_of,
    seconds_of_rollout,
    seconds_of_step,
    span,
    tables,
    with_tables,
)
from benchmarks.shapes import Lengths, Shape, decode
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.models.loading import model_class
from minigrpo.training.memory.planner import Plan

FAST = CASES[0]


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
