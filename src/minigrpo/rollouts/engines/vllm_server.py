"""One vLLM server that runs already, over its HTTP protocol (OpenAI's, with vLLM's loading of adapters)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from operator import index
from pathlib import Path
from typing import Any

from minigrpo.errors import MinigrpoError, command_line
from minigrpo.models.vllm_compat import vllm_max_lora_rank
from minigrpo.types import Sampling
from minigrpo.utils.http import Connections, StatusError, exchange

REQUEST_TIMEOUT_S = 3600.0
"""Seconds that a server may take for one request: one prompt with all its siblings."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its sampling settings. `seed` determines its random streams."""

    ids: tuple[int, ...]
    n: int
    sampling: Sampling
    seed: int
    stop_ids: tuple[int, ...]

    def sampling_options(self) -> dict[str, Any]:
        """Return all sampling options, also those a generation config could change: the policy is plain softmax."""
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        drawn = {"n": self.n, "temperature": self.sampling.temperature, "max_tokens": self.sampling.max_tokens}
        return {**plain, **drawn, "seed": self.seed, "stop_token_ids": list(self.stop_ids), "logprobs": 0}


VllmSample = tuple[tuple[int, ...], tuple[float, ...], str]
"""Token ids, their log-probabilities, and the finish reason."""


class VllmServerError(MinigrpoError):
    """A server that does not do what it is asked. `reason`: what it did, without the advice that follows it. `code`:
    the HTTP status of a refusal."""

    def __init__(self, reason: str, advice: str = "", code: int | None = None) -> None:
        super().__init__(f"{reason} {advice}".rstrip())
        self.reason, self.advice, self.code = reason, advice, code


class RemoteVllm:
    """A vLLM server that runs already, on a machine that sees the same files.

    `overrides`: changes to the model's config that vLLM needs. `needs`: tokens that it must be able to read.
    `vocabulary`: how many tokens the policy knows. `wait`: seconds that it may take to say that it is there.
    """

    length: int | None = None
    keeps_weights = True

    def __init__(
        self,
        url: str,
        model: str,
        rank: int,
        *,
        overrides: Mapping[str, Any] | None = None,
        needs: int | None = None,
        vocabulary: int | None = None,
        wait: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self.url, self.model, self.rank, self.overrides, self.needs = url.rstrip("/"), model, rank, overrides, needs
        self.vocabulary = vocabulary
        self._loaded: str | None = None
        try:
            self.base = str(self.call("/v1/models", wait=wait)["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise VllmServerError(f"What answers at {self.url} lists no model.", self._start_advice()) from None

    def load_adapter(self, name: str, folder: Path) -> None:
        self.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if self._loaded:
            self.call("/v1/unload_lora_adapter", {"lora_name": self._loaded})
        self._loaded = name

    def check(self, policy: Any, adapter: str | None) -> None:
        """Do nothing: the only server there is answers, or the run ends."""

    def complete(self, requests: Sequence[Request], adapter: str | None, deliver: Any) -> None:
        with ThreadPoolExecutor(max_workers=64) as threads:
            samples = [threads.submit(self.answer, each, adapter or self.base) for each in requests]
            try:
                for index, found in enumerate(samples):
                    deliver(index, found.result())
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def answer(
        self,
        request: Request,
        model: str,
        *,
        wait: float = REQUEST_TIMEOUT_S,
        connections: Connections | None = None,
    ) -> list[VllmSample]:
        """Return the siblings of one prompt. `model`: an adapter's name, or the base's. Raises VllmServerError."""
        own = {"model": model, "prompt": list(request.ids), "return_token_ids": True, "add_special_tokens": False}
        body = {**own, **request.sampling_options()}
        found = self.call("/v1/completions", body, wait=wait, connections=connections)
        try:
            samples = [_sample_of(choice) for choice in _in_order(found["choices"], request.n)]
        except (LookupError, TypeError, ValueError, AttributeError):  # whatever an answer may be instead
            raise VllmServerError(
                f"The server at {self.url} returns no token ids with their log-probabilities for {request.n} "
                "completions.",
                "It must be vLLM 0.11 or newer.",
            ) from None
        for ids, _, finish in samples:
            if wrong := _wrong_end(ids, finish, request) or self._unknown_token(ids):
                raise VllmServerError(f"The server at {self.url} {wrong}.")
        return samples

    def _unknown_token(self, ids: Sequence[int]) -> str:
        unknown = next((token for token in ids if not 0 <= token < (self.vocabulary or math.inf)), None)
        return "" if unknown is None else f"answers with token {unknown}, which the policy does not know"

    def call(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        wait: float = REQUEST_TIMEOUT_S,
        connections: Connections | None = None,
    ) -> Any:
        """Send one request and return its answer; {} for one in plain text. Raises VllmServerError."""
        try:
            text = exchange(self.url + path, body, timeout=wait, connections=connections)
        except StatusError as fault:
            message = " ".join(fault.raw.decode(errors="replace").split())[:300]
            reason = f"The vLLM server at {self.url} refused {path} ({fault.code}): {message}."
            raise VllmServerError(reason, self._start_advice(), fault.code) from None
        except (OSError, ValueError, HTTPException) as fault:
            why = getattr(fault, "reason", fault)
            raise VllmServerError(f"No vLLM server answers at {self.url} ({why}).", self._start_advice()) from None
        try:
            return json.loads(text)
        except ValueError:
            return {}  # the adapter endpoints answer in plain text

    def _start_advice(self) -> str:
        words = ["vllm", "serve", self.model, "--enable-lora", "--max-lora-rank", vllm_max_lora_rank(self.rank)]
        words += ["--max-model-len", self.needs] if self.needs else []
        overrides = ["--hf-overrides", json.dumps(self.overrides)] if self.overrides else []
        serve = command_line(*words, "--logprobs-mode", "processed_logprobs", *overrides)
        return (
            "A run that was under way goes on with --resume. The server is started so: "
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {serve}"
        )


def _in_order(choices: Sequence[Any], n: int) -> list[Any]:
    """Return n choices by their index. Raises ValueError where there are others, TypeError or LookupError for none."""
    found = sorted(choices, key=lambda choice: choice["index"])
    if [choice["index"] for choice in found] != list(range(n)):
        raise ValueError(f"{len(found)} of {n} completions")
    return found


def _sample_of(choice: Any) -> VllmSample:
    ids, logprobs = tuple(map(index, choice["token_ids"])), choice["logprobs"]["token_logprobs"]
    # JSON has no NaN: a server writes null in its place.
    numbers = tuple(math.nan if logprob is None else float(logprob) for logprob in logprobs)
    if len(ids) != len(numbers) or not ids:
        raise ValueError(f"{len(ids)} ids and {len(numbers)} log-probabilities")
    return ids, numbers, str(choice["finish_reason"])


def _wrong_end(ids: Sequence[int], finish: str, request: Request) -> str:
    """Return what is wrong with where a completion ends; "" where it ends as it was asked to.

    One that is cut short is told from one that has run into the limit by its length alone: training would take it for
    that, and punish it.
    """
    most = request.sampling.max_tokens
    if finish != "stop" and len(ids) != most:
        return f"ends a completion after {len(ids)} of {most} tokens ({finish})"
    if finish == "stop" and len(ids) > most:
        return f"ends a completion after {len(ids)} tokens, and {most} were asked for"
    if finish == "stop" and request.stop_ids and ids[-1] not in request.stop_ids:
        return f"ends a completion at token {ids[-1]}, which is no stop token of the policy: its files are others"
    return ""
