"""The limit counts what a step must do: as many operations as torch counts while the step is done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models
from benchmarks.limit import Kernels
from benchmarks.ours import first_batch, open_engine, recipe_of
from benchmarks.shapes import Attention, Lengths, Product, Shape, Work, decode, phases, prefill, training
from benchmarks.sides import Setup
from benchmarks.workloads import WORKLOADS
from minigrpo.algorithms.objective import open_objective
from minigrpo.algorithms.packing import pack
from minigrpo.models import onednn
from minigrpo.models.policy import open_policy
from minigrpo.training.grpo import accumulate_gradient
from minigrpo.types import Sampling

aten: Any = torch.ops.aten
RANK = 4


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("limit")
    workload = WORKLOADS["mini"]
    workload.kind.make(folder / "mini")
    return Setup(workload, folder / "mini", folder / "runs", threads=1, dtype="float32", steps=1)


@pytest.fixture(autouse=True)
def _counted_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count without oneDNN, whose calls torch's counter does not know."""
    monkeypatch.setattr(onednn, "uses_onednn", lambda: False)


def counted(call: Any) -> tuple[int, int]:
    """Operations of all products with a plain right-hand side, and of the batched ones, which attention takes."""
    # torch counts addmm, but not where it adds in place.
    also = {aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=also) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    found = counter.get_flop_counts()["Global"]
    batched = found.pop(aten.bmm, 0) + found.pop(aten.baddbmm, 0)
    return sum(found.values()), batched


def products_of(work: Work, choice: int = 0) -> int:
    chosen: Counter[Product] = sum((pair[choice] for pair in work.choices), work.products)
    return sum(product.operations * times for product, times in chosen.items())


def of_workload(setup: Setup, policy: Any) -> tuple[Shape, Lengths]:
    shape = Shape.of(policy.model.config)
    load = setup.workload
    prompts_B = [150] * load.prompts * load.completions
    return shape, Lengths.of(prompts_B, load.lengths_B, load.completions)


def test_a_rollout_takes_as_many_operations_as_torch_counts(setup: Setup) -> None:
    """float32: the adapter lies in the weights. Prompts of one length, so that no padding is fed."""
    from minigrpo.models.chat_template import render

    recipe = recipe_of(setup, lora__rank=RANK)
    policy = open_policy(recipe)
    engine = open_engine(setup, policy, recipe.rollout.rows)
    shape, lengths = of_workload(setup, policy)
    prompts = [render(policy.tokenizer, prompt) for prompt in setup.workload.kind.prompts(setup.workload, setup.folder)]
    sampling = Sampling(max_tokens=setup.workload.limit)
    linear, _ = counted(lambda: engine.generate(prompts, setup.workload.completions, sampling))
    assert linear == products_of(prefill(shape, lengths, 0)) + products_of(decode(shape, lengths, 0))


@pytest.mark.parametrize(("rank", "choice"), [(2, 0), (64, 1)], ids=["beside", "folded"])
def test_a_training_pass_takes_as_many_operations_as_torch_counts(setup: Setup, rank: int, choice: int) -> None:
    """Thin products for a thin adapter, one sum of weights for a thick one: both counts are exact."""
    recipe = recipe_of(setup, lora__rank=rank)
    policy = open_policy(recipe)
    groups = first_batch(setup, policy, recipe)
    objective = open_objective(recipe, inexact_engine=False)
    batch = pack(groups, objective, setup.workload.limit)
    linear, _ = counted(lambda: accumulate_gradient(policy, objective, list(batch.split(10**6)), step=0))
    (group,) = groups
    lengths = Lengths((len(group.prompt_ids),), (tuple(len(c.token_ids) for c in group.completions),))
    work = training(Shape.of(policy.model.config), lengths, rank, may_fold=True)
    assert products_of(work, choice) == linear


def test_attention_counts_the_pairs_that_may_be_seen() -> None:
    """Prompt tokens: a triangle. Completions: their prompt's rectangle, and a triangle of their own."""
    lengths = Lengths((4,), ((2, 3),))
    assert lengths.pairs() == (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6)
    shape = Shape(vocab=10, hidden=8, layers=3, heads=4, kv_heads=2, width=2, inner=16)
    # Step by step the same queries meet the same keys: prefill and decode together are one causal pass.
    apart = prefill(shape, lengths, 0).attention + decode(shape, lengths, 0).attention
    # But the prefill's last layer attends to nothing.
    apart += Attention(Shape(10, 8, 1, 4, 2, 2, 16).seen(1 + 2 + 3))
    whole = training(shape, lengths, RANK, may_fold=False).attention
    assert 3 * apart.operations == whole.operations == 3 * 4 * 3 * 4 * 2 * lengths.pairs()


def test_rows_that_ended_cost_nothing_and_siblings_read_their_prompt_once() -> None:
    shape = Shape(vocab=10, hidden=8, layers=1, heads=1, kv_heads=1, width=2, inner=16)
    heads = [product for product in decode(shape, Lengths((5,), ((1, 3),)), 0).products if product.outer == shape.vocab]
    assert sorted(product.rows for product in heads) == [1, 2]
    entries = decode(shape, Lengths((5,), ((1, 1),)), 0).attention.entries
    assert entries == 2 * 1 * 2 * (4 + 2)  # keys and values of 4 shared tokens, and of 2 rows' own first one


def test_an_adapter_stays_beside_16_bit_weights_and_is_in_float32_ones() -> None:
    shape = Shape(vocab=10, hidden=8, layers=2, heads=4, kv_heads=2, width=2, inner=16)
    lengths = Lengths((5, 3), ((2, 2), (1, 4)))
    narrow, wide = phases(shape, lengths, RANK, wide=False), phases(shape, lengths, RANK, wide=True)
    assert (
        products_of(narrow["decode"]) - products_of(wide["decode"]) == 2 * shape.adapter_entries(RANK) * lengths.scored
    )
    assert not narrow["training"].choices
    assert len(wide["training"].choices) == 4 + 5  # of most layers, and of the last, whose queries are fewer
    assert narrow["update"].moved == 32 * shape.adapter_entries(RANK)


def test_a_limit_adds_up_the_kernels_and_takes_the_cheaper_way() -> None:
    """Times are what this machine gives; how they are put together is not."""
    kernels = Kernels(torch.float32, "cpu", model_bytes=1 << 20)
    small, large = Product(4, 64, 64), Product(64, 512, 512)
    both = kernels.price(Work(Counter({small: 3, large: 2})))
    assert both.seconds == pytest.approx(3 * kernels.seconds(small) + 2 * kernels.seconds(large))
    assert both.operations == 3 * 2 * 4 * 64 * 64 + 2 * 2 * 64 * 512 * 512
    assert both.bytes == 4 * (3 * 64 * 64 + 2 * 512 * 512)
    choice = (Counter({large: 1}), Counter({small: 1}))
    cheaper = min(kernels.seconds(small), kernels.seconds(large))
    assert kernels.price(Work(Counter(), choices=(choice,))).seconds == pytest.approx(cheaper)
    moved = kernels.price(Work(Counter(), Attention(0, 1000), moved=10**6))
    assert moved.seconds == pytest.approx((4000 + 10**6) / kernels.rates.bandwidth)


def test_a_weight_takes_no_less_than_its_bytes_over_the_bandwidth() -> None:
    kernels = Kernels(torch.float32, "cpu", model_bytes=1 << 20)
    product = Product(1, 512, 512)
    assert kernels.seconds(product) >= 4 * 512 * 512 / kernels.rates.bandwidth


def test_the_shapes_are_those_of_the_published_models() -> None:
    """Weights read for a token: Qwen2.5-0.5B has 494 M parameters, Ministral-3-3B 3.4 B, both with tied embeddings."""

    def entries(name: str) -> int:
        s = models.SHAPES[name]
        return Shape(s.vocab, s.hidden, s.layers, s.heads, s.kv_heads, s.width, s.inner).entries

    assert entries("half") == pytest.approx(494e6, rel=0.001)
    assert entries("3b") == pytest.approx(3.43e9, rel=0.01)


def test_a_config_with_a_text_part_is_read_there(tmp_path: Path) -> None:
    from transformers import AutoConfig

    models.make_shape("mini", tmp_path)
    shape = Shape.of(AutoConfig.from_pretrained(tmp_path))
    assert shape == Shape(vocab=300, hidden=32, layers=2, heads=4, kv_heads=2, width=8, inner=64)
