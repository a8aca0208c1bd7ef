"""The last layer works on scored tokens alone: nobody reads what it makes of a prompt. Values are compared with rows
that hold each text whole in test_policy.py, operations with the limit in benchmarks/test_roofline.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from minigrpo.algorithms.objective import OBJECTIVES
from minigrpo.algorithms.packing import MicroBatch, pack
from minigrpo.models.policy import Policy, decoder_of, recompute_activations
from tests.helpers.models import made_up_groups, make_policy
from tests.helpers.tiny import LLAMA_LIKE
from tests.models.test_policy import EVERYTHING, scores_and_gradients


def micro_batch() -> MicroBatch:
    (part,) = pack(made_up_groups((9, 2, 40)), OBJECTIVES["grpo"], 60).split(EVERYTHING)
    return part


def tokens_by_layer(policy: Policy, part: MicroBatch) -> list[int]:
    """Return how many tokens pass through each layer's MLP, forward."""
    seen: list[int] = []

    def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].shape[1])

    layers: Any = decoder_of(policy.model).layers
    hooks = [layer.mlp.act_fn.register_forward_pre_hook(note) for layer in layers]
    policy.logprobs(part, step=0)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_prompt_tokens_stop_at_the_last_layers_keys_and_values(arch: str) -> None:
    part = micro_batch()
    layout = part.layout(once=True)
    first, last = tokens_by_layer(make_policy(arch), part)
    assert last == len(part.labels) == first - layout.shared_tokens < first


def test_activations_that_are_made_again_skip_the_same_tokens() -> None:
    policy, part = make_policy(dropout=0.3, double=True), micro_batch()
    plain = scores_and_gradients(policy, part)
    recompute_activations(policy.model)
    again = scores_and_gradients(policy, part)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(*pair) for pair in zip(plain[1], again[1], strict=True))


def test_a_copy_of_the_model_skips_them_and_no_pass_over_whole_texts_does() -> None:
    policy = make_policy(lora=None)
    layer: Any = decoder_of(copy.deepcopy(policy.model)).layers[-1]
    assert type(layer) is type(decoder_of(policy.model).layers[-1])  # type: ignore[index]
    assert type(layer).__name__ == "Qwen2DecoderLayer"
    seen: list[int] = []
    layer.mlp.act_fn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    hidden = torch.zeros(2, 7, 32)
    angles = torch.zeros(2, 7, 8), torch.zeros(2, 7, 8)
    layer.self_attn.config._attn_implementation = "eager"
    layer(hidden, position_embeddings=angles)
    assert seen == [7]
