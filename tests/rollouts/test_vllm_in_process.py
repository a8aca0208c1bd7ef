"""vLLM in the trainer's process, against a stand-in for its package: what it is opened with, and who holds the memory.

The stand-in is as strict as vLLM 0.33: it plans for `max_model_len` tokens of each row, it answers only while it is
awake, it wakes only where the GPU has room, and it answers from the adapter's files, which must be there then.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from minigrpo.config.schema import Recipe
from minigrpo.errors import ModelError
from minigrpo.models.policy import Policy
from minigrpo.rollouts.engines import vllm
from minigrpo.rollouts.engines.vllm import VllmEngine, needed_length, open_vllm
from minigrpo.types import Sampling
from minigrpo.utils import memory
from tests.helpers.models import make_policy, rendered, set_lora
from tests.helpers.tiny import build_model

STOPS = (3, 17, 50, 60)
ROOM = 400
"""Tokens of one row for which the stand-in's GPU has memory."""


class Gpu:
    """What two allocators share: torch's cache of freed tensors is in the way until it is emptied."""

    def __init__(self) -> None:
        self.cached = True
        self.opened: list[Llm] = []

    def empty_cache(self) -> None:
        self.cached = False

    def require_room(self) -> None:
        if self.cached:
            raise torch.OutOfMemoryError("CUDA out of memory: torch's cache holds what vLLM needs")


class Llm:
    gpu: Gpu

    def __init__(self, model: str, *, dtype: str, max_model_len: int | None = None, **options: Any) -> None:
        self.gpu.require_room()
        if (max_model_len or 262_144) > ROOM:
            raise ValueError("To serve at least one request with the model's max seq len, more KV cache is needed.")
        self.model, self.dtype, self.length, self.options = model, dtype, max_model_len, options
        self.awake = True
        self.gpu.opened.append(self)

    def sleep(self, level: int = 1) -> None:
        self.awake = False

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.gpu.require_room()
        self.awake = True

    @torch.no_grad()
    def generate(self, prompts: Any, sampling_params: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        from peft import PeftModel

        assert self.awake
        model = build_model("qwen2")
        if lora_request:
            assert lora_request.lora_int_id > 0
            model = PeftModel.from_pretrained(model, lora_request.lora_path).eval()
        return [
            self.answer(model, asked["prompt_token_ids"], p) for asked, p in zip(prompts, sampling_params, strict=True)
        ]

    def answer(self, model: Any, ids: list[int], params: Any) -> Any:
        own: list[int] = []
        logprobs = []
        for _ in range(params.max_tokens):
            assert len(ids) + len(own) < self.length
            scores_V = model(torch.tensor([[*ids, *own]])).logits[0, -1].log_softmax(-1)
            own.append(int(scores_V.argmax()))
            logprobs.append({own[-1]: SimpleNamespace(logprob=float(scores_V.max()))})
        output = SimpleNamespace(token_ids=own, logprobs=logprobs, finish_reason="length")
        return SimpleNamespace(outputs=[output] * params.n)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    package, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    package.__spec__ = ModuleSpec("vllm", None)
    package.LLM = type("LLM", (Llm,), {"gpu": found})  # type: ignore[attr-defined]
    package.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: SimpleNamespace(lora_int_id=number, lora_path=path)  # type: ignore[attr-defined]
    for name, module in {"vllm": package, "vllm.lora": ModuleType("vllm.lora"), "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm, "empty_cache", found.empty_cache)
    for name in memory.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return found


def opened(policy: Policy, **sections: Any) -> VllmEngine:
    recipe = Recipe(rollout={"engine": "vllm", "max_tokens": 20}, task={"size": 8}, **sections)
    return open_vllm(policy, recipe, 8, STOPS)


def test_it_makes_room_for_what_the_recipe_needs_and_not_for_all_that_the_model_can_read(gpu: Gpu) -> None:
    policy = make_policy("qwen2", max_position_embeddings=262_144)
    engine = opened(policy)
    (llm,) = gpu.opened
    recipe = Recipe(rollout={"max_tokens": 20}, task={"size": 8})  # type: ignore[arg-type]
    assert llm.length == engine.context == needed_length(policy, recipe)
    with pytest.raises(ModelError, match=r"rollout\.max_tokens"):
        engine.generate(rendered((llm.length - 19,)), 1, Sampling(0.0, 20))
    engine.generate(rendered((llm.length - 20,)), 1, Sampling(0.0, 20))


def test_no_more_room_is_asked_for_than_the_model_has(gpu: Gpu) -> None:
    opened(make_policy("qwen2", max_position_embeddings=64))
    assert gpu.opened[0].length == 64


def test_it_computes_in_the_number_type_of_the_policy(gpu: Gpu) -> None:
    """`auto` would be the base's own: bfloat16 on a T4, which has none."""
    policy = make_policy("qwen2")
    policy.dtype = torch.float16
    opened(policy)
    assert gpu.opened[0].dtype == "float16"


def test_of_a_model_that_reads_pictures_only_the_text_part_is_planned_for(gpu: Gpu) -> None:
    opened(make_policy("mistral3"))
    opened(make_policy("qwen2"))
    assert [llm.options.get("limit_mm_per_prompt") for llm in gpu.opened] == [{"image": 0}, None]


def test_updates_keep_one_folder_and_the_newest_adapter_answers(gpu: Gpu) -> None:
    policy = make_policy("qwen2")
    engine = opened(policy)
    asked = rendered((9,)), 1, Sampling(0.0, 20)
    folder = Path(engine._folder.name)
    for size in (0.3, 0.9):
        set_lora(policy, size)
        before = engine.generate(*asked)
        engine.update(policy)
        assert len(list(folder.iterdir())) == 1
        assert engine.generate(*asked) != before


def test_it_wakes_only_after_torch_has_given_back_what_the_trainer_left(gpu: Gpu) -> None:
    engine = opened(make_policy("qwen2"))
    for _ in range(2):
        gpu.cached = True  # an update came before
        engine.generate(rendered((9,)), 1, Sampling(0.0, 5))
        assert not gpu.opened[0].awake


@pytest.mark.parametrize("name", memory.ALLOCATOR_VARIABLES)
def test_an_allocator_beside_which_it_cannot_sleep_is_named(
    gpu: Gpu, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(ModelError, match=rf"{name}=max_split_size_mb:64.*--rollout\.server"):
        opened(make_policy("qwen2"))
    assert not gpu.opened


@pytest.mark.needs("linux")
def test_so_is_one_that_an_earlier_run_of_the_process_has_set(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has read it then, though the environment no longer says so."""
    monkeypatch.setattr(memory, "_was_expandable", False)
    with memory.expandable_segments():
        pass
    opened(make_policy("qwen2"))  # nothing was computed on a GPU, so torch has not read it
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ModelError, match="an earlier run of this process"):
        opened(make_policy("qwen2"))
