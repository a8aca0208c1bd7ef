"""Count an engine's memory on meta tensors: its copies of weights, its KV cache, and temporary tensors while prompts
are read and tokens are drawn.

Shapes: M prompts side by side, n completions of each, B = M * n rows, P prompt tokens, C completion tokens, L layers,
K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minigrpo.models.onednn import gains_by_blocks
from minigrpo.models.policy import Policy, decoder_of
from minigrpo.rollouts.engines import cuda_graph, kv_cache, native
from minigrpo.rollouts.engines.decoder import Decoder, Rope
from minigrpo.rollouts.engines.prompts import PaddedPrompts
from minigrpo.rollouts.engines.sampling import draw
from minigrpo.training.memory.meta import META, MemoryCounter, policy_tensors


@dataclass(frozen=True, slots=True)
class RolloutShape:
    """Prompts decoded together: their number, completions of each, and tokens of the longest of both."""

    prompts: int
    completions: int
    prompt: int
    completion: int

    @property
    def rows(self) -> int:
        return self.prompts * self.completions


@dataclass(frozen=True, slots=True)
class RolloutCost:
    """Bytes: `copies` stay between rollouts, `cache` is full at the last token, `passing` is temporary, on top of all
    others at the peak, which is in `phase`. `graphs`: the pool of memory that CUDA graphs keep for what their kernels
    hand on. `later`: caches that come on top of `cache` once training has ended. `blocks`: what the engine would take
    on top of `copies` for weights in blocks, and `training_blocks` what training passes would take besides; both can do
    without (models/onednn.py).
    """

    copies: int
    cache: int
    passing: int
    phase: str
    graphs: int = 0
    later: int = 0
    blocks: int = 0
    training_blocks: int = 0

    @property
    def peak(self) -> int:
        return self.cache + self.graphs + self.later + self.passing


def native_rollout_cost(policy: Policy, shape: RolloutShape, temperature: float, device: str) -> RolloutCost:
    """Run the native engine on one batch whose completions all reach the limit."""
    counter = MemoryCounter(policy_tensors(policy), device)
    with torch.no_grad(), counter, META:
        decoder = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings(), policy.backend)
        copies = counter.now
        counter.peak = copies
        rope = decoder.rope_table(shape.prompt + shape.completion)
        counter.phase = "reading prompts"
        cache = _prefill(decoder, shape, rope, device)
        counter.phase = "growing the cache"
        for t in _doublings(shape.completion):
            cache.grow(t)
        held = counter.now - copies
        counter.phase = "drawing a token"
        _decode(decoder, shape, rope, cache, temperature)
        gains = gains_by_blocks(decoder.dtype, device)
        blocks, training_blocks = (decoder.block_bytes, decoder.training_block_bytes) if gains else (0, 0)
    passing = counter.peak - copies - held
    return RolloutCost(copies, held, passing, counter.peak_phase, blocks=blocks, training_blocks=training_blocks)


def _prefill(decoder: Decoder, shape: RolloutShape, rope: Rope, device: str) -> kv_cache.Cache:
    P = shape.prompt - 1
    shared = torch.zeros(len(decoder.layers), 2, shape.prompts, decoder.kv_heads, P, decoder.width, dtype=decoder.dtype)
    if P:
        at_once = min(shape.prompts, max(1, native.PREFILL_TOKENS // P))
        decoder.prefill(_padded(at_once, P), rope, shared[:, :, :at_once])
    lengths_M = [P] * shape.prompts
    cache_type = kv_cache.cache_class(decoder, lengths_M, shape.completions, shape.completion, device)
    cache = cache_type(decoder, shared, lengths_M, shape.completions, shape.completion)
    cache.assign(torch.arange(shape.rows))
    return cache


def _padded(prompts: int, length: int) -> PaddedPrompts:
    """Prompts that share nothing and fill their rows: packed ones take less (engines/prompts.py)."""
    return PaddedPrompts(torch.zeros(prompts, length, dtype=torch.long), torch.arange(length))


def _doublings(completion: int) -> list[int]:
    """Return the tokens at which the cache grows, and the last one."""
    times = range(max(0, (completion - 1) // kv_cache.FIRST_SLOTS).bit_length())
    return [*(kv_cache.FIRST_SLOTS << time for time in times), completion - 1]


def _decode(decoder: Decoder, shape: RolloutShape, rope: Rope, cache: kv_cache.Cache, temperature: float) -> None:
    """Decode two tokens: while the second is decoded, the logits of the first are still held."""
    position_n = torch.zeros(shape.rows, dtype=torch.long)
    input_n = torch.zeros(shape.rows, dtype=torch.long)
    for _ in range(2):
        logits_nV = decoder.decode(input_n, rope.at(position_n), cache.attend)
        input_n, _ = draw(logits_nV, torch.zeros(shape.rows, dtype=torch.float64), temperature)


def slot_rollout_cost(policy: Policy, shape: RolloutShape, temperature: float, device: str) -> RolloutCost:
    """Run two steps of the slot engine, whose caches have full length from the first token on.

    On CUDA what a step hands on lies in the graphs' pool, which is kept; and a step is run once outside of it before it
    is captured. Not counted: what the pool cannot use because its blocks have other sizes.
    """
    counter = MemoryCounter(policy_tensors(policy), device)
    with torch.no_grad(), counter, META:
        decoder = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings(), policy.backend)
        copies = counter.now
        slots = cuda_graph.PROMPT_SLOT_STEP
        P = -(-(shape.prompt - 1) // slots) * slots or slots
        state = cuda_graph.State.empty(decoder, shape.prompts, shape.completions, shared=P, own=shape.completion)
        rope = decoder.rope_table(P + shape.completion)
        cache = counter.now - copies
        counter.peak = counter.now
        counter.phase = "reading prompts"
        at_once = min(shape.prompts, max(1, native.PREFILL_TOKENS // P))
        decoder.prefill(_padded(at_once, P), rope, state.shared[:, :, :at_once])
        counter.phase = "moving rows up"
        state.move_up(torch.arange(-(-shape.prompts // 2)), shape.completions)
        before, counter.peak = (counter.peak, counter.peak_phase), counter.now
        counter.phase = "drawing a token"
        stops = torch.zeros(1, dtype=torch.long)
        step = cuda_graph.Step(decoder, state, shape.completions, rope=rope, stop_ids_s=stops, temperature=temperature)
        for _ in range(2):
            step(shape.completion)
        graphs = counter.peak - copies - cache if device == "cuda" else 0
        peak, phase = max(before, (counter.peak, counter.peak_phase))
    return RolloutCost(copies, cache, peak - copies - cache, phase, graphs)


def transformers_rollout_cost(policy: Policy, shape: RolloutShape, temperature: float, device: str) -> RolloutCost:
    """Count transformers' generate: every row reads its own prompt, and a layer's cache is copied as it grows."""
    B = shape.rows
    counter = MemoryCounter(policy_tensors(policy), device)
    with torch.no_grad(), counter, policy.plain_attention(), META:
        counter.phase = "reading prompts"
        ids_BP = torch.zeros(B, shape.prompt, dtype=torch.long)
        out = policy.model(input_ids=ids_BP, use_cache=True, logits_to_keep=1)
        logits_BV = out.logits[:, -1].float()
        counter.phase = "drawing a token"
        reading = counter.now
        draw(logits_BV, torch.zeros(B, dtype=torch.float64), temperature)
        torch.full_like(logits_BV, -torch.inf)
        grows = (shape.prompt + shape.completion) / shape.prompt
        cache = int((reading - 2 * logits_BV.untyped_storage().nbytes()) * grows)
    layers = max(1, policy.model.config.get_text_config().num_hidden_layers)
    drawn = counter.peak - reading if counter.peak_phase == "drawing a token" else 0
    passing = max(counter.peak - cache, drawn + cache // layers)
    return RolloutCost(0, cache, passing, counter.peak_phase)
