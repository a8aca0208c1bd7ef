"""Tell whether a server samples from the policy: it draws a few short texts, and the policy scores the same tokens.

The two log-probabilities of a token differ by rounding. Two tests tell rounding from other weights, text by text:

    the mean distance is beyond LIMIT               a wrong base, another adapter, another temperature
    it lies on the way to a known wrong model       no adapter, or the adapter before: these may be nearer than LIMIT

The second one asks how far the server has gone from the policy towards that model: 0 where it has the policy's weights,
1 where it has the other's. It decides only where the two are farther apart than rounding can bridge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigrpo.algorithms.packing import MicroBatch, PackedGroup
from minigrpo.rollouts.engines.vllm_server import Request, VllmSample
from minigrpo.types import Rendered, Sampling
from minigrpo.utils.rng import name_key

FINGERPRINT_TEXTS, FINGERPRINT_TOKENS = 4, 16

LIMITS = {False: 1e-3, True: 0.25}
"""Mean distance of a text in nats a token, by whether the policy has 16 bits.

Measured over 100 texts of random tokens, on a random two-layer Qwen2 on a CPU: rounding is 3e-6 at most in float32, and
0.09 at most where one of the two computes in bfloat16 (0.06 in the mean). Another random base is 2 nats away or more.
"""

CLEARLY = 8.0
"""How many times the rounding of one token two models must be apart (over a text, as vectors) to be told from each
other: then the way that the server has gone is known to an eighth, and one half is four deviations away."""


def fingerprint_requests(prompts: Sequence[Rendered], temperature: float, name: str) -> list[Request]:
    """Return the questions. `name`: of the adapter; another one draws other texts."""
    return [
        Request(
            prompt.ids,
            1,
            Sampling(temperature, FINGERPRINT_TOKENS),
            name_key("fingerprint", name, prompt.prompt.id) % 2**31,
            (),
        )
        for prompt in prompts
    ]


def reported_logprobs(samples: Sequence[VllmSample]) -> list[Tensor]:
    """Return the log-probabilities that the server gave for its own tokens, one float64 [tokens] for each text."""
    return [torch.tensor(logprobs, dtype=torch.float64) for _, logprobs, _ in samples]


def policy_logprobs(
    policy: Any, prompts: Sequence[Rendered], samples: Sequence[VllmSample], temperature: float | None = None
) -> list[Tensor]:
    """Score the same tokens under the model as it is now. `temperature`: another than the policy's own."""
    groups = tuple(
        PackedGroup(index, prompt.ids, (0,), (ids,))
        for index, (prompt, (ids, _, _)) in enumerate(zip(prompts, samples, strict=True))
    )
    return list(_score(policy, groups, temperature).split([len(ids) for ids, _, _ in samples]))


def _score(policy: Any, groups: tuple[PackedGroup, ...], temperature: float | None = None) -> Tensor:
    unused_N = torch.zeros(sum(sum(group.lengths) for group in groups))
    batch = MicroBatch(groups, unused_N, unused_N, unused_N, unused_N)
    return policy.present(batch, temperature=temperature).logprobs_N.detach().cpu().double()


def group_gap(policy: Any, prompt_ids: tuple[int, ...], samples: Sequence[VllmSample]) -> float:
    """Return the mean distance, in nats a token, between a server's and the policy's log-probabilities of a group.

    Only as many tokens are scored as a fingerprint has. A group with fewer than one of its texts tells nothing: 0.
    """
    texts: list[tuple[int, ...]] = []
    said: list[float] = []
    for ids, logprobs, _ in samples:
        room = FINGERPRINT_TEXTS * FINGERPRINT_TOKENS - len(said)
        if room:
            texts.append(ids[:room])
            said += logprobs[:room]
    if len(said) < FINGERPRINT_TOKENS:
        return 0.0
    group = PackedGroup(0, prompt_ids, tuple(range(len(texts))), tuple(texts))
    return float((torch.tensor(said, dtype=torch.float64) - _score(policy, (group,))).abs().mean())


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many of the texts are not the policy's, the largest mean distance of one in nats a token, and the name of
    the known wrong model that they point to, if any."""

    texts: int
    failed: int
    gap: float
    nearer_to: str | None = None


def judge_texts(
    reported: Sequence[Tensor], policy: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]], limit: float
) -> Verdict:
    """Judge each text by both tests. `others`: the known wrong models' scores of the same tokens, by name."""
    gaps: list[float] = []
    found: list[str | None] = []
    for index, (said_T, own_T) in enumerate(zip(reported, policy, strict=True)):
        gap = float((said_T - own_T).abs().mean())
        gaps.append(gap if math.isfinite(gap) else math.inf)
        known = {float((said_T - texts[index]).norm()): name for name, texts in others.items()}
        near = {far: name for far, name in known.items() if _is_nearer(said_T, own_T, others[name][index])}
        nearer = near[min(near)] if near else None
        if nearer or gaps[-1] > limit:
            found.append(nearer)
    return Verdict(len(gaps), len(found), max(gaps), next(filter(None, found), None))


def _is_nearer(said_T: Tensor, own_T: Tensor, other_T: Tensor) -> bool:
    """Tell whether the server has clearly gone more than half of the way from the policy to the other model."""
    way_T = other_T - own_T
    length = float(way_T.norm())
    if len(way_T) < 2 or length == 0 or not math.isfinite(length):
        return False
    gone = float((said_T - own_T) @ way_T) / length**2
    rounding = float((said_T - own_T - gone * way_T).norm()) / math.sqrt(len(way_T) - 1)
    return gone > 0.5 and length > CLEARLY * rounding
