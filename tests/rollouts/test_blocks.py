"""Weights in oneDNN's blocks: the same completions and gradients to the bit, where there is room, of frozen weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import MicroBatch, pack
from minigrpo.config.schema import AdapterConfig, Recipe
from minigrpo.models.lora import add_lora
from minigrpo.models.policy import Policy, make_all_trainable
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.training.memory.planner import BUDGET_SHARE, Device, Plan, make_plan
from minigrpo.types import Completion, Sampling
from tests.helpers.models import made_up_groups, make_policy, rendered, set_lora
from tests.helpers.tiny import LLAMA_LIKE, tiny_config
from tests.models.test_policy import EVERYTHING, scores_and_gradients

pytestmark = pytest.mark.needs("bfloat16")


def bfloat16_policy(arch: str = "qwen2", targets: str = "all-linear", rank: int = 4) -> Policy:
    policy = make_policy(arch, lora=None)
    policy.model.requires_grad_(False)
    policy.model, _ = add_lora(policy.model.bfloat16(), AdapterConfig(rank=rank, targets=targets), seed=1)
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


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj,up_proj"])
@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_blocks_change_no_bit_of_a_training_pass(arch: str, targets: str) -> None:
    policy = bfloat16_policy(arch, targets)
    batch = micro_batch()
    plain = scores_and_gradients(policy, batch)
    policy.blocks_due = True
    blocked = scores_and_gradients(policy, batch)
    assert torch.equal(plain[0], blocked[0])
    assert all(torch.equal(*pair) for pair in zip(plain[1], blocked[1], strict=True))
    kept = {name for name, layer in policy.model.named_modules() if hasattr(layer, "blocks")}
    assert any(name.endswith("lm_head") for name in kept)
    assert {name.split(".")[-2] for name in kept if "base_layer" in name} == named_layers(targets)


def named_layers(targets: str) -> set[str]:
    every = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    return set((every if targets == "all-linear" else targets).split(","))


def micro_batch() -> MicroBatch:
    (part,) = pack(made_up_groups((9, 2, 40)), OBJECTIVES["grpo"], 60).split(EVERYTHING)
    return part


def test_the_engine_and_training_share_what_they_both_multiply_by() -> None:
    policy = bfloat16_policy()
    policy.blocks_due = True
    policy.logprobs(micro_batch(), step=0)
    decoder = NativeEngine(policy, stop_ids=[3], rows=8, blocks=True).decoder
    shared = [(layer.down, layer.down.bases[0]) for layer in decoder.layers]
    shared += [(layer.out, layer.out.bases[0]) for layer in decoder.layers]
    assert all(projection.blocked is base.blocks.forward_OI for projection, base in shared)
    assert decoder.blocked_head is decoder.head.blocks.forward_OI  # type: ignore[union-attr]


def test_a_policy_that_is_not_told_to_copies_nothing() -> None:
    policy = bfloat16_policy()
    policy.logprobs(micro_batch(), step=0)
    assert not [name for name, layer in policy.model.named_modules() if hasattr(layer, "blocks")]
    wide = make_policy("qwen2", lora=0.1)
    wide.blocks_due = True
    wide.logprobs(micro_batch(), step=0)
    assert not [name for name, layer in wide.model.named_modules() if hasattr(layer, "blocks")]


def test_what_is_trained_is_not_copied_into_blocks() -> None:
    policy = make_policy(lora=None)
    policy.model.bfloat16()
    make_all_trainable(policy.model)
    engine = NativeEngine(policy, stop_ids=[3], rows=8, blocks=True)
    assert engine.decoder.blocked_head is None
    assert not any(part.blocked is not None for layer in engine.decoder.layers for part in layer.projections)
    assert engine.decoder.block_bytes == 0


def test_blocks_take_what_they_are_counted_with() -> None:
    policy = bfloat16_policy(rank=16)
    decoder = NativeEngine(policy, stop_ids=[3], rows=8, blocks=True).decoder
    projections = [part for layer in decoder.layers for part in layer.projections]
    copies = [copy for part in projections for copy in (part.blocked, part.blocked_A, part.blocked_B)]
    assert None not in copies
    assert decoder.block_bytes == sum(copy.nbytes for copy in [*copies, decoder.blocked_head] if copy is not None)
    policy.blocks_due = True
    policy.logprobs(micro_batch(), step=0)
    kept = [layer.blocks for layer in policy.model.modules() if hasattr(layer, "blocks")]
    both = sum(blocks.forward_OI.nbytes + blocks.backward_IO.nbytes for blocks in kept)
    shared = [part.blocked for part in projections if len(part.bases) == 1]
    once = sum(copy.nbytes for copy in [*shared, decoder.blocked_head] if copy is not None)
    assert decoder.training_block_bytes == both - once


def planned(free: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Plan:
    config = tiny_config("qwen2", hidden_size=512, intermediate_size=1536, num_hidden_layers=4, vocab_size=8000)
    recipe = Recipe.model_validate({"rollout": {"prompts": 2, "completions": 4, "max_tokens": 64}, **options})
    return make_plan(config, recipe, Device("cpu", dtype, free), prompt=40)


def test_blocks_get_what_is_left_and_take_nothing_from_the_rest() -> None:
    """The engine's come first. They leave a tenth of the room, as the plan leaves a tenth of the budget."""
    roomy = planned(10**10)
    assert roomy.blocks
    assert roomy.training_blocks
    embedding = 2 * 8000 * 512
    weights = roomy.line("weights") - embedding
    assert weights < roomy.line("engine blocks") < 1.25 * weights  # with adapters of rank 16
    assert weights < roomy.line("training blocks") < 2 * weights
    need = BUDGET_SHARE**2
    assert planned(int(roomy.peak / need * 1.001)).training_blocks
    fewer = planned(int(roomy.peak / need * 0.999))
    assert (fewer.blocks, fewer.training_blocks) == (True, False)
    assert planned(int(fewer.peak / need * 1.001)).blocks
    scarce = planned(int(fewer.peak / need * 0.999))
    assert not scarce.blocks
    assert scarce.fits
    named = {line.name: line for line in roomy.lines if not line.name.endswith(" blocks")}
    assert {line.name: line for line in scarce.lines} == named
    assert (scarce.rows, scarce.tokens_per_pass, scarce.recompute) == (roomy.rows, roomy.tokens_per_pass, False)


def test_no_blocks_are_planned_where_they_would_not_be_made() -> None:
    assert not planned(10**10, torch.float32).blocks
    assert not planned(10**10, train={"full": True}).blocks
