"""The slot engine: the native engine's arithmetic at fixed shapes, so that a GPU can replay a token's kernels at once.

A small model on a large GPU waits for Python: some hundred kernels a token, each launched alone. Here every tensor of a
step stays where it is and keeps its shape, drawing and stopping included; so the kernels of a step are recorded once
(a CUDA graph) and replayed for every further token, with no word between GPU and CPU but a look, every few tokens, at
which rows have ended. A row that has ended is carried along until half of the prompts have none that goes on; then the
others move together, into a graph of half the size.

On a CPU the same step runs unrecorded: slower than the native engine, and the same tokens.

Shapes: M prompts, G siblings, B = M * G rows, P shared prompt slots, C own slots, c of them in use, H query heads, K
key/value heads, R = H / K, D head width, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from minigrpo.models.context import check_room, context_length
from minigrpo.rollouts.engines.decoder import Decoder, Layer, Rope
from minigrpo.rollouts.engines.native import read_prompts
from minigrpo.rollouts.engines.sampling import draw, waves
from minigrpo.types import Completion, Ready, Rendered, Sampling
from minigrpo.utils.rng import name_key, uniform

LOOK = 16
"""Tokens between two looks at which rows have ended."""
FIRST = 64
"""Own slots that the first tokens attend over; then twice as many, and so on: a graph for each."""
ROUND = 64
"""Shared slots come in multiples of it, so that batches of like prompts find the graphs of earlier ones."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a step reads and writes. Frozen: the tensors stay where they are, and only their contents change."""

    shared: Tensor
    """[L, 2, M, K, P, D]: keys and values of the prompts without their last tokens."""
    own: Tensor
    """[L, 2, B, K, C, D]."""
    length_M: Tensor
    row_B: Tensor
    """Which completion of the call a slot holds."""
    stream_B: Tensor
    feed_B: Tensor
    going_B: Tensor
    so_far: Tensor
    """Tokens decoded, a tensor of one number: a graph holds no Python numbers that change."""
    tokens_BC: Tensor
    logprobs_BC: Tensor
    lengths_B: Tensor
    stopped_B: Tensor

    @classmethod
    def empty(cls, lean: Decoder, prompts: int, siblings: int, *, shared: int, own: int) -> State:
        L, K, D, B, device = len(lean.layers), lean.kv_heads, lean.width, prompts * siblings, lean.device

        def whole(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            shared=whole(L, 2, prompts, K, shared, D, dtype=lean.dtype),
            own=whole(L, 2, B, K, own, D, dtype=lean.dtype),
            **{name: whole(B) for name in ("row_B", "stream_B", "feed_B", "lengths_B")},
            **{name: whole(B, dtype=torch.bool) for name in ("going_B", "stopped_B")},
            length_M=whole(prompts),
            so_far=whole(),
            tokens_BC=whole(B, own),
            logprobs_BC=whole(B, own, dtype=torch.float32),
        )

    def narrow(self, prompts: int, siblings: int) -> State:
        """The first prompts alone, in the same memory. What was said stays addressed by `row_B`."""
        B = prompts * siblings
        rows = {name: getattr(self, name)[:B] for name in ("row_B", "stream_B", "feed_B", "going_B")}
        caches = {"shared": self.shared[:, :, :prompts], "own": self.own[:, :, :B]}
        return replace(self, **rows, **caches, length_M=self.length_M[:prompts])

    def move_up(self, places: Tensor, siblings: int) -> None:
        """Let these prompts, in order, be the first ones."""
        rows = (places[:, None] * siblings + torch.arange(siblings, device=places.device)).flatten()
        for tensor, dim, index in (
            *((each, 0, rows) for each in (self.row_B, self.stream_B, self.feed_B, self.going_B)),
            *((self.length_M, 0, places), (self.shared, 2, places), (self.own, 2, rows)),
        ):
            tensor.narrow(dim, 0, len(index)).copy_(tensor.index_select(dim, index))

    def small(self) -> list[Tensor]:
        """What a step changes, but for the caches, whose slot it would write again as it was."""
        names = [field.name for field in fields(self) if field.name not in ("shared", "own")]
        return [getattr(self, name) for name in names]


class Step:
    """One token of every row, at fixed shapes: `c` own slots are attended over."""

    def __init__(
        self, lean: Decoder, state: State, siblings: int, *, turn: Rope, stop_ids_s: Tensor, heat: float
    ) -> None:
        self.lean, self.state, self.siblings, self.turn = lean, state, siblings, turn
        self.stop_ids_s, self.heat = stop_ids_s, heat

    @torch.no_grad()
    def __call__(self, c: int) -> None:
        s = self.state
        shared_B = s.length_M.repeat_interleave(self.siblings, output_size=len(s.row_B))
        self._masks(shared_B, c)
        logits_BV = self.lean.decode(s.feed_B, self.turn.at(shared_B + s.so_far), self._attend)
        tokens_B, logprobs_B = draw(logits_BV, uniform(s.stream_B + s.so_far), self.heat)
        here = s.row_B, s.so_far.expand_as(s.row_B)
        s.tokens_BC.index_put_(here, tokens_B)
        s.logprobs_BC.index_put_(here, logprobs_B)
        s.lengths_B.index_add_(0, s.row_B, s.going_B.long())
        ends_B = s.going_B & (tokens_B[:, None] == self.stop_ids_s).any(1)
        s.stopped_B.index_put_((s.row_B,), ends_B | s.stopped_B[s.row_B])
        s.going_B.logical_and_(~ends_B)
        s.feed_B.copy_(tokens_B)
        s.so_far.add_(1)

    def _masks(self, shared_B: Tensor, c: int) -> None:
        """[B, 1, 1, P + c] for each kind of layer: 0 where a row may look, -inf where not."""
        s, P = self.state, self.state.shared.shape[4]
        at = torch.arange(P + c, device=shared_B.device)
        seen_BS = torch.where(at < P, at < shared_B[:, None], at - P <= s.so_far)
        place_BS = torch.where(at < P, at, shared_B[:, None] + at - P)
        reach_B1 = (shared_B + s.so_far)[:, None]
        self._bias: dict[int | None, Tensor] = {}
        for window in {layer.window for layer in self.lean.layers}:
            ok_BS = seen_BS if window is None else seen_BS & (reach_B1 - place_BS < window)
            bias_BS = torch.zeros(ok_BS.shape, device=ok_BS.device).masked_fill(~ok_BS, -torch.inf)
            self._bias[window] = bias_BS[:, None, None]
        self._c = c

    def _attend(self, index: int, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [B, H, D] over the shared prompt and the row's own tokens: [B, H * D]."""
        s, P = self.state, self.state.shared.shape[4]
        here = s.so_far[None]
        for cache, fresh in zip(s.own[index], (key, value), strict=True):
            cache.index_copy_(2, here, fresh[:, :, None])
        own_key, own_value = s.own[index, 0, :, :, : self._c], s.own[index, 1, :, :, : self._c]
        query_BKRD = query.unflatten(1, (self.lean.kv_heads, -1)) * layer.scaling
        shared_scores = self._apart(self._beside(query_BKRD) @ s.shared[index, 0].mT)
        scores = torch.cat([shared_scores, query_BKRD @ own_key.mT], -1).float() + self._bias[layer.window]
        shared_probs, own_probs = scores.softmax(-1).to(query.dtype).split([P, self._c], -1)
        attended = own_probs @ own_value + self._apart(self._beside(shared_probs) @ s.shared[index, 1])
        return attended.flatten(1)

    def _beside(self, x_BKRE: Tensor) -> Tensor:
        """Siblings side by side: [B, K, R, E] -> [M, K, G * R, E]."""
        return x_BKRE.unflatten(0, (-1, self.siblings)).transpose(1, 2).flatten(2, 3)

    def _apart(self, x_MKgE: Tensor) -> Tensor:
        return x_MKgE.unflatten(2, (self.siblings, -1)).transpose(1, 2).flatten(0, 1)


class GraphSet:
    """A step's kernels, recorded at its first call for each number of own slots and replayed from then on."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._graphs: dict[int, Any] = {}

    def __call__(self, c: int) -> None:
        if c not in self._graphs:
            self._graphs[c] = self._record(c)
        self._graphs[c].replay()

    def _record(self, c: int) -> Any:
        """Libraries set themselves up in a first call, which cannot be recorded: what it changed is put back."""
        before = [tensor.clone() for tensor in self.step.state.small()]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.step(c)
            for tensor, old in zip(self.step.state.small(), before, strict=True):
                tensor.copy_(old)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(c)
        return graph


class CapturedStep:
    """A state and its steps, at all the sizes that are halves of halves of it. `kind`: siblings, own slots, heat."""

    def __init__(
        self, kind: tuple[int, int, float], whole: State, step_of: Callable[[State], Callable[[int], None]]
    ) -> None:
        self.kind, self.whole, self.step_of = kind, whole, step_of
        self._sizes: dict[int, tuple[State, Callable[[int], None]]] = {}

    def holds(self, kind: tuple[int, int, float], prompts: int, shared: int) -> bool:
        room = self.whole.shared.shape
        return self.kind == kind and prompts <= room[2] and shared <= room[4]

    def sized(self, prompts: int) -> tuple[State, Callable[[int], None]]:
        """The least size that holds so many prompts."""
        size = len(self.whole.length_M)
        while size > 1 and -(-size // 2) >= prompts:
            size = -(-size // 2)
        if size not in self._sizes:
            state = self.whole.narrow(size, self.kind[0])
            self._sizes[size] = state, self.step_of(state)
        return self._sizes[size]


class SlotEngine:
    """Samples from the policy that it was made for, whose weights its graphs read in place."""

    def __init__(self, policy: Any, *, stop_ids: Sequence[int], rows: int) -> None:
        from minigrpo.models.policy import decoder_of

        self.lean = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings())
        self.tokenizer, self.context, self.rows = policy.tokenizer, context_length(policy.model), rows
        self.stop_ids_s = torch.tensor(sorted(stop_ids), device=self.lean.device)
        self._made: CapturedStep | None = None

    def update(self, policy: Any) -> None:
        """Recorded steps see the new numbers in the old places; an adapter switched on or off changes the steps."""
        places = [tensor.data_ptr() for tensor in self.lean.copies()]
        self.lean.refresh()
        if [tensor.data_ptr() for tensor in self.lean.copies()] != places:
            self._made = None

    def generate(
        self, prompts: Sequence[Rendered], n: int, sampling: Sampling, ready: Ready | None = None
    ) -> list[tuple[Completion, ...]]:
        """n completions of each prompt, in order; as many prompts at a time as `rows` admits."""
        check_room(prompts, sampling.max_tokens, self.context)
        answers: list[tuple[Completion, ...]] = []
        for start, part in waves(prompts, n, self.rows):
            answers += self._wave(part, n, sampling, start, ready)
        return answers

    def _wave(
        self, prompts: Sequence[Rendered], n: int, sampling: Sampling, start: int, ready: Ready | None
    ) -> list[tuple[Completion, ...]]:
        made = self._begin(prompts, n, sampling)
        state, step = made.sized(len(prompts))
        said: dict[int, tuple[Completion, ...]] = {}
        for so_far in range(sampling.max_tokens):
            step(own_slots(so_far, sampling.max_tokens))
            last = so_far + 1 == sampling.max_tokens
            if not last and (so_far + 1) % LOOK:
                continue
            going_M = state.going_B.view(-1, n).any(1)
            places = state.row_B.view(-1, n)[:, 0].div(n, rounding_mode="floor").tolist()
            going = {place for place, goes in zip(places, going_M.tolist(), strict=True) if goes and not last}
            for place in sorted(set(range(len(prompts))) - said.keys() - going):
                said[place] = self._completions(made.whole, place, n)
                if ready:
                    ready(start + place, said[place])
            if not going:
                break
            if len(going) <= len(going_M) // 2:
                narrower = made.sized(len(going))
                # All that go on, and as many of the others as fill the slots: no completion may have two.
                state.move_up(torch.argsort(~going_M, stable=True)[: len(narrower[0].length_M)], n)
                state, step = narrower
        return [said[place] for place in range(len(prompts))]

    def _begin(self, prompts: Sequence[Rendered], n: int, sampling: Sampling) -> CapturedStep:
        """State and steps, filled with these prompts: those of an earlier call where they fit, with their graphs."""
        M, P = len(prompts), max(len(prompt.ids) for prompt in prompts) - 1
        made, kind = self._made, (n, sampling.max_tokens, sampling.temperature)
        if made is None or not made.holds(kind, M, P):
            self._made = made = None  # let go of the old one first
            self._made = made = self._make(kind, M, -(-P // ROUND) * ROUND or ROUND)
        state = made.whole
        if P:  # what stands in the slots behind is never seen
            read_prompts(self.lean, prompts, self.lean.turns(P), state.shared)
        rows = torch.arange(len(state.row_B))
        streams = [name_key(sampling.seed, p.prompt.id, sibling) for p in prompts for sibling in range(n)]
        state.stream_B[: M * n] = torch.tensor(streams)
        state.feed_B[: M * n] = torch.tensor([p.ids[-1] for p in prompts for _ in range(n)])
        state.length_M[:M] = torch.tensor([len(p.ids) - 1 for p in prompts])
        state.row_B.copy_(rows)
        state.going_B.copy_(rows < M * n)
        for tensor in (state.lengths_B, state.stopped_B, state.so_far):
            tensor.zero_()
        return made

    def _make(self, kind: tuple[int, int, float], prompts: int, shared: int) -> CapturedStep:
        n, longest, heat = kind
        turn = self.lean.turns(shared + longest)

        def step_of(state: State) -> Callable[[int], None]:
            step = Step(self.lean, state, n, turn=turn, stop_ids_s=self.stop_ids_s, heat=heat)
            return GraphSet(step) if self.lean.device.type == "cuda" else step

        return CapturedStep(kind, State.empty(self.lean, prompts, n, shared=shared, own=longest), step_of)

    def _completions(self, state: State, place: int, n: int) -> tuple[Completion, ...]:
        rows = slice(place * n, (place + 1) * n)
        lengths, stopped = state.lengths_B[rows].tolist(), state.stopped_B[rows].tolist()
        said = zip(state.tokens_BC[rows].tolist(), state.logprobs_BC[rows].tolist(), lengths, strict=True)
        own = [(tuple(ids[:length]), tuple(logprobs[:length])) for ids, logprobs, length in said]
        texts = self.tokenizer.batch_decode([ids for ids, _ in own], skip_special_tokens=True)
        return tuple(
            Completion(text, ids, logprobs, "stop" if stop else "length")
            for text, (ids, logprobs), stop in zip(texts, own, stopped, strict=True)
        )


def own_slots(so_far: int, most: int) -> int:
    """Slots that a step attends over: the least of FIRST, twice as many ... that hold its token."""
    c = FIRST
    while c <= so_far:
        c *= 2
    return min(c, most)
