"""No token is drawn from logits that are not finite, and no engine reads memory that it has not written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from minigrpo.errors import ModelError
from minigrpo.models.policy import Policy
from minigrpo.rollouts.engines import kv_cache
from minigrpo.rollouts.engines.cuda_graph import SlotEngine
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.sampling import BLOCK, draw
from minigrpo.rollouts.engines.transformers import TransformersEngine
from minigrpo.types import Completion, Engine, Sampling
from tests.helpers.models import make_policy, rendered

STOPS = [3, 17, 50, 60]
LIMIT = 50
OPENERS: dict[str, Callable[[Policy], Engine]] = {
    "native": lambda policy: NativeEngine(policy, stop_ids=STOPS, rows=8),
    "slots": lambda policy: SlotEngine(policy, stop_ids=STOPS, rows=8),
    "transformers": lambda policy: TransformersEngine(policy, stop_ids=STOPS, rows=8),
}


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Fill every tensor that torch leaves uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def sampled(engine: Engine, temperature: float = 0.9) -> list[Completion]:
    answers = engine.generate(rendered(), 4, Sampling(temperature, LIMIT, 7))
    return [completion for siblings in answers for completion in siblings]


@pytest.mark.parametrize("shared", [False, True], ids=["own-prompts", "shared-prompts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)
@pytest.mark.usefixtures("nan_in_new_memory")
def test_no_engine_reads_memory_that_it_has_not_written(
    opener: Callable[[Policy], Engine], dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "FIRST_SLOTS", 4)  # so that the caches grow
    if shared:
        monkeypatch.setattr(kv_cache, "MAX_COPIED_BYTES", 0)
    policy = make_policy()
    policy.model.to(dtype)
    completions = sampled(opener(policy))
    assert len({len(completion.token_ids) for completion in completions}) > 2, "rows must end at different times"
    assert all(math.isfinite(sum(completion.logprobs)) for completion in completions)


@pytest.mark.parametrize("temperature", [0.9, 0.0])
@pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)
def test_logits_that_are_not_finite_end_in_a_sentence_that_names_the_token(
    opener: Callable[[Policy], Engine], temperature: float
) -> None:
    policy = make_policy(tie_word_embeddings=False)
    engine = opener(policy)
    whole = engine.generate(rendered(), 4, Sampling(temperature, LIMIT, 7))
    seen = {token for prompt in rendered() for token in prompt.ids}
    # The first completion, in the engine's order, that has a token of its own: its next logits will be NaN.
    index, sibling, place, token = next(
        (index, sibling, place, token)
        for index, siblings in enumerate(whole)
        for sibling, completion in enumerate(siblings)
        for place, token in enumerate(completion.token_ids[:-1])
        if token not in seen
    )
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[token] = math.nan
    engine.update(policy)
    with pytest.raises(ModelError, match=r"completion \d+, token \d+ are not finite") as refusal:
        engine.generate(rendered(), 4, Sampling(temperature, LIMIT, 7))
    name = rendered()[index].prompt.id
    assert f"prompt {name}, completion {sibling + 1}, token {place + 2} are" in str(refusal.value)


@pytest.mark.parametrize("vocabulary", [90, 3 * BLOCK + 5])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_draw_from_broken_logits_stays_in_the_vocabulary_and_shows_by_its_log_probability(
    wrong: float, temperature: float, vocabulary: int
) -> None:
    logits_nV = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0))
    logits_nV[0, 7] = -math.inf  # a token that may not be drawn
    logits_nV[1, 7] = wrong
    logits_nV[2] = wrong
    tokens_n, logprobs_n = draw(logits_nV, torch.full((3,), 0.999, dtype=torch.float64), temperature)
    assert tokens_n.max() < vocabulary
    assert logprobs_n.isfinite().tolist() == [True, False, False]
