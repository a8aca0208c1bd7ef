"""Several vLLM servers: whose samples count is proved after every update, and what is wrong with one is named.

Against stand-ins that answer with transformers and PEFT; vLLM itself: test_real_vllm.py.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.config.schema import Recipe
from minigrpo.errors import MinigrpoError
from minigrpo.models.chat_template import render
from minigrpo.models.policy import Policy, open_policy
from minigrpo.rollouts.engines.server_pool import ServerPool
from minigrpo.rollouts.engines.vllm import VllmEngine, fingerprint_prompts, open_vllm
from minigrpo.rollouts.engines.vllm_server import RemoteVllm
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training.grpo import grpo
from minigrpo.types import Prompt, Rendered, Sampling
from tests.helpers.models import make_policy, rendered, set_lora
from tests.helpers.tiny import TEMPLATE
from tests.helpers.vllm_standin import StandIn, stand_ins
from tests.training.test_training_options import letters, recipe_for

STOPS = (3, 17, 50, 60)


def pool_of(servers: tuple[StandIn, ...], said: list[str], prompts: list[Rendered] | None = None) -> ServerPool:
    remote = partial(RemoteVllm, model="the-base", rank=8, vocabulary=260, wait=10.0)
    texts = prompts or rendered((1, 20, 12, 7))
    return ServerPool([server.url for server in servers], remote, texts, say=said.append, patience=0.3)


def opened(policy: Policy, servers: tuple[StandIn, ...], said: list[str]) -> VllmEngine:
    return VllmEngine(policy, pool_of(servers, said), stop_ids=STOPS)


def samplers(engine: VllmEngine) -> set[str]:
    answers = engine.generate(rendered((1, 9, 5, 4)), 2, Sampling(0.9, 4, 7))
    return {completion.sampler for own in answers for completion in own}


def name_of(server: StandIn) -> str:
    return server.url.removeprefix("http://")


def adapter_of_before(server: StandIn, name: str, model: Any) -> Any:
    return server.last


def doubled(server: StandIn, name: str, model: Any) -> Any:
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.mul_(2)
    return model


class Replicas:
    """Data-parallel replicas of which only every second one has loaded the adapter."""

    def __init__(self, whole: Any, base: Any) -> None:
        self.models, self.calls = (whole, base), 0

    def __call__(self, ids: Any) -> Any:
        self.calls += 1
        return self.models[(self.calls - 1) // 16 % 2](ids)


FAULTS: dict[str, tuple[Callable[[StandIn], Any], str]] = {
    "no adapter": (
        lambda server: setattr(server, "takes", lambda server, name, model: server.models["the-base"]),
        r"samples without adapter policy-2-[0-9a-f]{16}, which it was told to load: 4 of 4 short texts",
    ),
    "the adapter before": (
        lambda server: setattr(server, "takes", adapter_of_before),
        r"samples with the adapter before policy-2-\w+, which it was told to load: 4 of 4",
    ),
    "another adapter": (
        lambda server: setattr(server, "takes", doubled),
        r"samples with another adapter than policy-2-\w+, which it was told to load: 4 of 4",
    ),
    "some replicas": (
        lambda server: setattr(server, "takes", lambda server, name, model: Replicas(model, server.models["the-base"])),
        r"samples without adapter policy-2-\w+, which it was told to load on some of its replicas: 2 of 4",
    ),
    "log-probabilities": (lambda server: setattr(server, "shift", 0.3), r"holds another base than the policy \(tiny\)"),
    "temperature": (
        lambda server: setattr(server, "plain", True),
        r"reports log-probabilities at temperature 1, for want of --logprobs-mode processed_logprobs: 4 of 4",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_wrong_server_samples_from_is_named_and_never_used(fault: str) -> None:
    break_it, sentence = FAULTS[fault]
    with stand_ins(wrong := StandIn(), right := StandIn()) as servers:
        policy, said = make_policy("qwen2"), list[str]()
        engine = opened(policy, servers, said)
        assert (said, samplers(engine)) == ([], {name_of(wrong), name_of(right)})
        wrong.asked.clear()
        break_it(wrong)
        set_lora(policy, 0.05)
        engine.update(policy)
        assert samplers(engine) == {name_of(right)}
        assert not wrong.rollouts
        (told,) = said
        assert re.fullmatch(rf"Left out: {wrong.url} {sentence}.*tried again after the next update\.", told), told


def spoiled(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any], list[Any]], Any]:
    """Return what a server answers that is right in short texts, and in whole groups changes a completion."""
    return lambda body, choices: {"choices": [change(choices[0]), *choices[1:]] if body["n"] > 1 else choices}


def shortened(choice: dict[str, Any], finish: str) -> dict[str, Any]:
    logprobs = {"token_logprobs": choice["logprobs"]["token_logprobs"][:1]}
    return {**choice, "token_ids": choice["token_ids"][:1], "logprobs": logprobs, "finish_reason": finish}


def rounded(choice: dict[str, Any], nats: float) -> dict[str, Any]:
    return {**choice, "logprobs": {"token_logprobs": [own + nats for own in choice["logprobs"]["token_logprobs"]]}}


def falls_back_to_its_base(server: StandIn) -> None:
    def spoils(body: dict[str, Any], choices: list[Any]) -> Any:
        if body["n"] == 1:
            return {"choices": choices}
        body, draw = {**body, "model": "the-base"}, torch.Generator().manual_seed(1)
        return {"choices": [server.one(body, draw) | {"index": i} for i in range(body["n"])]}

    server.spoils = spoils


TURNS: dict[str, tuple[Callable[[StandIn], Any], str]] = {
    "to its base": (
        falls_back_to_its_base,
        r"sampled from the policy and now does not: a group is off by \d\.\d+ nats",
    ),
    "log-probabilities off": (
        lambda server: setattr(server, "spoils", spoiled(lambda choice: rounded(choice, 0.1))),
        r"sampled from the policy and now does not: a group is off by 0\.\d+ nats a token",
    ),
    "cut short": (
        lambda server: setattr(server, "spoils", spoiled(lambda choice: shortened(choice, "length"))),
        r"ends a completion after 1 of 12 tokens \(length\)",
    ),
    "no number": (
        lambda server: setattr(server, "spoils", spoiled(lambda choice: rounded(choice, math.nan))),
        r"answers with log-probabilities that are not finite",
    ),
    "a page": (
        lambda server: setattr(
            server, "spoils", lambda body, choices: "<html>Sign in" if body["n"] > 1 else {"choices": choices}
        ),
        r"returns no token ids with their log-probabilities for 2 completions",
    ),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_server_that_passed_and_then_turns_bad_is_named_and_its_group_asked_of_another(turn: str) -> None:
    break_it, sentence = TURNS[turn]
    with stand_ins(wrong := StandIn(), right := StandIn()) as servers:
        engine = opened(make_policy("qwen2", lora=0.3), servers, said := list[str]())
        break_it(wrong)
        answers = engine.generate(rendered((1, 5)), 2, Sampling(0.9, 12, 7))
        assert wrong.rollouts
        assert {completion.sampler for own in answers for completion in own} == {name_of(right)}
        (told,) = said
        assert re.fullmatch(rf"Left out: (The server at )?{wrong.url} {sentence}.*after the next update\.", told), told


def test_a_right_server_is_not_doubted_at_another_temperature_or_for_few_tokens() -> None:
    with stand_ins(StandIn(), StandIn()) as servers:
        engine = opened(make_policy("qwen2"), servers, said := list[str]())
        for sampling in (Sampling(0.3, 12, 7), Sampling(0.9, 12, 7), Sampling(0.9, 1, 7)):
            engine.generate(rendered((1, 5)), 2, sampling)
        assert not said


def test_log_probabilities_of_a_short_text_that_are_no_numbers_are_named_so() -> None:
    with stand_ins(wrong := StandIn(), StandIn()) as servers:
        wrong.shift = math.nan
        opened(make_policy("qwen2"), servers, said := list[str]())
        assert said[0].startswith(f"Left out: {wrong.url} answers with log-probabilities that are not finite. Its")


def test_a_server_that_points_elsewhere_is_left_out_and_the_adapter_is_not_sent_there() -> None:
    with stand_ins(pointing := StandIn(), StandIn(), elsewhere := StandIn()) as servers:
        for path in ("/v1/load_lora_adapter", "/v1/completions", "/tokenize"):
            pointing.points[path] = f"{elsewhere.url}{path}"
        opened(make_policy("qwen2"), servers[:2], said := list[str]())
        assert f"refused /v1/load_lora_adapter (302): It points to {elsewhere.url}/v1/load_lora_adapter." in said[0]
        assert not elsewhere.told


def test_two_names_of_one_server_share_its_adapter() -> None:
    with stand_ins(server := StandIn()):
        urls = server.url, server.url.replace("127.0.0.1", "localhost")
        policy, said = make_policy("qwen2"), list[str]()
        remote = partial(RemoteVllm, model="the-base", rank=8, wait=10.0)
        engine = VllmEngine(policy, ServerPool(urls, remote, rendered((1, 20)), say=said.append), stop_ids=STOPS)
        for size in (0.03, 0.05):
            set_lora(policy, size)
            engine.update(policy)
            assert samplers(engine) == {url.removeprefix("http://") for url in urls}
            assert len(server.models) == 2
        assert not said


def test_one_server_alone_must_answer_whole_completions_too() -> None:
    with stand_ins(server := StandIn()):
        engine = VllmEngine(make_policy("qwen2"), RemoteVllm(server.url, "the-base", 8), stop_ids=STOPS)
        server.spoils = spoiled(lambda choice: shortened(choice, "length"))
        with pytest.raises(MinigrpoError, match=r"ends a completion after 1 of 12 tokens \(length\)"):
            engine.generate(rendered((1, 9)), 4, Sampling(0.9, 12, 7))


def test_another_base_is_named_from_the_first_adapter_on() -> None:
    with stand_ins(StandIn(base_seed=1), StandIn()) as servers:
        opened(make_policy("qwen2"), servers, said := list[str]())
        assert re.search(
            r"holds another base than the policy \(tiny\), or computes in another number type than its float32: 4 of 4",
            said[0],
        )


def test_another_chat_template_is_named_before_anything_is_loaded() -> None:
    policy, said = make_policy("qwen2"), list[str]()
    prompt = render(policy.tokenizer, Prompt("q", ({"role": "user", "content": "hi"},)))
    with stand_ins(wrong := StandIn(template=TEMPLATE.replace("assistant", "model")), StandIn()) as servers:
        VllmEngine(policy, pool_of(servers, said, [prompt]), stop_ids=STOPS)
        assert "/v1/load_lora_adapter" not in wrong.told
    (told,) = said
    assert "another chat template or tokenizer than the policy: it renders prompt q as" in told


def test_an_adapter_that_differs_by_a_hair_from_the_one_before_is_still_told_from_it() -> None:
    """By less than rounding would be allowed to differ: the way to the known wrong model shows it."""
    with stand_ins(wrong := StandIn(), StandIn()) as servers:
        policy, said = make_policy("qwen2"), list[str]()
        engine = opened(policy, servers, said)
        wrong.takes = adapter_of_before
        set_lora(policy, 0.02 * 1.001)
        engine.update(policy)
        gap = float(re.search(r"by up to ([\d.e-]+) nats", said[0])[1])  # type: ignore[index]
        assert "samples with the adapter before" in said[0]
        assert gap < 1e-3


def test_servers_hold_one_adapter_each_and_its_name_is_the_hash_of_its_bytes() -> None:
    with stand_ins(StandIn(), StandIn()) as servers:
        policy = make_policy("qwen2")
        engine = opened(policy, servers, [])
        seen = [set(servers[0].models)]
        for size in (0.03, 0.02, 0.02):
            set_lora(policy, size)
            engine.update(policy)
            seen.append(set(servers[0].models))
            assert set(servers[1].models) == seen[-1]
        assert all(len(models) == 2 for models in seen)  # the base, and one adapter
        hashes = ["".join(models - {"the-base"}).rpartition("-")[2] for models in seen]
        assert hashes[0] == hashes[2] == hashes[3] != hashes[1]
        assert servers[0].told.count("/v1/load_lora_adapter") == 3  # the same bytes are not sent twice
        with policy.adapter_off():
            engine.update(policy)
        assert set(servers[0].models) == {"the-base"}
        assert len(samplers(engine)) == 2


def test_a_server_that_comes_back_takes_part_again() -> None:
    with stand_ins(away := StandIn(), StandIn()) as servers:
        policy, said = make_policy("qwen2"), list[str]()
        away.fault = 503, "starting"
        engine = opened(policy, servers, said)
        assert len(samplers(engine)) == 1
        away.fault = None
        set_lora(policy, 0.05)
        engine.update(policy)
        assert len(samplers(engine)) == 2
        assert "refused /v1/load_lora_adapter (503): starting. Its prompts go to other servers" in said[0]
        assert said[1] == f"{away.url} takes part again: it samples from the policy."


def test_where_no_server_is_left_the_run_ends_with_each_ones_fault_and_how_to_start_one() -> None:
    with stand_ins(StandIn(base_seed=1), dying := StandIn()) as servers:
        engine = opened(make_policy("qwen2"), servers, [])
        dying.dies = lambda body: body["n"] > 1
        with pytest.raises(MinigrpoError) as words:
            samplers(engine)
    told = str(words.value)
    assert told.startswith("No server of rollout.server is left. (1) http://127.0.0.1:")
    assert "holds another base" in told
    assert f"(2) No vLLM server answers at {dying.url}" in told
    assert "--resume" in told
    assert "vllm serve" in told


def until_it_is_tried_again() -> Callable[[dict[str, Any]], bool]:
    """Dies over every group, until after that it was asked for a short text again."""
    happened: set[str] = set()

    def dies(body: dict[str, Any]) -> bool:
        if body["n"] == 1:
            happened.update({"tried"} if "died" in happened else ())
            return False
        happened.add("died")
        return "tried" not in happened

    return dies


@pytest.mark.parametrize("is_beside_an_update", [False, True])
def test_lost_servers_are_tried_again_in_the_policys_own_thread_alone(is_beside_an_update: bool) -> None:
    """In any other, the policy that they would be compared with is being updated."""
    with stand_ins(one := StandIn(), other := StandIn()) as servers:
        engine = opened(make_policy("qwen2"), servers, [])
        for server in (one, other):
            server.dies = until_it_is_tried_again()
        with ThreadPoolExecutor(1) as beside:
            asked = beside.submit(samplers, engine).result if is_beside_an_update else partial(samplers, engine)
            if is_beside_an_update:
                with pytest.raises(MinigrpoError, match=r"No server of rollout\.server is left"):
                    asked()
            else:
                assert asked() <= {name_of(one), name_of(other)}


def test_several_urls_open_a_pool_and_one_url_does_not() -> None:
    with stand_ins(StandIn(), StandIn()) as servers:
        policy, urls = make_policy("qwen2"), [server.url for server in servers]
        recipe = Recipe(rollout={"engine": "vllm", "server": ", ".join(urls)}, task={"size": 8})  # type: ignore[arg-type]
        engine = open_vllm(policy, recipe, 8, STOPS)
        assert isinstance(engine.host, ServerPool)
        assert [server.url for server in engine.host.servers] == urls
        assert all(server.fault is None for server in engine.host.servers)  # they render the task's chats alike
        assert 1 < len(fingerprint_prompts(policy, recipe)) <= 4
        told = len(servers[0].told)
        alone = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"server": urls[0]})})
        assert isinstance(open_vllm(policy, alone, 8, STOPS).host, RemoteVllm)
        assert servers[0].told[told:] == ["/v1/load_lora_adapter"]


@pytest.mark.parametrize("other", ["http://a:80/", "http://a//", "HTTP://A", " http://a:80", "http://A:80//"])
def test_a_server_is_named_once_however_it_is_written(other: str) -> None:
    with pytest.raises(ValueError, match=r"rollout\.server names a server twice"):
        Recipe(rollout={"engine": "vllm", "server": f"http://a,{other}"})  # type: ignore[arg-type]
    for different in ("http://a:81", "https://a", "http://a/b", "http://b"):
        Recipe(rollout={"engine": "vllm", "server": f"http://a,{different}"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rollout\.server names no server"):
        Recipe(rollout={"engine": "vllm", "server": " , "})  # type: ignore[arg-type]


def trained(recipe: Recipe, run: RunDir, servers: tuple[StandIn, ...], said: list[str]) -> list[dict[str, Any]]:
    policy = open_policy(recipe)
    prompts = [render(policy.tokenizer, prompt) for prompt in letters().prompts("train")[:4]]
    host: Any = RemoteVllm(servers[0].url, "the-base", 8) if len(servers) == 1 else pool_of(servers, said, prompts)
    run.path.mkdir(exist_ok=True)
    engine = VllmEngine(policy, host, stop_ids=(3,))
    grpo(recipe, letters(), policy, engine, RunLogger(run, recipe.train.steps))
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_a_run_on_a_wrong_a_dying_and_a_slow_server_learns_what_it_learns_on_a_right_one(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, luck, said = recipe_for(tiny_folder(), rollout__prompts=4), random.Random(1), list[str]()
    with stand_ins(StandIn()) as right:
        alone = trained(recipe, RunDir(tmp_path / "alone"), right, said)
    with stand_ins(wrong := StandIn(), dying := StandIn(), slow := StandIn()) as servers:
        wrong.shift = 0.3
        dying.dies = lambda body: body["n"] > 1 and luck.random() < 0.4
        slow.hangs = lambda body: 1.0 if body["n"] > 1 else 0.0
        together = trained(recipe, run := RunDir(tmp_path / "together"), servers, said)
        assert not wrong.rollouts
        assert all(len(server.models) <= 2 for server in servers)  # the base, and one adapter
    rows = [json.loads(line) for line in run.groups.read_text().splitlines()]
    counted = [completion["sampler"] for row in rows for completion in row["completions"]]
    assert len(counted) == 6 * 4 * 4
    assert set(counted) == {name_of(dying), name_of(slow)}
    assert [row["reward"] for row in together] == [row["reward"] for row in alone]
    assert [row["loss"] for row in together] == pytest.approx([row["loss"] for row in alone], abs=1e-5)
    gaps = {name for row in together for name in row if re.fullmatch(r"servers/.+/engine_gap", name)}
    assert gaps == {f"servers/{name_of(server)}/engine_gap" for server in (dying, slow)}
    assert all(row[name] < 1e-4 for row in together for name in gaps & row.keys())
    assert all(sum(row.get(f"servers/{name_of(one)}/groups", 0) for one in (dying, slow)) == 4 for row in together)
    for server, why in (wrong, "holds another base"), (dying, "No vLLM server answers at"), (slow, "is slow"):
        assert any(server.url in sentence and why in sentence for sentence in said), (why, said)


def test_several_servers_sample_ahead_whoever_dies_and_where_all_do_the_run_goes_on_later(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    small = {"rollout__prompts": 4, "rollout__completions": 3, "train__steps": 3}
    recipe, said = recipe_for(tiny_folder(), rollout__ahead=1, **small), list[str]()
    with stand_ins(StandIn()) as right:
        alone = trained(recipe, RunDir(tmp_path / "alone"), right, said)
    assert [row.get("sampled_ahead") for row in alone] == [None, 1, 1]

    def dies_after(server: StandIn, groups: int) -> None:
        server.dies = lambda body: body["n"] > 1 and len(server.rollouts) >= groups

    with stand_ins(one := StandIn(), other := StandIn()) as servers:
        dies_after(one, 5)  # two a step: in the rollout of the third, beside the update of the second
        together = trained(recipe, RunDir(tmp_path / "together"), servers, said)
        one.dies = lambda body: False
        one.asked.clear(), other.asked.clear()
        dies_after(one, 3), dies_after(other, 3)
        with pytest.raises(MinigrpoError, match=r"No server of rollout\.server is left"):
            trained(recipe, RunDir(tmp_path / "later"), servers, said)
        one.dies = other.dies = lambda body: False
        later = trained(recipe, RunDir(tmp_path / "later"), servers, said)
    for rows in (together, later):
        for name in ("reward", "loss"):
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in alone], abs=1e-5), name
