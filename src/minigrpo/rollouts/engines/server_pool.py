"""Several vLLM servers: each takes over an adapter, proves that it samples with it, and then gets its share of prompts.

After every update, before a server's samples count:

    it renders a chat          other tokens than the policy's tokenizer: another chat template (when it is first asked)
    it unloads and loads       the adapter before, the adapter now, under a name with the hash of its files
    it samples short texts     the policy scores the same tokens (`fingerprint`): another base, adapter or temperature

Afterwards the policy scores a few tokens of each group as it comes: a server may be started anew between two updates.
One that fails is left out and told in a sentence; it is tried again after the next update, then after two, four
... more. The run ends where none is left.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.text import Text
from torch import Tensor

from minigrpo.errors import MinigrpoError
from minigrpo.models.chat_template import ChatTemplate, template_messages, turn_options
from minigrpo.rollouts.engines.dealing import PATIENCE_S, Deal
from minigrpo.rollouts.engines.fingerprint import (
    LIMITS,
    Verdict,
    fingerprint_requests,
    group_gap,
    judge_texts,
    policy_logprobs,
    reported_logprobs,
)
from minigrpo.rollouts.engines.sampling import refuse_broken_logits
from minigrpo.rollouts.engines.vllm_server import RemoteVllm, Request, VllmSample, VllmServerError
from minigrpo.types import Rendered
from minigrpo.ui.screen import Screen
from minigrpo.utils.http import Connections

REVIVALS = 2
"""How often servers that were lost are tried again within one call, once all are."""
ADMISSION_WAIT_S = 60.0
"""Seconds that a server may take for each of the few small questions before its samples count."""

NOT_FINITE = "answers with log-probabilities that are not finite"
NO_ADAPTER, ADAPTER_BEFORE = "without adapter", "with the adapter before"


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter under the name by which servers load it, which ends with the hash of its files."""

    name: str
    digest: str
    folder: Path


class PoolServer:
    """One server of a pool. `name`: in the figures of a step. `fault`: why it is left out; None: its samples count."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self.name = f"{parts.netloc.rpartition('@')[2]}{parts.path}" or self.url
        self.remote: RemoteVllm | None = None
        self.model = ""
        self.loaded: list[str] = []
        self.fault: VllmServerError | None = VllmServerError(f"{self.url} has not been asked yet.")
        self.is_slow = False
        self.updates_left, self.pause = 0, 1

    def answer(self, request: Request, connections: Connections) -> list[VllmSample]:
        assert self.remote is not None, "only a server that was admitted is asked"
        samples = self.remote.answer(request, self.model, connections=connections)
        if not _are_finite(samples):
            raise VllmServerError(f"{self.url} {NOT_FINITE}.")
        return samples

    def leave_out(self, fault: VllmServerError, *, is_slow: bool) -> None:
        """Leave it out for `pause` updates; next time for twice as many."""
        self.fault, self.is_slow = fault, is_slow
        self.updates_left, self.pause = self.pause, 2 * self.pause
        if not is_slow:
            self.remote = None  # whatever runs there when it is tried again is looked at from the beginning


class ServerPool:
    """A host of the vLLM engine over several servers, on machines that see the same files.

    `open_server(url)` connects to one, or raises VllmServerError. `prompts`: what the fingerprints begin with.
    `template_options`: of the chat template, by which the recipe renders. `say` is told each fault.
    """

    length: int | None = None
    keeps_weights = True

    def __init__(
        self,
        urls: Iterable[str],
        open_server: Callable[[str], RemoteVllm],
        prompts: Sequence[Rendered],
        *,
        template_options: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
        patience: float = PATIENCE_S,
    ) -> None:
        self.servers = [PoolServer(url) for url in urls]
        self.prompts, self.patience = prompts, patience
        self._open_server, self._template_options = open_server, dict(template_options or {})
        self._say = say or _print
        self._served: ServedAdapter | None = None
        self._checked: str | None = None
        self._policy: Any = None
        self._owner = 0
        self._now_digest = ""
        self._now: list[Tensor] = []
        self._before: list[Tensor] = []

    def load_adapter(self, name: str, folder: Path) -> None:
        """Name the adapter by the hash of its files; one of the same bytes keeps its name. `check` sends it."""
        digest = _hash_of(folder)
        if self._served and self._served.digest == digest:
            self._served = replace(self._served, folder=folder)
        else:
            self._served = ServedAdapter(f"{name}-{digest}", digest, folder)

    def check(self, policy: Any, adapter: str | None) -> None:
        """Have each server take over the adapter, or none, and prove it. Raises MinigrpoError where no server does.

        What the servers have proved already is not asked again.
        """
        if adapter is None:
            self._served = None
        key = self._served.digest if self._served else ""
        if key == self._checked and self._passed():
            return
        self._policy, self._owner = policy, threading.get_ident()
        self._remember(policy, key)
        for server in self.servers:
            server.updates_left = max(0, server.updates_left - 1)
        due = [server for server in self.servers if server.fault is None or server.updates_left == 0]
        others = [server for server in self.servers if server not in due]
        self._admit(policy, due)
        if not self._passed():
            self._admit(policy, others)
        if not self._passed():
            raise self._nobody()
        self._checked = key

    def complete(self, requests: Sequence[Request], adapter: str | None, deliver: Any) -> None:
        """Deal the prompts to the servers that have passed. Raises MinigrpoError where none is left.

        The policy is asked only in the thread that called `check`: in another one (rollout.ahead) it is being updated,
        so there servers that were lost are not tried again, and groups are not scored.
        """
        is_mine = threading.get_ident() == self._owner
        revivals = iter(range(REVIVALS if is_mine else 0))

        def revive() -> list[PoolServer]:
            if next(revivals, None) is None:
                raise self._nobody()
            self._admit(self._policy, self.servers)
            return self._passed() or revive()

        def check(index: int, samples: list[VllmSample]) -> str:
            return self._wrong_weights(requests[index], samples) if is_mine and adapter else ""

        deal = Deal(self._passed() or revive(), requests, self._leave_out, revive, check=check, patience=self.patience)
        deal.run(lambda index, samples, server: deliver(index, samples, server.name))
        for server in self._passed():
            server.pause = 1

    def _wrong_weights(self, request: Request, samples: Sequence[VllmSample]) -> str:
        """Return what is wrong with a group that was not sampled from the policy; "" for one that was."""
        policy = self._policy
        if request.sampling.temperature != policy.temperature:  # its log-probabilities are others, as they must be
            return ""
        gap = group_gap(policy, request.ids, samples)
        if gap <= LIMITS[policy.is_sixteen_bit]:
            return ""
        return f"sampled from the policy and now does not: a group is off by {gap:.2g} nats a token"

    def _passed(self) -> list[PoolServer]:
        """Return the servers whose samples count."""
        return [server for server in self.servers if server.fault is None]

    def _remember(self, policy: Any, key: str) -> None:
        """Keep a copy of the adapter on the CPU: after the next update it is the one that nobody may have any more."""
        if key and key != self._now_digest:
            self._before, self._now = self._now, [tensor.detach().cpu().clone() for tensor in policy.trainable]
            self._now_digest = key

    def _admit(self, policy: Any, servers: Sequence[PoolServer]) -> None:
        """Let servers sample side by side, then compare one after the other: only this thread uses the policy."""
        if not servers:
            return
        requests = fingerprint_requests(self.prompts, policy.temperature, self._served.name if self._served else "")
        with ThreadPoolExecutor(max_workers=len(servers)) as threads:
            outcomes = list(threads.map(partial(self._prepare, policy.tokenizer, requests), servers))
        for server, outcome in zip(servers, outcomes, strict=True):
            fault = outcome if isinstance(outcome, VllmServerError) else self._compare(policy, server, outcome)
            if fault is not None:
                self._leave_out(server, fault, False)
            else:
                if server.pause > 1:
                    self._say(f"{server.url} takes part again: it samples from the policy.")
                server.fault, server.is_slow = None, False

    def _prepare(
        self, tokenizer: Any, requests: Sequence[Request], server: PoolServer
    ) -> list[VllmSample] | VllmServerError:
        """Connect, load the adapter, and sample the short texts; return the fault where that fails."""
        try:
            is_new = server.remote is None
            remote = server.remote = server.remote or self._open_server(server.url)
            if is_new:
                self._check_template(tokenizer, remote)
            self._load(server, remote, anew=is_new)
            server.model = self._model_of(server)
            return _short_texts(remote, server.model, requests)
        except VllmServerError as fault:
            return fault

    def _model_of(self, server: PoolServer) -> str:
        return self._served.name if self._served else server.remote.base if server.remote else ""

    def _check_template(self, tokenizer: Any, remote: RemoteVllm) -> None:
        """Raise VllmServerError where the server renders a prompt as other tokens; a template with a clock may."""
        prompt = self.prompts[0]
        messages = prompt.prompt.messages
        if not messages or ChatTemplate.of(tokenizer).reads_clock(messages):
            return
        body = {
            "model": remote.base,
            "messages": template_messages(tokenizer, messages),
            **turn_options(messages),
            "add_special_tokens": False,
            **({"chat_template_kwargs": self._template_options} if self._template_options else {}),
        }
        answer = remote.call("/tokenize", body, wait=ADMISSION_WAIT_S)
        found = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise VllmServerError(f"{remote.url} does not say by which tokens it renders a chat (/tokenize).")
        if tuple(found) != prompt.ids:
            pairs = list(zip(found, prompt.ids, strict=False))
            place = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
            raise VllmServerError(
                f"{remote.url} has another chat template or tokenizer than the policy: it renders prompt "
                f"{prompt.prompt.id} as {len(found)} tokens, not {len(prompt.ids)}, others from token {place + 1} on. "
                "Serve the files that the recipe names, without --chat-template."
            )

    def _load(self, server: PoolServer, remote: RemoteVllm, *, anew: bool) -> None:
        """Have the server unload what it was told to load before, then load the adapter of now.

        In this order it never needs room for two. `anew`: also unload the one of now, if it was told to load it.
        """
        kept = self._served.name if self._served and not anew else None
        for name in [name for name in server.loaded if name != kept]:
            try:
                remote.call("/v1/unload_lora_adapter", {"lora_name": name}, wait=ADMISSION_WAIT_S)
            except VllmServerError as fault:
                if fault.code is None:
                    raise
                if fault.code != 404:  # 404: it was started anew, and knows of none
                    self._say(f"{fault.reason} The adapter {name} stays in its memory until it is started anew.")
            server.loaded.remove(name)
        if self._served and self._served.name not in server.loaded:
            body = {"lora_name": self._served.name, "lora_path": str(self._served.folder)}
            try:
                remote.call("/v1/load_lora_adapter", body, wait=ADMISSION_WAIT_S)
            except VllmServerError as fault:
                if "already been loaded" not in fault.reason:  # under a name with its hash: the same bytes
                    raise
            server.loaded.append(self._served.name)

    def _compare(self, policy: Any, server: PoolServer, samples: Sequence[VllmSample]) -> VllmServerError | None:
        """Compare the server's log-probabilities with the policy's; return what is wrong with it, or None."""
        score = partial(policy_logprobs, policy, self.prompts, samples)
        expected = score()
        for prompt, own_T in zip(self.prompts, expected, strict=True):
            refuse_broken_logits(prompt.prompt.id, [own_T.tolist()])
        if not _are_finite(samples):  # and the policy's own are
            return VllmServerError(f"{server.url} {NOT_FINITE}.")
        others: dict[str, list[Tensor]] = {}
        if self._served:
            with policy.adapter_off():
                others[NO_ADAPTER] = score()
        if self._served and self._before:
            with policy.other_adapter([tensor.to(policy.device) for tensor in self._before]):
                others[ADAPTER_BEFORE] = score()
        limit = LIMITS[policy.is_sixteen_bit]
        reported = reported_logprobs(samples)
        verdict = judge_texts(reported, expected, others, limit)
        if not verdict.failed:
            return None
        some = " on some of its replicas" if verdict.failed < verdict.texts else ""
        measured = f"{verdict.failed} of {verdict.texts} short texts fail, by up to {verdict.gap:.2g} nats a token"
        if policy.temperature != 1 and not judge_texts(reported, score(temperature=1.0), {}, limit).failed:
            cause = "reports log-probabilities at temperature 1, for want of --logprobs-mode processed_logprobs"
        else:
            cause = self._cause(policy, server, verdict)
        return VllmServerError(f"{server.url} {cause}{some}: {measured}.")

    def _cause(self, policy: Any, server: PoolServer, verdict: Verdict) -> str:
        """Name what the server samples from instead of the policy."""
        told = f"{self._served.name}, which it was told to load" if self._served else ""
        if verdict.nearer_to:
            return f"samples {verdict.nearer_to} {told}"
        if told and self._holds_base(policy, server):
            return f"samples with another adapter than {told}"
        kind = str(policy.dtype).removeprefix("torch.")
        return f"holds another base than the policy ({policy.path}), or computes in another number type than its {kind}"

    def _holds_base(self, policy: Any, server: PoolServer) -> bool:
        """Tell whether the server, asked without an adapter, samples from the policy's base."""
        assert server.remote is not None, "it has just answered"
        requests = fingerprint_requests(self.prompts, policy.temperature, "")
        try:
            samples = _short_texts(server.remote, server.remote.base, requests)
        except VllmServerError:
            return False
        with policy.adapter_off():
            expected = policy_logprobs(policy, self.prompts, samples)
        return not judge_texts(reported_logprobs(samples), expected, {}, LIMITS[policy.is_sixteen_bit]).failed

    def _leave_out(self, server: PoolServer, fault: VllmServerError, is_slow: bool) -> None:
        is_news = server.fault is None or server.fault.reason != fault.reason
        server.leave_out(fault, is_slow=is_slow)
        if is_news:
            updates = "the next update" if server.updates_left == 1 else f"{server.updates_left} updates"
            self._say(f"Left out: {fault.reason} Its prompts go to other servers; it is tried again after {updates}.")

    def _nobody(self) -> MinigrpoError:
        faults = [server.fault for server in self.servers if server.fault]
        told = " ".join(f"({number}) {fault.reason}" for number, fault in enumerate(faults, start=1))
        advice = next(
            (fault.advice for fault in faults if fault.advice), "A run that was under way goes on with --resume."
        )
        return MinigrpoError(f"No server of rollout.server is left. {told} {advice}")


def _short_texts(remote: RemoteVllm, model: str, requests: Sequence[Request]) -> list[VllmSample]:
    """Ask all at once, so that the replicas behind one URL each get some."""
    with ThreadPoolExecutor(max_workers=len(requests)) as threads:
        answers = list(threads.map(lambda request: remote.answer(request, model, wait=ADMISSION_WAIT_S), requests))
    return [samples[0] for samples in answers]


def _are_finite(samples: Sequence[VllmSample]) -> bool:
    return all(math.isfinite(logprob) for _, logprobs, _ in samples for logprob in logprobs)


def _hash_of(folder: Path) -> str:
    """Return the first 16 digits of the SHA-256 of an adapter's files."""
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        whole.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


def _print(sentence: str) -> None:
    Screen(stderr=True).show(Text(sentence))
