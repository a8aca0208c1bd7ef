"""Rows that hold their own prompts and rows that share them are decoded alike."""

from __future__ import annotations

import pytest
import torch

from minigrpo.models.policy import Policy, decoder_of
from minigrpo.rollouts.engines import kv_cache
from minigrpo.rollouts.engines.decoder import Decoder
from minigrpo.rollouts.engines.kv_cache import OwnPrompts, SharedPrompts, cache_class
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.types import Completion, Sampling
from tests.helpers.models import make_policy, rendered
from tests.helpers.tiny import LLAMA_LIKE

STOPS = list(range(3, 90, 4))
LIMIT = 50
PROMPTS = (1, 40, 23, 7, 12)


def said(policy: Policy, limit: int = LIMIT) -> list[Completion]:
    engine = NativeEngine(policy, stop_ids=STOPS, rows=256)
    answers = engine.generate(rendered(PROMPTS), 4, Sampling(0.9, limit, 8))
    return [completion for own in answers for completion in own]


def make_decoder(arch: str = "qwen2", **config: int) -> Decoder:
    policy = make_policy(arch, **config)
    return Decoder(decoder_of(policy.model), policy.model.get_output_embeddings())


@pytest.mark.parametrize("first_slots", [1, 3, 64])
@pytest.mark.parametrize("arch", LLAMA_LIKE)
def test_both_forms_say_the_same(arch: str, first_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(arch)
    monkeypatch.setattr(kv_cache, "FIRST_SLOTS", first_slots)
    own = said(policy)
    monkeypatch.setattr(kv_cache, "MAX_COPIED_BYTES", 0)
    shared = said(policy)
    assert [c.token_ids for c in own] == [c.token_ids for c in shared]
    assert len({len(c.token_ids) for c in own}) > 3, "rows must leave at different times"
    for one, other in zip(own, shared, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=2e-5)


def test_in_sixteen_bit_both_forms_keep_to_the_policys_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(lora=None)
    policy.model.bfloat16()
    first = []
    for small in (kv_cache.MAX_COPIED_BYTES, 0):
        monkeypatch.setattr(kv_cache, "MAX_COPIED_BYTES", small)
        first.append([(c.token_ids, c.logprobs[0]) for c in said(policy, limit=1)])
    gaps = [abs(own[1] - shared[1]) for own, shared in zip(*first, strict=True) if own[0] == shared[0]]
    assert len(gaps) > 15, "rounding may turn a draw, but not many"
    assert max(gaps) < 0.1


def test_small_prompts_on_a_cpu_are_copied_and_all_others_shared() -> None:
    decoder = make_decoder()
    assert cache_class(decoder, [40, 3], 4, LIMIT, "cpu") is OwnPrompts
    assert cache_class(decoder, [40, 3], 4, LIMIT, "cuda") is SharedPrompts
    assert cache_class(decoder, [0, 0], 4, LIMIT, "cpu") is SharedPrompts
    assert cache_class(decoder, [40_000, 3], 400, LIMIT, "cpu") is SharedPrompts


@pytest.mark.parametrize(("window", "form"), [(90, SharedPrompts), (91, OwnPrompts)])
def test_a_window_that_some_row_outgrows_needs_shared_prompts(window: int, form: type) -> None:
    assert cache_class(make_decoder("mistral", sliding_window=window), [40], 4, LIMIT, "cpu") is form
