"""What an engine takes while it samples, counted on tensors without contents: its copies of weights, its cache of keys
and values, and what comes and goes while prompts are read and tokens are drawn.

Shapes: M prompts side by side, n completions of each, B = M * n rows, P prompt tokens, C completion tokens, L layers,
K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minigrpo.models.policy import Policy, decoder_of
from minigrpo.rollouts.engines import cuda_graph, kv_cache, native
from minigrpo.rollouts.engines.decoder import Decoder, Rope
from minigrpo.rollouts.engines.sampling import draw
from minigrpo.training.memory.meta import META, MemoryCounter, held_by


@dataclass(frozen=True, slots=True)
class RolloutShape:
    """Prompts answered side by side: how many, completions of each, and tokens of the longest of both."""

    prompts: int
    completions: int
    prompt: int
    completion: int

    @property
    def rows(self) -> int:
        return self.prompts * self.completions


@dataclass(frozen=True, slots=True)
class RolloutCost:
    """Bytes: `copies` stay between rollouts, `cache` is full at the last token, `passing` is what comes on top of both
    at the highest moment, which is in `phase`.
    """

    copies: int
    cache: int
    passing: int
    phase: str

    @property
    def peak(self) -> int:
        return self.cache + self.passing


def native_sampling(policy: Policy, wave: RolloutShape, temperature: float, device: str) -> RolloutCost:
    """The native engine's own code over one wave in which no completion ends before its limit."""
    tally = MemoryCounter(held_by(policy), device)
    with torch.no_grad(), tally, META:
        lean = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings(), policy.backend)
        copies = tally.now
        tally.peak = copies
        turn = lean.turns(wave.prompt + wave.completion)
        tally.phase = "reading prompts"
        cache = _read(lean, wave, turn, device)
        tally.phase = "growing the cache"
        for t in _doublings(wave.completion):
            cache.look(t)
        held = tally.now - copies
        tally.phase = "drawing a token"
        _decode(lean, wave, turn, cache, temperature)
    return RolloutCost(copies, held, tally.peak - copies - held, tally.peak_phase)


def _read(lean: Decoder, wave: RolloutShape, turn: Rope, device: str) -> kv_cache.Cache:
    P = wave.prompt - 1
    shared = torch.zeros(len(lean.layers), 2, wave.prompts, lean.kv_heads, P, lean.width, dtype=lean.dtype)
    if P:
        at_once = min(wave.prompts, max(1, native.PREFILL_TOKENS // P))
        lean.prefill(torch.zeros(at_once, P, dtype=torch.long), turn, shared[:, :, :at_once])
    lengths_M = [P] * wave.prompts
    form = kv_cache.cache_class(lean, lengths_M, wave.completions, wave.completion, device)
    cache = form(lean, shared, lengths_M, wave.completions, wave.completion)
    cache.seat(torch.arange(wave.rows))
    return cache


def _doublings(completion: int) -> list[int]:
    """Tokens at which the cache grows, and the last one."""
    times = range(max(0, (completion - 1) // kv_cache.FIRST_SLOTS).bit_length())
    return [*(kv_cache.FIRST_SLOTS << time for time in times), completion - 1]


def _decode(lean: Decoder, wave: RolloutShape, turn: Rope, cache: kv_cache.Cache, temperature: float) -> None:
    """Two tokens: while the second is decoded, the logits of the first are still held."""
    place_n = torch.zeros(wave.rows, dtype=torch.long)
    feed_n = torch.zeros(wave.rows, dtype=torch.long)
    for _ in range(2):
        logits_nV = lean.decode(feed_n, turn.at(place_n), cache.attend)
        feed_n, _ = draw(logits_nV, torch.zeros(wave.rows, dtype=torch.float64), temperature)


def slot_sampling(policy: Policy, wave: RolloutShape, temperature: float, device: str) -> RolloutCost:
    """The slot engine's own code: caches of full length from the first token on, two tokens over all of them."""
    tally = MemoryCounter(held_by(policy), device)
    with torch.no_grad(), tally, META:
        lean = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings(), policy.backend)
        copies = tally.now
        tally.peak = copies
        tally.phase = "reading prompts"
        P = -(-(wave.prompt - 1) // cuda_graph.ROUND) * cuda_graph.ROUND or cuda_graph.ROUND
        state = cuda_graph.State.empty(lean, wave.prompts, wave.completions, shared=P, own=wave.completion)
        cache = tally.now - copies
        turn = lean.turns(P + wave.completion)
        at_once = min(wave.prompts, max(1, native.PREFILL_TOKENS // P))
        lean.prefill(torch.zeros(at_once, P, dtype=torch.long), turn, state.shared[:, :, :at_once])
        tally.phase = "drawing a token"
        stops = torch.zeros(1, dtype=torch.long)
        step = cuda_graph.Step(lean, state, wave.completions, turn=turn, stop_ids_s=stops, heat=temperature)
        for _ in range(2):
            step(wave.completion)
    return RolloutCost(copies, cache, tally.peak - copies - cache, tally.peak_phase)


def transformers_sampling(policy: Policy, wave: RolloutShape, temperature: float, device: str) -> RolloutCost:
    """transformers' generate: every row reads its prompt for itself, and the cache of a layer is copied as it grows."""
    B = wave.rows
    tally = MemoryCounter(held_by(policy), device)
    with torch.no_grad(), tally, policy.plain_attention(), META:
        tally.phase = "reading prompts"
        ids_BP = torch.zeros(B, wave.prompt, dtype=torch.long)
        out = policy.model(input_ids=ids_BP, use_cache=True, logits_to_keep=1)
        logits_BV = out.logits[:, -1].float()
        tally.phase = "drawing a token"
        reading = tally.now
        draw(logits_BV, torch.zeros(B, dtype=torch.float64), temperature)
        torch.full_like(logits_BV, -torch.inf)
        grows = (wave.prompt + wave.completion) / wave.prompt
        cache = int((reading - 2 * logits_BV.untyped_storage().nbytes()) * grows)
    layers = max(1, policy.model.config.get_text_config().num_hidden_layers)
    drawn = tally.peak - reading if tally.peak_phase == "drawing a token" else 0
    passing = max(tally.peak - cache, drawn + cache // layers)
    return RolloutCost(0, cache, passing, tally.peak_phase)
