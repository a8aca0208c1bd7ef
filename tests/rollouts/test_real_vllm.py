"""vLLM itself, from another environment: one server samples the policy, and of several each proves that it does.

On a CPU, where a wheel for it can be had, or on a GPU. A server takes a minute to start.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.models.chat_template import render
from minigrpo.models.policy import Policy, open_policy
from minigrpo.rollouts.engines.server_pool import ServerPool
from minigrpo.rollouts.engines.vllm import VllmEngine, open_vllm
from minigrpo.rollouts.engines.vllm_server import RemoteVllm
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training.grpo import grpo
from minigrpo.types import Sampling
from tests.helpers.models import make_policy, rendered, set_lora
from tests.helpers.tiny import build_model
from tests.rollouts.test_vllm_engine import STOPS, gap
from tests.training.test_training_options import letters, recipe_for

pytestmark = [pytest.mark.long, pytest.mark.env("MINIGRPO_VLLM"), pytest.mark.timeout(1200)]

START_S = 400
CLOSE = 2e-2
"""Nats between log-probabilities of vLLM and of the policy, both in float32, for the same tokens."""
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Served:
    url: str
    process: subprocess.Popen[bytes]

    @property
    def name(self) -> str:
        return self.url.removeprefix("http://")

    def kill(self) -> None:
        """Kill it with its workers, which would outlive it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def models(self) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as answer:
            return [model["id"] for model in json.load(answer)["data"]]


@contextmanager
def vllm_servers(*bases: Path) -> Iterator[list[Served]]:
    """Start a server on each base, all at once, and wait until they answer."""
    with ExitStack() as stack:
        servers = [stack.enter_context(_started(base, base.parent / f"log{place}")) for place, base in enumerate(bases)]
        for place, (base, server) in enumerate(zip(bases, servers, strict=True)):
            _wait_for(server, base.parent / f"log{place}")
        yield servers


@contextmanager
def _started(base: Path, log: Path) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["MINIGRPO_VLLM"], "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--port", str(port), "--enable-lora", "--max-lora-rank", "8", "--dtype", "float32"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-model-len", "256", "--enforce-eager"]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    options: dict[str, Any] = {"env": environment, "start_new_session": True}
    with log.open("w") as words, subprocess.Popen(command, stdout=words, stderr=words, **options) as process:
        server = Served(f"http://127.0.0.1:{port}", process)
        try:
            yield server
        finally:
            server.kill()


def _wait_for(server: Served, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert server.process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)


def saved_base(folder: Path, policy: Policy, **config: Any) -> Path:
    build_model("qwen2", **SHAPE, **config).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def test_a_server_samples_the_policy(tmp_path: Path) -> None:
    policy = make_policy("qwen2", head_dim=32, **SHAPE)
    base = saved_base(tmp_path / "base", policy)
    with vllm_servers(base) as (server,):
        engine = VllmEngine(policy, RemoteVllm(server.url, str(base), 8), stop_ids=STOPS)
        assert gap(engine, policy) < CLOSE
        set_lora(policy, 0.05)
        assert gap(engine, policy) > CLOSE
        engine.update(policy)
        assert gap(engine, policy) < CLOSE


def test_of_several_servers_only_those_that_prove_themselves_sample_and_a_dead_ones_prompts_go_to_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy("qwen2", head_dim=32, **SHAPE)
    right = saved_base(tmp_path / "base", policy)
    other = make_policy("qwen2", head_dim=32, **SHAPE)
    for parameter in other.model.get_base_model().parameters():
        parameter.data = parameter.data * 1.3
    wrong = tmp_path / "other"
    other.model.unload().save_pretrained(wrong)
    policy.tokenizer.save_pretrained(wrong)
    with vllm_servers(right, right, wrong) as (first, second, stranger):
        urls = ",".join(server.url for server in (first, second, stranger))
        recipe = Recipe.model_validate(
            {"rollout": {"engine": "vllm", "server": urls, "max_tokens": 16}, "task": {"size": 8}}
        )
        engine = open_vllm(policy, recipe, 8, STOPS)
        told = capfd.readouterr().err
        assert f"Left out: {stranger.url} holds another base" in " ".join(told.split())
        set_lora(policy, 0.05)
        engine.update(policy)
        assert gap(engine, policy) < CLOSE
        assert samplers(engine) == {first.name, second.name}
        assert [len(server.models()) for server in (first, second)] == [2, 2]  # the base, and the adapter of now
        metrics = trained(recipe_for(right, rollout__prompts=4), urls.split(","), tmp_path / "run")
        found = [(name, row[name]) for row in metrics for name in row if re.fullmatch("servers/.*/engine_gap", name)]
        assert {name for name, _ in found} == {f"servers/{server.name}/engine_gap" for server in (first, second)}
        assert max(value for _, value in found) < CLOSE
        assert metrics[-1]["reward"] > metrics[0]["reward"]
        second.kill()
        assert samplers(engine) == {first.name}
        assert second.url in capfd.readouterr().err


def trained(recipe: Recipe, urls: list[str], folder: Path) -> list[dict[str, Any]]:
    policy, run = open_policy(recipe), RunDir(folder)
    prompts = [render(policy.tokenizer, prompt) for prompt in letters().prompts("train")[:4]]
    pool = ServerPool(urls, partial(RemoteVllm, model=recipe.model.path, rank=8), prompts)
    run.path.mkdir()
    grpo(recipe, letters(), policy, VllmEngine(policy, pool, stop_ids=(3,)), RunLogger(run, recipe.train.steps))
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def samplers(engine: VllmEngine) -> set[str]:
    answers = engine.generate(rendered((1, 9, 5, 4)), 2, Sampling(0.9, 4, 7))
    return {completion.sampler for own in answers for completion in own}
