"""Weights in oneDNN's blocks: the same completions to the bit; of what is not trained, and where there is room."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minigrpo.config.schema import AdapterConfig, Recipe
from minigrpo.models.lora import add_lora
from minigrpo.models.policy import Policy, make_all_trainable
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.training.memory.planner import BUDGET_SHARE, Device, Plan, make_plan
from minigrpo.types import Completion, Sampling
from tests.helpers.models import make_policy, rendered, set_lora
from tests.helpers.tiny import LLAMA_LIKE, tiny_config

pytestmark = pytest.mark.needs("bfloat16")


def bfloat16_policy(arch: str = "qwen2", targets: str = "all-linear", **config: Any) -> Policy:
    policy = make_policy(arch, lora=None, **config)
    policy.model.requires_grad_(False)
    policy.model, _ = add_lora(policy.model.bfloat16(), AdapterConfig(rank=4, targets=targets), seed=1)
    set_lora(policy, 0.1)
    return policy


def sample(engine: NativeEngine) -> list[tuple[Completion, ...]]:
    return engine.generate(rendered(), 4, Sampling(0.9, 30, 7))


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,up_proj", "o_proj"])
@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_blocks_change_no_bit_of_what_is_sampled(arch: str, targets: str) -> None:
    policy = bfloat16_policy(arch, targets)
    plain, blocked = (NativeEngine(policy, stop_ids=[3, 17], rows=256, blocks=blocks) for blocks in (False, True))
    assert blocked.decoder.blocked_head is not None
    assert all(part.blocked is not None for layer in blocked.decoder.layers for part in layer.projections)
    first = sample(plain)
    assert sample(blocked) == first
    set_lora(policy, 0.3)  # as after a step
    for engine in (plain, blocked):
        engine.update(policy)
    second = sample(plain)
    assert sample(blocked) == second != first
    with policy.adapter_off():
        for engine in (plain, blocked):
            engine.update(policy)
        assert sample(blocked) == sample(plain) != second


def test_what_is_trained_is_not_copied_into_blocks() -> None:
    policy = make_policy(lora=None)
    policy.model.bfloat16()
    make_all_trainable(policy.model)
    engine = NativeEngine(policy, stop_ids=[3], rows=8, blocks=True)
    assert engine.decoder.blocked_head is None
    assert not any(part.blocked is not None for layer in engine.decoder.layers for part in layer.projections)
    assert engine.decoder.block_bytes == 0


def test_blocks_take_what_they_are_counted_with() -> None:
    policy = bfloat16_policy()
    decoder = NativeEngine(policy, stop_ids=[3], rows=8, blocks=True).decoder
    copies = [part.blocked for layer in decoder.layers for part in layer.projections]
    assert decoder.block_bytes == sum(copy.nbytes for copy in [*copies, decoder.blocked_head] if copy is not None)


def planned(free: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Plan:
    config = tiny_config("qwen2", hidden_size=512, intermediate_size=1536, num_hidden_layers=4, vocab_size=8000)
    recipe = Recipe.model_validate({"rollout": {"prompts": 2, "completions": 4, "max_tokens": 64}, **options})
    return make_plan(config, recipe, Device("cpu", dtype, free), prompt=40)


def test_blocks_get_what_is_left_and_take_nothing_from_the_rest() -> None:
    roomy = planned(10**10)
    blocks = roomy.line("engine blocks")
    assert roomy.blocks
    embedding = 2 * 8000 * 512
    assert 0.99 * (roomy.line("weights") - embedding) < blocks <= roomy.line("weights") - embedding
    enough = roomy.peak / BUDGET_SHARE
    assert planned(int(enough * 1.001)).blocks
    scarce = planned(int(enough * 0.999))
    assert not scarce.blocks
    assert scarce.fits
    named = {line.name: line for line in roomy.lines if line.name != "engine blocks"}
    assert {line.name: line for line in scarce.lines} == named
    assert (scarce.rows, scarce.tokens_per_pass, scarce.recompute) == (roomy.rows, roomy.tokens_per_pass, False)


def test_no_blocks_are_planned_where_they_would_not_be_made() -> None:
    assert not planned(10**10, torch.float32).blocks
    assert not planned(10**10, train={"full": True}).blocks
