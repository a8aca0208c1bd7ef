"""Prompts are read without padding, and what they all begin with once: the cache holds the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from minigrpo.config.schema import Recipe
from minigrpo.models.policy import Policy, decoder_of
from minigrpo.rollouts.engines import prompts as layouts
from minigrpo.rollouts.engines.decoder import Decoder
from minigrpo.rollouts.engines.native import prefill_prompts
from minigrpo.rollouts.engines.prompts import PackedPrompts, PaddedPrompts, PromptLayout, shared_beginning
from minigrpo.training.memory.meta import META, MemoryCounter, meta_policy, policy_tensors
from minigrpo.types import Prompt, Rendered
from tests.helpers.models import make_policy
from tests.helpers.tiny import LLAMA_LIKE, tiny_config

SHAPES = {
    "a beginning of all": (9, [4, 1, 7, 2]),
    "one that is the beginning and no more": (9, [4, 0, 7, 2]),
    "no beginning": (0, [9, 3, 14]),
    "equally long": (6, [5, 5, 5]),
    "two alike": (8, [3, 3]),
    "one alone": (0, [11]),
    "the same twice": (12, [0, 0]),
}


MODELS = [*((arch, None) for arch in LLAMA_LIKE), ("mistral", 6), ("ministral3", 11)]


def prompts_of(common: int, rests: Sequence[int]) -> list[Rendered]:
    drawn = torch.randint(5, 60, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    begins = tuple(drawn[:common])
    # The first token of each rest is its own, so that the beginning ends where it should; the last is not read.
    ids = [
        (*begins, *((60 + n, *drawn[20 * n : 20 * n + rest - 1]) if rest else ()), 1) for n, rest in enumerate(rests)
    ]
    return [Rendered(Prompt(str(n), ()), each) for n, each in enumerate(ids)]


def cache_of(decoder: Decoder, prompts: Sequence[Rendered]) -> Tensor:
    longest = max(len(prompt.ids) for prompt in prompts) - 1
    shape = (len(decoder.layers), 2, len(prompts), decoder.kv_heads, longest, decoder.width)
    cache = torch.zeros(shape, dtype=decoder.dtype)
    prefill_prompts(decoder, prompts, decoder.rope_table(longest), cache)
    return cache


def always_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "WORTH_PACKING", 0)
    monkeypatch.setattr(layouts, "LEAST_SAVED", 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("arch", "window"), [*((arch, None) for arch in LLAMA_LIKE), ("mistral", 6), ("ministral3", 11)]
)
def test_packed_prompts_fill_the_cache_as_padded_ones_do(
    arch: str, window: int | None, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(arch, lora=0.02, **({"sliding_window": window} if window else {}))
    decoder = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings())
    prompts = prompts_of(*SHAPES[shape])
    padded = cache_of(decoder, prompts)
    always_packed(monkeypatch)
    packed = cache_of(decoder, prompts)
    monkeypatch.setattr("minigrpo.rollouts.engines.native.PREFILL_TOKENS", 20)  # a few prompts at a time
    in_parts = cache_of(decoder, prompts)
    for place, prompt in enumerate(prompts):
        own = slice(0, len(prompt.ids) - 1)
        torch.testing.assert_close(packed[:, :, place, :, own], padded[:, :, place, :, own], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(in_parts[:, :, place, :, own], padded[:, :, place, :, own], rtol=1e-4, atol=1e-5)


def test_the_beginning_passes_through_the_layers_once_and_padding_never(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("qwen2")
    decoder = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings())
    always_packed(monkeypatch)
    read: list[int] = []
    embed = decoder.model.embed_tokens.forward
    monkeypatch.setattr(decoder.model.embed_tokens, "forward", lambda ids: read.append(ids.numel()) or embed(ids))
    cache_of(decoder, prompts_of(9, [4, 0, 7, 2]))
    assert read == [9, 4 + 0 + 7 + 2]


@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_packed_prompts_take_no_more_memory_than_was_planned_for_padded_ones(arch: str) -> None:
    """Down to the least saving at which they are packed; no beginning is shared, which would save more."""
    policy = meta_policy(tiny_config(arch), Recipe(), torch.float32)
    with META:
        padded = PaddedPrompts(torch.zeros(8, 100, dtype=torch.long), torch.arange(100))
        tokens = torch.zeros(math.floor(8 * 100 * (1 - layouts.LEAST_SAVED)), dtype=torch.long)
    assert peak_of(policy, PackedPrompts(tokens, tokens, tokens, 8, 100)) <= peak_of(policy, padded)


def peak_of(policy: Policy, layout: PromptLayout) -> int:
    counter = MemoryCounter(policy_tensors(policy), "cpu")
    with torch.no_grad(), counter, META:
        decoder = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings(), policy.backend)
        cache = torch.zeros(len(decoder.layers), 2, 8, decoder.kv_heads, 100, decoder.width)
        rope, before = decoder.rope_table(100), counter.now
        counter.peak = before
        decoder.prefill(layout, rope, cache)
    return counter.peak - before


def test_nearly_nothing_saved_is_padded_however_large_the_model() -> None:
    assert shared_beginning([(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)] * 4 + [(0,) * 9], 10**15) is None
    assert shared_beginning([(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)] * 4 + [(0,) * 7], 10**15) == 0


def test_what_saves_little_is_padded() -> None:
    """64 rows of a small model's short prompts: the calls would cost more than they spare."""
    ids = [prompt.ids for prompt in prompts_of(9, [4, 1, 7, 2])]
    rows = 4 * max(map(len, ids))
    saved = rows - (9 + sum(len(each) - 9 for each in ids))
    products = layouts.WORTH_PACKING // saved
    assert shared_beginning(ids, products - 1) is None
    assert shared_beginning(ids, products + 1) == 9


def test_at_least_one_token_is_left_to_read() -> None:
    assert shared_beginning([(1, 2, 3), (1, 2, 3)], 10**12) == 2
    assert shared_beginning([(1, 2, 3)], 10**12) is None
