"""Run in a process of its own.

`python peak_worker.py update|rollout|slots '{...}'` prints planned and measured bytes as JSON.

MALLOC_MMAP_THRESHOLD_ gives every larger block a mapping of its own: what is freed leaves the process at once, so the
high-water mark is what was asked for and not what the allocator kept back.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from minigrpo.config.schema import Recipe
from minigrpo.models.loading import LoadedModel
from minigrpo.models.lora import add_lora
from minigrpo.models.policy import Policy, recompute_activations
from minigrpo.rollouts.engines.cuda_graph import SlotEngine
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.training.memory.meta import meta_policy, training_pass, uniform_micro_batch
from minigrpo.training.memory.planner import COMPILED_PRODUCT_BYTES, MATMUL_SCRATCH_BYTES
from minigrpo.training.memory.rollout_cost import RolloutShape, native_rollout_cost, slot_rollout_cost
from minigrpo.types import Prompt, Rendered, Sampling
from minigrpo.utils.process import bounded_onednn_caches, onednn_products
from tests.helpers.tiny import build_tokenizer, tiny_config


def main(kind: str, case: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dtype = getattr(torch, case["dtype"])
    config = tiny_config(case["arch"], **case["size"], max_position_embeddings=4096)
    full = case["rank"] == 0
    recipe = Recipe(train={"full": full}, lora={"rank": case["rank"] or 1})  # type: ignore[arg-type]
    hollow = meta_policy(config, recipe, dtype, recompute=case["recompute"])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    policy = Policy(LoadedModel(model, build_tokenizer(), "random"), temperature=1.0, seed=0)
    policy.model.requires_grad_(full)
    if not full:
        policy.model, policy.dropouts = add_lora(policy.model, recipe.lora, seed=0)
    if case["recompute"]:
        recompute_activations(policy.model)
    planned, measured = {"update": update, "rollout": rollout, "slots": in_slots}[kind](policy, hollow, case)
    print(json.dumps({"planned": planned + MATMUL_SCRATCH_BYTES, "measured": measured}))


def update(policy: Policy, hollow: Policy, case: dict[str, Any]) -> tuple[int, int]:
    vocabulary = case["size"]["vocab_size"]
    for _ in range(2):  # gradients exist, libraries are warm
        policy.logprobs(uniform_micro_batch(8, 2, 8, vocabulary=vocabulary), step=0).logprobs_N.sum().backward()
    groups, completions, prompt, completion = case["shape"]
    part = uniform_micro_batch(prompt, completions, completion, groups=groups, vocabulary=vocabulary)
    planned = training_pass(hollow, part, "cpu").peak
    before = from_here()
    policy.logprobs(part, step=0).logprobs_N.sum().backward()
    return planned, status("VmHWM") - before


def rollout(policy: Policy, hollow: Policy, case: dict[str, Any]) -> tuple[int, int]:
    groups, completions, prompt, completion = case["shape"]
    engine = NativeEngine(policy, stop_ids=[3], rows=1 << 20, stop_rule=lambda t, row, c: torch.zeros_like(t).bool())
    engine.tokenizer = Speechless()
    asked = made_up(groups, prompt)
    planned = native_rollout_cost(hollow, RolloutShape(groups, completions, prompt, completion), 1.0, "cpu").peak
    if policy.dtype != torch.float32:  # products are compiled for each of its shapes, up to what the caches keep
        planned += COMPILED_PRODUCT_BYTES * min(onednn_products(), 4 * completion)
    engine.generate(asked[:1], 2, Sampling(1.0, 4, 1))
    before = from_here()
    engine.generate(asked, completions, Sampling(1.0, completion, 1))
    return planned, status("VmHWM") - before


def in_slots(policy: Policy, hollow: Policy, case: dict[str, Any]) -> tuple[int, int]:
    groups, completions, prompt, completion = case["shape"]
    engine = SlotEngine(policy, stop_ids=[-1], rows=1 << 20)  # no row ends
    engine.tokenizer = Speechless()
    planned = slot_rollout_cost(hollow, RolloutShape(groups, completions, prompt, completion), 1.0, "cpu").peak
    engine.generate(made_up(1, prompt), 2, Sampling(1.0, 4, 1))
    engine.update(policy)
    engine._graph_sets = []
    before = from_here()
    engine.generate(made_up(groups, prompt), completions, Sampling(1.0, completion, 1))
    return planned, status("VmHWM") - before


def made_up(prompts: int, length: int) -> list[Rendered]:
    return [Rendered(Prompt(f"p{i}", ()), tuple(range(4, 4 + length))) for i in range(prompts)]


class Speechless:
    def batch_decode(self, ids: list[Any], **_: Any) -> list[str]:
        return [""] * len(ids)


def from_here() -> int:
    """Reset the high-water mark; return the bytes resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    with bounded_onednn_caches():
        main(sys.argv[1], json.loads(sys.argv[2]))
