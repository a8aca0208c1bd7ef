"""The vLLM engine: only the adapter travels, nothing bends the draw, and a server's faults are told in a sentence."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigrpo.algorithms.objective import OBJECTIVES, open_objective
from minigrpo.algorithms.packing import pack
from minigrpo.config.schema import Recipe
from minigrpo.errors import MinigrpoError, ModelError
from minigrpo.models.policy import Policy
from minigrpo.models.vllm_compat import vllm_max_lora_rank
from minigrpo.rollouts.engines.native import NativeEngine
from minigrpo.rollouts.engines.vllm import VllmEngine, needed_length, open_vllm
from minigrpo.rollouts.engines.vllm_server import RemoteVllm, Request
from minigrpo.types import Completion, Grade, Group, Sampling
from tests.helpers.models import make_policy, rendered, set_lora
from tests.helpers.vllm_standin import StandIn, stand_ins

STOPS, LIMIT, HEAT = (3, 17, 50, 60), 12, 0.9


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_ins(StandIn()) as (running,):
        yield running


def opened(server: StandIn, policy: Policy) -> VllmEngine:
    return VllmEngine(policy, RemoteVllm(server.url, "the-base", 8), stop_ids=STOPS)


def gap(engine: VllmEngine, policy: Policy) -> float:
    answers = engine.generate(rendered(), 3, Sampling(HEAT, LIMIT, 7))
    grades = tuple(Grade(float(i)) for i in range(3))
    groups = [Group(p.prompt, p.ids, own, grades) for p, own in zip(rendered(), answers, strict=True)]
    (part,) = pack(groups, OBJECTIVES["grpo"], LIMIT).split(1 << 30)
    return float((policy.logprobs(part, step=0).logprobs_N.detach() - part.engine_N).abs().max())


def test_what_the_server_samples_is_the_policy_before_and_after_an_update(server: StandIn) -> None:
    policy = make_policy("qwen2")
    engine = opened(server, policy)
    assert gap(engine, policy) < 1e-4
    set_lora(policy, 0.05)
    assert gap(engine, policy) > 1e-3  # the server still has the adapter of before
    engine.update(policy)
    assert gap(engine, policy) < 1e-4
    assert sorted(server.models) == ["policy-2", "the-base"]  # the one before is let go
    assert [folder.name for folder in Path(engine._folder.name).iterdir()] == ["policy-2"]


def test_with_the_adapter_off_the_base_answers(server: StandIn) -> None:
    policy = make_policy("qwen2")
    engine = opened(server, policy)
    with policy.adapter_off():
        engine.update(policy)
        assert gap(engine, policy) < 1e-4
    assert {body["model"] for body in server.asked} == {"the-base"}


def test_ids_are_the_sample_and_siblings_keep_their_order(server: StandIn) -> None:
    engine = opened(server, make_policy("qwen2"))
    seen: dict[int, tuple[Completion, ...]] = {}
    answers = engine.generate(rendered(), 3, Sampling(HEAT, LIMIT, 7), seen.__setitem__)
    assert [seen[place] for place in range(len(answers))] == answers
    for completion in (one for own in answers for one in own):
        assert len(completion.token_ids) == len(completion.logprobs) <= LIMIT
        assert (completion.token_ids[-1] in STOPS) == (completion.finish == "stop")
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert engine.generate(rendered(), 3, Sampling(HEAT, LIMIT, 7)) == answers
    assert engine.generate(rendered(), 3, Sampling(HEAT, LIMIT, 8)) != answers


def test_nothing_but_the_temperature_bends_the_draw() -> None:
    settings = Request((1,), 4, Sampling(0.7, 9), 5, (3,)).sampling_options()
    assert settings["temperature"] == 0.7
    assert (settings["top_p"], settings["top_k"], settings["min_p"], settings["repetition_penalty"]) == (1, 0, 0, 1)


def test_a_server_that_refuses_is_told_with_its_words_and_how_to_start_it(server: StandIn) -> None:
    engine = opened(server, policy := make_policy("qwen2"))
    server.fault = 404, "The adapter's door is shut."
    with pytest.raises(MinigrpoError, match=r"refused /v1/load_lora_adapter \(404\): The adapter's door.*ALLOW"):
        engine.update(policy)
    server.fault = 500, "out of memory"
    with pytest.raises(MinigrpoError, match=r"\(500\): out of memory.*--resume"):
        engine.generate(rendered(), 2, Sampling(HEAT, LIMIT, 7))


def test_how_a_server_is_started_says_what_vllm_misses_in_the_config(server: StandIn) -> None:
    recipe = Recipe(rollout={"engine": "vllm", "server": server.url})  # type: ignore[arg-type]
    server.fault, told = (500, "out of memory"), {}
    for family in ("ministral3", "qwen2"):
        policy = make_policy(family)
        with policy.adapter_off():  # nothing is sent yet
            engine = open_vllm(policy, recipe, 8, STOPS)
        with pytest.raises(MinigrpoError) as words:
            engine.update(policy)
        told[family] = str(words.value)
    scale = '{"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 32}}'
    for words in told.values():
        assert int(re.findall(r"--max-model-len (\d+)", words)[0]) == needed_length(policy, recipe) < 512
    assert told["ministral3"].endswith(f"--logprobs-mode processed_logprobs --hf-overrides '{scale}'")
    assert told["qwen2"].endswith("--logprobs-mode processed_logprobs")


def test_a_server_that_is_not_there_or_returns_no_ids_is_named(server: StandIn) -> None:
    engine = opened(server, make_policy("qwen2"))
    server.fault = 200, '{"choices": [{"index": 0, "text": "hello", "finish_reason": "stop"}]}'
    with pytest.raises(MinigrpoError, match="no token ids"):
        engine.generate(rendered(), 1, Sampling(HEAT, LIMIT, 7))
    with pytest.raises(MinigrpoError, match=r"No vLLM server answers at http://127\.0\.0\.1:9"):
        RemoteVllm("http://127.0.0.1:9", "base", 8)


def answered(*ids: Any, n: int = 2, finish: str = "length", **changes: Any) -> str:
    choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids)}, "finish_reason": finish, **changes}
    return json.dumps({"choices": [{"index": place, **choice} for place in range(n)]})


NO_ANSWER = "returns no token ids with their log-probabilities for 2 completions"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (answered(5, 6, n=1), NO_ANSWER),
        (answered(5, 6, n=3), NO_ANSWER),
        (answered(5, 6, index=0), NO_ANSWER),
        (answered(5, 6, index=None), NO_ANSWER),
        (answered(5, "six"), NO_ANSWER),
        (answered(5, 6.5), NO_ANSWER),
        (answered(5, 6, logprobs=None), NO_ANSWER),
        (answered(5, 6, logprobs={"token_logprobs": [-1.0]}), NO_ANSWER),
        (answered(5, 6, logprobs={"token_logprobs": ["low", "lower"]}), NO_ANSWER),
        (answered(), NO_ANSWER),
        ('{"choices": [1, 2]}', NO_ANSWER),
        ('{"choices": null}', NO_ANSWER),
        ('{"error": "overloaded"}', NO_ANSWER),
        ("[]", NO_ANSWER),
        ("<html>Sign in", NO_ANSWER),
        (answered(5), r"ends a completion after 1 of 2 tokens \(length\)"),
        (answered(5, finish="abort"), r"ends a completion after 1 of 2 tokens \(abort\)"),
        (answered(5, 6, 7), r"ends a completion after 3 of 2 tokens \(length\)"),
        (answered(5, 6, 3, finish="stop"), "ends a completion after 3 tokens, and 2 were asked for"),
        (answered(5, finish="stop"), "ends a completion at token 5, which is no stop token of the policy"),
        (answered(5, 260), "answers with token 260, which the policy does not know"),
        (answered(5, -1), "answers with token -1, which the policy does not know"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_ends_in_a_sentence(server: StandIn, text: str, told: str) -> None:
    remote = RemoteVllm(server.url, "the-base", 8, vocabulary=260)
    server.fault = 200, text
    with pytest.raises(MinigrpoError, match=rf"^The server at {server.url} {told}"):
        remote.answer(Request((1,), 2, Sampling(HEAT, 2), 7, STOPS), "the-base")
    for right in (answered(5, 6), answered(3, finish="stop"), answered(5, 3, finish="stop"), answered(5, 259)):
        server.fault = 200, right
        assert len(remote.answer(Request((1,), 2, Sampling(HEAT, 2), 7, STOPS), "the-base")) == 2


@pytest.mark.parametrize("wrong", ["null", "NaN"])
def test_a_log_probability_that_is_no_number_is_refused(server: StandIn, wrong: str) -> None:
    engine = opened(server, make_policy("qwen2"))
    choice = f'"token_ids": [5, 6], "logprobs": {{"token_logprobs": [-1.0, {wrong}]}}, "finish_reason": "length"'
    server.fault = 200, f'{{"choices": [{{"index": 0, "text": "?", {choice}}}]}}'
    with pytest.raises(ModelError, match=r"completion 1, token 2 are not finite"):
        engine.generate(rendered(), 1, Sampling(HEAT, 2, 7))


def test_without_vllm_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    recipe = Recipe(rollout={"engine": "vllm"})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"pip install vllm.*--rollout\.server.*--rollout\.engine auto"):
        open_vllm(make_policy("qwen2"), recipe, 8, STOPS)
    with pytest.raises(ModelError, match="this model has none"):
        open_vllm(make_policy("qwen2", lora=None), recipe, 8, STOPS)


def test_ranks_are_rounded_up_to_what_vllm_takes() -> None:
    assert [vllm_max_lora_rank(rank) for rank in (1, 8, 9, 200, 512, 513)] == [1, 8, 16, 256, 512, None]


def test_a_rank_beyond_what_vllm_takes_is_refused_before_any_server_is_asked() -> None:
    recipe = Recipe(rollout={"engine": "vllm", "server": "http://127.0.0.1:9"}, lora={"rank": 513})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"up to rank 512, and lora\.rank is 513"):
        open_vllm(make_policy("qwen2"), recipe, 8, STOPS)


def test_its_samples_are_weighted_by_importance_unless_the_recipe_says_no() -> None:
    own: dict[str, Any] = {"engine": "vllm", "server": "http://localhost:8000"}
    assert open_objective(Recipe(rollout=own), inexact_engine=not VllmEngine.is_exact).importance is not None  # type: ignore[arg-type]
    assert open_objective(Recipe(), inexact_engine=not NativeEngine.is_exact).importance is None


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rollout": {"engine": "vllm"}, "train": {"full": True}}, "takes over an adapter"),
        ({"rollout": {"engine": "vllm"}, "model": {"quantize": "nf4"}}, "in 16 bit"),
        ({"rollout": {"server": "http://localhost:8000"}}, "rollout.engine vllm only"),
    ],
)
def test_recipes_that_it_cannot_follow_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**sections)
