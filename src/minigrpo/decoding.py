"""What an engine takes while it samples, counted on tensors without contents: its copies of weights, its cache of keys
and values, and what comes and goes while prompts are read and tokens are drawn.

Shapes: M prompts side by side, n completions of each, B = M * n rows, P prompt tokens, C completion tokens, L layers,
K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigrpo.engines import native, slots
from minigrpo.engines.lean import Lean
from minigrpo.engines.sampling import draw
from minigrpo.policy import Policy, decoder
from minigrpo.shadow import held_by
from minigrpo.tally import META, Tally, attention_of


@dataclass(frozen=True, slots=True)
class Wave:
    """Prompts answered side by side: how many, completions of each, and tokens of the longest of both."""

    prompts: int
    completions: int
    prompt: int
    completion: int

    @property
    def rows(self) -> int:
        return self.prompts * self.completions


@dataclass(frozen=True, slots=True)
class Sampling:
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


def native_sampling(policy: Policy, wave: Wave, temperature: float, device: str) -> Sampling:
    """The native engine's own code over one wave in which no completion ends before its limit."""
    tally = Tally(held_by(policy), device)
    with torch.no_grad(), tally, attention_of(device), META:
        lean = Lean(decoder(policy.model), policy.model.get_output_embeddings())
        copies = tally.now
        tally.peak = copies
        turn = lean.turns(wave.prompt + wave.completion)
        tally.phase = "reading prompts"
        shared = _read(lean, wave, turn)
        tally.phase = "growing the cache"
        own = _grown(lean, wave)
        cache = own.untyped_storage().nbytes() + shared.untyped_storage().nbytes()
        tally.phase = "drawing a token"
        _decode(lean, wave, turn, (shared, own), temperature)
    return Sampling(copies, cache, tally.peak - copies - cache, tally.peak_phase)


def _read(lean: Lean, wave: Wave, turn: Any) -> Tensor:
    P = wave.prompt - 1
    shared = torch.zeros(len(lean.layers), 2, wave.prompts, lean.kv_heads, P, lean.width, dtype=lean.dtype)
    if P:
        at_once = min(wave.prompts, max(1, native.PREFILL_TOKENS // P))
        lean.prefill(torch.zeros(at_once, P, dtype=torch.long), turn, shared[:, :, :at_once])
    return shared


def _grown(lean: Lean, wave: Wave) -> Tensor:
    """The rows' own cache grows by doubling: the last time, the old one is still there."""
    slots = min(native.FIRST_SLOTS, wave.completion)
    while slots < wave.completion and slots + min(slots, wave.completion - slots) < wave.completion:
        slots *= 2
    own = torch.empty(len(lean.layers), 2, wave.rows, lean.kv_heads, slots, lean.width, dtype=lean.dtype)
    return torch.nn.functional.pad(own, (0, 0, 0, wave.completion - slots)) if slots < wave.completion else own


def _decode(lean: Lean, wave: Wave, turn: Any, caches: tuple[Tensor, Tensor], temperature: float) -> None:
    """Two tokens: while the second is decoded, the logits of the first are still held."""
    B, P = wave.rows, wave.prompt - 1
    state: Any = object.__new__(native._Wave)
    state.lean, state.siblings = lean, wave.completions
    state.shared, state.own = caches
    state.place_M = torch.arange(wave.prompts)
    state._grid_n = state.row_n = torch.arange(B)
    state._shared_ok = torch.ones(B, P, dtype=torch.bool)
    state._reach_n = torch.zeros(B, dtype=torch.long)
    state.so_far = wave.completion - 1
    feed_n = torch.zeros(B, dtype=torch.long)
    for _ in range(2):
        state._bias = {}
        logits_nV = lean.decode(feed_n, turn.at(state._reach_n), state._attend)
        feed_n, _ = draw(logits_nV, torch.zeros(B, dtype=torch.float64), temperature)


def slot_sampling(policy: Policy, wave: Wave, temperature: float, device: str) -> Sampling:
    """The slot engine's own code: caches of full length from the first token on, two tokens over all of them."""
    tally = Tally(held_by(policy), device)
    with torch.no_grad(), tally, attention_of(device), META:
        lean = Lean(decoder(policy.model), policy.model.get_output_embeddings())
        copies = tally.now
        tally.peak = copies
        tally.phase = "reading prompts"
        P = -(-(wave.prompt - 1) // slots.ROUND) * slots.ROUND or slots.ROUND
        state = slots.State.empty(lean, wave.prompts, wave.completions, shared=P, own=wave.completion)
        cache = tally.now - copies
        turn = lean.turns(P + wave.completion)
        at_once = min(wave.prompts, max(1, native.PREFILL_TOKENS // P))
        lean.prefill(torch.zeros(at_once, P, dtype=torch.long), turn, state.shared[:, :, :at_once])
        tally.phase = "drawing a token"
        stops = torch.zeros(1, dtype=torch.long)
        step = slots.Step(lean, state, wave.completions, turn=turn, stop_ids_s=stops, heat=temperature)
        for _ in range(2):
            step(wave.completion)
    return Sampling(copies, cache, tally.peak - copies - cache, tally.peak_phase)


def transformers_sampling(policy: Policy, wave: Wave, temperature: float, device: str) -> Sampling:
    """transformers' generate: every row reads its prompt for itself, and the cache of a layer is copied as it grows."""
    B = wave.rows
    tally = Tally(held_by(policy), device)
    with torch.no_grad(), tally, attention_of(device), policy.plain_attention(), META:
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
    return Sampling(0, cache, passing, tally.peak_phase)
