"""The slot engine: the native engine's arithmetic at fixed shapes, so that a GPU can replay a token's kernels at once.

A small model on a large GPU waits for Python: some hundred kernels a token, each launched alone. Here every tensor of a
step keeps its address and its shape, sampling and stopping included; so the kernels of a step are captured once (a CUDA
graph) and replayed for every further token. GPU and CPU synchronize only every few tokens, to see which rows have
ended. An ended row stays in the batch until half of the prompts have no active row; then the others move together, into
a graph of half the size. All graphs share one pool of memory: they are replayed one at a time, and what a step leaves
behind lies in its `State`.

On a CPU the same step runs without a graph: slower than the native engine, and the same tokens.

Shapes: M prompts, G siblings, B = M * G rows, P shared prompt slots, C own slots, c of them in use, H query heads, K
key/value heads, R = H / K, D head width, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from minigrpo.models.context_window import check_room, context_length
from minigrpo.rollouts.engines.decoder import Decoder, Layer, Rope
from minigrpo.rollouts.engines.native import prefill_prompts
from minigrpo.rollouts.engines.sampling import ProgressCounter, draw, refuse_broken_logits, split_prompts
from minigrpo.types import Completion, Progress, Ready, Rendered, Sampling
from minigrpo.utils.rng import name_key, uniform, with_float64
from minigrpo.utils.transfer import to_device

CHECK_EVERY = 16
"""Tokens between two checks of which rows have ended."""
MIN_OWN_SLOTS = 64
"""Own slots that the first tokens attend over; the number doubles as they fill, with one graph for each."""
PROMPT_SLOT_STEP = 64
"""Shared slots are a multiple of it, so that batches of similar prompts reuse the graphs of earlier ones."""
KEPT_SHAPES = 2
"""Shapes whose states and graphs are kept: training's, and that of an evaluation in between."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a step reads and writes. Frozen: tensors keep their addresses, and only their contents change."""

    shared: Tensor
    """[L, 2, M, K, P, D]: keys and values of the prompts without their last tokens."""
    own: Tensor
    """[L, 2, B, K, C, D]."""
    length_M: Tensor
    row_B: Tensor
    """Index in the call of the completion that each slot holds."""
    stream_B: Tensor
    input_B: Tensor
    active_B: Tensor
    so_far: Tensor
    """Tokens decoded, a tensor of one number: a graph holds no Python numbers that change."""
    tokens_BC: Tensor
    logprobs_BC: Tensor
    lengths_B: Tensor
    stopped_B: Tensor

    @classmethod
    def empty(cls, decoder: Decoder, prompts: int, siblings: int, *, shared: int, own: int) -> State:
        L, K, D, B, device = len(decoder.layers), decoder.kv_heads, decoder.width, prompts * siblings, decoder.device

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            shared=zeros(L, 2, prompts, K, shared, D, dtype=decoder.dtype),
            own=zeros(L, 2, B, K, own, D, dtype=decoder.dtype),
            **{name: zeros(B) for name in ("row_B", "stream_B", "input_B", "lengths_B")},
            **{name: zeros(B, dtype=torch.bool) for name in ("active_B", "stopped_B")},
            length_M=zeros(prompts),
            so_far=zeros(),
            tokens_BC=zeros(B, own),
            logprobs_BC=zeros(B, own, dtype=torch.float32),
        )

    def narrow(self, prompts: int, siblings: int) -> State:
        """Return a view of the first prompts. Outputs stay whole, addressed by `row_B`."""
        B = prompts * siblings
        rows = {name: getattr(self, name)[:B] for name in ("row_B", "stream_B", "input_B", "active_B")}
        caches = {"shared": self.shared[:, :, :prompts], "own": self.own[:, :, :B]}
        return replace(self, **rows, **caches, length_M=self.length_M[:prompts])

    def move_up(self, prompt_indices: Tensor, siblings: int) -> None:
        """Move these prompts, in order, to the front: the caches layer by layer, since what moves is copied first."""
        rows = (prompt_indices[:, None] * siblings + torch.arange(siblings, device=prompt_indices.device)).flatten()
        for tensor, dim, index in (
            *((each, 0, rows) for each in (self.row_B, self.stream_B, self.input_B, self.active_B)),
            (self.length_M, 0, prompt_indices),
            *((layer, 1, prompt_indices) for layer in self.shared),
            *((layer, 1, rows) for layer in self.own),
        ):
            tensor.narrow(dim, 0, len(index)).copy_(tensor.index_select(dim, index))

    def changing_tensors(self) -> list[Tensor]:
        """Return the tensors that a step changes, without the caches: a repeated step writes the same there."""
        names = [field.name for field in fields(self) if field.name not in ("shared", "own")]
        return [getattr(self, name) for name in names]


class Step:
    """Decodes one token of every row at fixed shapes, attending over `c` own slots."""

    def __init__(
        self, decoder: Decoder, state: State, siblings: int, *, rope: Rope, stop_ids_s: Tensor, temperature: float
    ) -> None:
        self.decoder, self.state, self.siblings, self.rope = decoder, state, siblings, rope
        self.stop_ids_s, self.temperature = stop_ids_s, temperature

    @torch.no_grad()
    def __call__(self, c: int) -> None:
        s = self.state
        shared_B = s.length_M.repeat_interleave(self.siblings, output_size=len(s.row_B))
        self._masks(shared_B, c)
        logits_BV = self.decoder.decode(s.input_B, self.rope.at(shared_B + s.so_far), self._attend)
        tokens_B, logprobs_B = draw(logits_BV, uniform(s.stream_B + s.so_far), self.temperature)
        here = s.row_B, s.so_far.expand_as(s.row_B)
        s.tokens_BC.index_put_(here, tokens_B)
        s.logprobs_BC.index_put_(here, logprobs_B)
        s.lengths_B.index_add_(0, s.row_B, s.active_B.long())
        ends_B = s.active_B & (tokens_B[:, None] == self.stop_ids_s).any(1)
        s.stopped_B.index_put_((s.row_B,), ends_B | s.stopped_B[s.row_B])
        s.active_B.logical_and_(~ends_B)
        s.input_B.copy_(tokens_B)
        s.so_far.add_(1)

    def _masks(self, shared_B: Tensor, c: int) -> None:
        """Set a mask [B, 1, 1, P + c] for each window size: 0 where a row may attend, -inf elsewhere."""
        s, P = self.state, self.state.shared.shape[4]
        at = torch.arange(P + c, device=shared_B.device)
        seen_BS = torch.where(at < P, at < shared_B[:, None], at - P <= s.so_far)
        position_BS = torch.where(at < P, at, shared_B[:, None] + at - P)
        reach_B1 = (shared_B + s.so_far)[:, None]
        self._bias: dict[int | None, Tensor] = {}
        for window in {layer.window for layer in self.decoder.layers}:
            ok_BS = seen_BS if window is None else seen_BS & (reach_B1 - position_BS < window)
            bias_BS = torch.zeros(ok_BS.shape, device=ok_BS.device).masked_fill(~ok_BS, -torch.inf)
            self._bias[window] = bias_BS[:, None, None]
        self._c = c

    def _attend(self, index: int, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with queries [B, H, D] over the shared prompt and the row's own tokens: [B, H * D]."""
        s, P = self.state, self.state.shared.shape[4]
        here = s.so_far[None]
        for cache, fresh in zip(s.own[index], (key, value), strict=True):
            cache.index_copy_(2, here, fresh[:, :, None])
        own_key, own_value = s.own[index, 0, :, :, : self._c], s.own[index, 1, :, :, : self._c]
        query_BKRD = query.unflatten(1, (self.decoder.kv_heads, -1)) * layer.scaling
        shared_scores = self._from_grid(self._to_grid(query_BKRD) @ s.shared[index, 0].mT)
        # The mask is in float32, so the sum is, too: a conversion of its own would be one kernel more.
        scores = torch.cat([shared_scores, query_BKRD @ own_key.mT], -1) + self._bias[layer.window]
        shared_probs, own_probs = scores.softmax(-1).to(query.dtype).split([P, self._c], -1)
        attended = own_probs @ own_value + self._from_grid(self._to_grid(shared_probs) @ s.shared[index, 1])
        return attended.flatten(1)

    def _to_grid(self, x_BKRE: Tensor) -> Tensor:
        """Put siblings side by side: [B, K, R, E] -> [M, K, G * R, E]."""
        return x_BKRE.unflatten(0, (-1, self.siblings)).transpose(1, 2).flatten(2, 3)

    def _from_grid(self, x_MKgE: Tensor) -> Tensor:
        return x_MKgE.unflatten(2, (self.siblings, -1)).transpose(1, 2).flatten(0, 1)


class GraphRecorder:
    """Captures steps of one engine: on one side stream, into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(self, step: Step, c: int) -> Any:
        """Capture a graph. Libraries initialize in a first call, which cannot be captured: its changes are undone."""
        before = [tensor.clone() for tensor in step.state.changing_tensors()]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step(c)
            for tensor, old in zip(step.state.changing_tensors(), before, strict=True):
                tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        # A reward may use the GPU in a thread of its own meanwhile: only this thread is held to what can be captured.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            step(c)
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph


class CapturedStep:
    """A step's kernels, captured at the first call for each number of own slots and replayed afterwards."""

    def __init__(self, step: Step, recorder: GraphRecorder) -> None:
        self.step, self.recorder = step, recorder
        self._graphs: dict[int, Any] = {}

    def __call__(self, c: int) -> None:
        if c not in self._graphs:
            self._graphs[c] = self.recorder.record(self.step, c)
        self._graphs[c].replay()


class GraphSet:
    """A state and its steps at full, half, quarter ... size. `key`: siblings, own slots, temperature."""

    def __init__(
        self, key: tuple[int, int, float], full_state: State, make_step: Callable[[State], Callable[[int], None]]
    ) -> None:
        self.key, self.full_state, self.make_step = key, full_state, make_step
        self._sizes: dict[int, tuple[State, Callable[[int], None]]] = {}

    def fits(self, key: tuple[int, int, float], prompts: int, shared: int) -> bool:
        size = self.full_state.shared.shape
        return self.key == key and prompts <= size[2] and shared <= size[4]

    def for_prompts(self, prompts: int) -> tuple[State, Callable[[int], None]]:
        """Return state and step of the smallest size that holds so many prompts."""
        size = len(self.full_state.length_M)
        while size > 1 and -(-size // 2) >= prompts:
            size = -(-size // 2)
        if size not in self._sizes:
            state = self.full_state.narrow(size, self.key[0])
            self._sizes[size] = state, self.make_step(state)
        return self._sizes[size]


class Transcript:
    """What the host knows of the rows of a batch, prompt by prompt: read in one piece, because each reading waits."""

    def __init__(self, state: State, rows: int) -> None:
        self.state, self.rows = state, rows
        self.tokens_B: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs_B: list[list[float]] = [[] for _ in range(rows)]
        self.lengths_B = [0] * rows
        self.stopped_B = [False] * rows

    def read(self, so_far: int) -> None:
        """Read what the rows have come to after so many tokens."""
        s, rows, fresh = self.state, slice(self.rows), slice(len(self.tokens_B[0]), so_far)
        columns = (
            s.lengths_B[rows, None],
            s.stopped_B[rows, None],
            s.tokens_BC[rows, fresh],
            s.logprobs_BC[rows, fresh],
        )
        # float64 holds token ids and float32 alike.
        table = torch.cat([with_float64(column).double() for column in columns], -1)
        width = so_far - len(self.tokens_B[0])
        for row, (length, stopped, *figures) in enumerate(table.tolist()):
            self.lengths_B[row], self.stopped_B[row] = int(length), bool(stopped)
            self.tokens_B[row] += map(int, figures[:width])
            self.logprobs_B[row] += figures[width:]

    def active_prompts(self, siblings: int) -> set[int]:
        """Return the prompts of which a row goes on."""
        return {row // siblings for row, stopped in enumerate(self.stopped_B) if not stopped}

    def completion(self, row: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the tokens of a row and their log-probabilities."""
        length = self.lengths_B[row]
        return tuple(self.tokens_B[row][:length]), tuple(self.logprobs_B[row][:length])


class SlotEngine:
    """Samples from one policy; its graphs read the weights in place."""

    is_exact = True

    def __init__(self, policy: Any, *, stop_ids: Sequence[int], rows: int) -> None:
        from minigrpo.models.policy import decoder_of

        self.decoder = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings())
        self.tokenizer, self.context, self.rows = policy.tokenizer, context_length(policy.model), rows
        self.stop_ids_s = torch.tensor(sorted(stop_ids), device=self.decoder.device)
        self._recorder = GraphRecorder(self.decoder.device) if self.decoder.device.type == "cuda" else None
        self._graph_sets: list[GraphSet] = []
        """The last used comes first."""

    def update(self, policy: Any) -> None:
        """Copy the weights to the same addresses; discard the graphs where an adapter was switched on or off."""
        addresses = [tensor.data_ptr() for tensor in self.decoder.weight_copies()]
        self.decoder.refresh()
        if [tensor.data_ptr() for tensor in self.decoder.weight_copies()] != addresses:
            self.release_caches()

    def release_caches(self) -> None:
        """Free the caches and graphs of earlier calls; the next call makes its own."""
        self._graph_sets = []

    def generate(
        self,
        prompts: Sequence[Rendered],
        n: int,
        sampling: Sampling,
        ready: Ready | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Return n completions of each prompt, in order; at most `rows` completions are decoded at once."""
        check_room(prompts, sampling.max_tokens, self.context)
        answers: list[tuple[Completion, ...]] = []
        counter = ProgressCounter(progress, ready)
        try:
            for start, chunk in split_prompts(prompts, n, self.rows):
                answers += self._decode_batch(chunk, n, sampling, start, counter)
        except BaseException:
            self.release_caches()  # half a state is no use, and its memory is needed where memory ran out
            raise
        return answers

    def _decode_batch(
        self, prompts: Sequence[Rendered], n: int, sampling: Sampling, start: int, counter: ProgressCounter
    ) -> list[tuple[Completion, ...]]:
        graphs = self._start_batch(prompts, n, sampling)
        state, step = graphs.for_prompts(len(prompts))
        slots = list(range(len(state.length_M)))  # the prompt that each slot holds
        transcript = Transcript(graphs.full_state, len(prompts) * n)
        done: dict[int, tuple[Completion, ...]] = {}
        for so_far in range(sampling.max_tokens):
            step(own_slots(so_far, sampling.max_tokens))
            last = so_far + 1 == sampling.max_tokens
            if not last and (so_far + 1) % CHECK_EVERY:
                continue
            transcript.read(so_far + 1)
            active = set() if last else transcript.active_prompts(n)
            for prompt_index in sorted(set(range(len(prompts))) - done.keys() - active):
                done[prompt_index] = self._completions(transcript, prompts[prompt_index], prompt_index, n)
                counter.finish(start + prompt_index, done[prompt_index])
            if not active:
                break
            counter.show(transcript.stopped_B.count(False) * (so_far + 1))
            if len(active) <= len(slots) // 2:
                narrower = graphs.for_prompts(len(active))
                # All active prompts, then ended ones to fill the slots: no completion may have two slots.
                order = sorted(range(len(slots)), key=lambda slot: slots[slot] not in active)
                order = order[: len(narrower[0].length_M)]
                state.move_up(to_device(torch.tensor(order), self.decoder.device), n)
                slots = [slots[slot] for slot in order]
                state, step = narrower
        return [done[prompt_index] for prompt_index in range(len(prompts))]

    def _start_batch(self, prompts: Sequence[Rendered], n: int, sampling: Sampling) -> GraphSet:
        """Return state and steps filled with these prompts, reusing those of an earlier call where they fit."""
        M, P = len(prompts), max(len(prompt.ids) for prompt in prompts) - 1
        graphs = self._graphs_for((n, sampling.max_tokens, sampling.temperature), M, P)
        state = graphs.full_state
        if P:  # slots behind the prompt are masked
            prefill_prompts(self.decoder, prompts, self.decoder.rope_table(P), state.shared)
        streams = [name_key(sampling.seed, p.prompt.id, sibling) for p in prompts for sibling in range(n)]
        last_ids = [p.ids[-1] for p in prompts for _ in range(n)]
        rows = torch.arange(len(state.row_B), device=self.decoder.device)
        state.stream_B[: M * n], state.input_B[: M * n] = to_device(torch.tensor([streams, last_ids]), rows.device)
        state.length_M[:M] = to_device(torch.tensor([len(p.ids) - 1 for p in prompts]), rows.device)
        state.row_B.copy_(rows)
        state.active_B.copy_(rows < M * n)
        for tensor in (state.lengths_B, state.stopped_B, state.so_far):
            tensor.zero_()
        return graphs

    def _graphs_for(self, key: tuple[int, int, float], prompts: int, shared: int) -> GraphSet:
        """Return graphs that fit, of an earlier call or new ones; of others, the last used are kept."""
        fitting = [graphs for graphs in self._graph_sets if graphs.fits(key, prompts, shared)]
        others = [graphs for graphs in self._graph_sets if graphs.key != key]
        self._graph_sets = others = others[: KEPT_SHAPES - 1]  # what is let go is freed before anything is built
        slots = -(-shared // PROMPT_SLOT_STEP) * PROMPT_SLOT_STEP or PROMPT_SLOT_STEP
        graphs = fitting[0] if fitting else self._build_graphs(key, prompts, slots)
        self._graph_sets = [graphs, *others]
        return graphs

    def _build_graphs(self, key: tuple[int, int, float], prompts: int, shared: int) -> GraphSet:
        n, longest, temperature = key
        rope = self.decoder.rope_table(shared + longest)

        def make_step(state: State) -> Callable[[int], None]:
            step = Step(self.decoder, state, n, rope=rope, stop_ids_s=self.stop_ids_s, temperature=temperature)
            return step if self._recorder is None else CapturedStep(step, self._recorder)

        return GraphSet(key, State.empty(self.decoder, prompts, n, shared=shared, own=longest), make_step)

    def _completions(
        self, transcript: Transcript, prompt: Rendered, prompt_index: int, n: int
    ) -> tuple[Completion, ...]:
        rows = range(prompt_index * n, (prompt_index + 1) * n)
        own = [transcript.completion(row) for row in rows]
        refuse_broken_logits(prompt.prompt.id, [logprobs for _, logprobs in own])
        texts = self.tokenizer.batch_decode([ids for ids, _ in own], skip_special_tokens=True)
        return tuple(
            Completion(text, ids, logprobs, "stop" if transcript.stopped_B[row] else "length")
            for text, (ids, logprobs), row in zip(texts, own, rows, strict=True)
        )


def own_slots(so_far: int, max_tokens: int) -> int:
    """Return how many own slots a step attends over: MIN_OWN_SLOTS, doubled until they hold its token."""
    c = MIN_OWN_SLOTS
    while c <= so_far:
        c *= 2
    return min(c, max_tokens)
