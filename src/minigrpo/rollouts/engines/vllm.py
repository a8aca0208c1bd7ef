"""The vLLM engine: rollouts by vLLM, in this process or by a server, where vLLM is installed.

Only the adapter is sent: it is saved in PEFT's format at every update and loaded under a new name. The base that vLLM
holds is never merged into: a hundred merges in place move more than half of a 16-bit base's weights. vLLM rounds in its
own way and in its own order, so what it samples is not quite the policy's: `objective.importance auto` corrects for it,
and the distance is logged at every step (engine_gap).

Several servers share the prompts of a step (`server_pool`). In this process (`rollout.server` null) vLLM sleeps while
the policy trains: it lets its cache go and moves its weights to the CPU. Before it wakes, torch gives back what it
keeps for the trainer's next tensors.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from minigrpo.config.schema import Recipe
from minigrpo.errors import ModelError
from minigrpo.models.chat_template import render
from minigrpo.models.context_window import MULTIMODAL_WRAPPERS, check_room, context_length, longest_prompt
from minigrpo.models.lora import save_adapter
from minigrpo.models.vllm_compat import VLLM_LORA_RANKS, vllm_config_overrides, vllm_max_lora_rank
from minigrpo.rollouts.engines.fingerprint import FINGERPRINT_TEXTS
from minigrpo.rollouts.engines.sampling import ProgressCounter, refuse_broken_logits
from minigrpo.rollouts.engines.server_pool import ADMISSION_WAIT_S, ServerPool
from minigrpo.rollouts.engines.vllm_server import RemoteVllm, Request, VllmSample
from minigrpo.tasks.registry import open_task
from minigrpo.types import Completion, Progress, Ready, Rendered, Sampling
from minigrpo.utils.memory import empty_cache, expandable_setting
from minigrpo.utils.rng import name_key

SEED_RANGE = 2**31
FINGERPRINT_CANDIDATES = 64
"""Training prompts among which the shortest are looked for."""


class VllmHost(Protocol):
    """Where vLLM runs. `length`: most tokens of a prompt with its answer; None: what the model can read."""

    length: int | None

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter; the previous one may be unloaded, for its folder is removed after `check`."""
        ...

    def check(self, policy: Any, adapter: str | None) -> None:
        """Make sure that what samples has the policy's weights, where others may sample in its place."""
        ...

    def complete(self, requests: Sequence[Request], adapter: str | None, deliver: Any) -> None:
        """Call deliver(i, samples) for each prompt, in any order. `adapter` None: the base alone.

        A third argument names the server, where there are several.
        """
        ...


class VllmEngine:
    is_exact = False

    def __init__(self, policy: Any, host: VllmHost, *, stop_ids: Sequence[int]) -> None:
        self.host, self.stop_ids = host, tuple(sorted(stop_ids))
        self.keeps_weights = getattr(host, "keeps_weights", False)
        self.tokenizer, self.context = policy.tokenizer, host.length or context_length(policy.model)
        self._folder = tempfile.TemporaryDirectory(prefix="minigrpo-adapters-")
        self._count = 0
        self.adapter: str | None = None
        self.update(policy)

    def update(self, policy: Any) -> None:
        """Save the current adapter, have vLLM load it, and remove the one before; none where it is switched off."""
        self.adapter = None
        if _adapter_is_off(policy.model):
            self.host.check(policy, None)
            return
        self._count += 1
        name = f"policy-{self._count}"
        folder = Path(self._folder.name) / name
        save_adapter(policy.model, folder)
        self.host.load_adapter(name, folder)
        self.host.check(policy, name)
        self.adapter = name
        for earlier in set(folder.parent.iterdir()) - {folder}:
            shutil.rmtree(earlier)

    def generate(
        self,
        prompts: Sequence[Rendered],
        n: int,
        sampling: Sampling,
        ready: Ready | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Return n completions of each prompt, in order. Raises MinigrpoError where vLLM does not answer."""
        check_room(prompts, sampling.max_tokens, self.context)
        seeds = [name_key(sampling.seed, prompt.prompt.id) % SEED_RANGE for prompt in prompts]
        requests = [
            Request(prompt.ids, n, sampling, seed, self.stop_ids) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        done: dict[int, tuple[Completion, ...]] = {}
        counter = ProgressCounter(progress, ready)

        def deliver(index: int, samples: Sequence[VllmSample], sampler: str = "") -> None:
            refuse_broken_logits(prompts[index].prompt.id, [logprobs for _, logprobs, _ in samples])
            done[index] = self._completions(samples, sampler)
            counter.finish(index, done[index])

        self.host.complete(requests, self.adapter, deliver)
        return [done[index] for index in range(len(prompts))]

    def _completions(self, samples: Sequence[VllmSample], sampler: str) -> tuple[Completion, ...]:
        texts = self.tokenizer.batch_decode([ids for ids, _, _ in samples], skip_special_tokens=True)
        return tuple(
            Completion(text, ids, logprobs, "stop" if finish == "stop" else "length", sampler=sampler)
            for text, (ids, logprobs, finish) in zip(texts, samples, strict=True)
        )


def _adapter_is_off(model: Any) -> bool:
    return any(module.disable_adapters for module in model.modules() if hasattr(module, "lora_A"))


class LocalVllm:
    """vLLM in this process, on the policy's GPU; it sleeps except during `complete`.

    `length`: most tokens of a prompt with its answer. Left to itself, vLLM makes room for all that the model can read:
    of 262,144 tokens one row alone may be more than the GPU holds.
    """

    def __init__(self, policy: Any, *, recipe: Recipe, rows: int, length: int, overrides: Mapping[str, Any]) -> None:
        if find_spec("vllm") is None:
            raise ModelError(
                "rollout.engine vllm needs vLLM, which is not installed here. Install it (pip install vllm), name a "
                "server that runs elsewhere (--rollout.server http://HOST:8000), or use --rollout.engine auto"
            )
        _refuse_expandable_segments()
        from vllm import LLM

        self.length: int | None = length
        empty_cache()  # vLLM begins by looking how much is free
        self.llm = LLM(
            model=policy.path,
            revision=recipe.model.revision,
            dtype=str(policy.dtype).removeprefix("torch."),
            enable_lora=True,
            max_lora_rank=vllm_max_lora_rank(recipe.lora.rank),
            max_loras=1,
            max_num_seqs=rows,
            max_model_len=length,
            gpu_memory_utilization=recipe.rollout.share,
            enable_sleep_mode=True,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            hf_overrides=dict(overrides),
            **({"limit_mm_per_prompt": {"image": 0}} if policy.model.config.model_type in MULTIMODAL_WRAPPERS else {}),
        )
        self._loaded: tuple[str, int, Path] | None = None
        self.llm.sleep(level=1)

    def load_adapter(self, name: str, folder: Path) -> None:
        self._loaded = name, int(name.rpartition("-")[2]), folder

    def check(self, policy: Any, adapter: str | None) -> None:
        """Do nothing: vLLM reads the adapter in this process, and no other sampler can take its place."""

    def complete(self, requests: Sequence[Request], adapter: str | None, deliver: Any) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        request = None
        if adapter and self._loaded:
            name, number, folder = self._loaded
            request = LoRARequest(name, number, str(folder))
        sampling_options = [SamplingParams(**each.sampling_options(), detokenize=False) for each in requests]
        empty_cache()
        self.llm.wake_up()
        try:
            prompts = [{"prompt_token_ids": list(each.ids)} for each in requests]
            found = self.llm.generate(prompts, sampling_options, lora_request=request, use_tqdm=False)
        finally:
            self.llm.sleep(level=1)
        for index, output in enumerate(found):
            deliver(index, [_answer_of(one) for one in output.outputs])


def _answer_of(output: Any) -> VllmSample:
    ids = tuple(output.token_ids)
    logprobs = tuple(float(at[token].logprob) for at, token in zip(output.logprobs, ids, strict=True))
    return ids, logprobs, str(output.finish_reason)


def open_vllm(policy: Any, recipe: Recipe, rows: int, stop_ids: Sequence[int]) -> VllmEngine:
    if not policy.is_lora:
        raise ModelError(
            "rollout.engine vllm takes over an adapter, and this model has none. Use --rollout.engine auto"
        )
    rank, servers = recipe.lora.rank, recipe.rollout.servers
    if vllm_max_lora_rank(rank) is None:
        raise ModelError(f"vLLM takes adapters up to rank {VLLM_LORA_RANKS[-1]}, and lora.rank is {rank}.")
    overrides, length = vllm_config_overrides(policy.model.config.to_dict()), needed_length(policy, recipe)
    known = policy.model.get_input_embeddings().num_embeddings
    remote = partial(RemoteVllm, model=policy.path, rank=rank, overrides=overrides, needs=length, vocabulary=known)
    host: VllmHost
    if len(servers) > 1:
        host = ServerPool(
            servers,
            partial(remote, wait=ADMISSION_WAIT_S),
            fingerprint_prompts(policy, recipe),
            template_options=recipe.model.template,
        )
    elif servers:
        host = remote(servers[0])
    else:
        host = LocalVllm(policy, recipe=recipe, rows=rows, length=length, overrides=overrides)
    return VllmEngine(policy, host, stop_ids=stop_ids)


def fingerprint_prompts(policy: Any, recipe: Recipe) -> list[Rendered]:
    """Return the shortest of the recipe's first prompts, which servers continue to show whose weights they have."""
    prompts = list(open_task(recipe).prompts("train"))[:FINGERPRINT_CANDIDATES]
    return sorted((render(policy.tokenizer, prompt) for prompt in prompts), key=lambda one: len(one.ids))[
        :FINGERPRINT_TEXTS
    ]


def needed_length(policy: Any, recipe: Recipe) -> int:
    """Return the tokens of the recipe's longest prompt, of training or evaluation, with the longest answer."""
    task = open_task(recipe)
    prompts = [*task.prompts("train"), *task.prompts("test")]
    needed = longest_prompt(prompts, policy.tokenizer) + recipe.rollout.max_tokens
    return min(needed, context_length(policy.model) or needed)


def _refuse_expandable_segments() -> None:
    """Raise ModelError where torch's allocator is set so that vLLM cannot sleep: it asserts that, under one name."""
    if setting := expandable_setting():
        raise ModelError(
            f"rollout.engine vllm in this process cannot be combined with {setting}: vLLM's memory could not be given "
            "back while the policy trains. Begin a new process without it, or let vLLM run as a server: "
            "--rollout.server http://HOST:8000"
        )
