"""Go on when memory runs out: smaller passes, the same gradient.

Where an allocator says no, the step is begun again with passes of half the size; on a GPU it is first tried once more
as it is, because free memory may only have been in pieces. A kernel that runs short of main memory kills the process
instead, and says nothing: so while that is tight an update leaves a note in the run's folder, and takes it away when it
is done. A resumed run that finds one halves its passes where something else says that memory was the reason, too: the
kernel's count of such kills, or a second kill in the same step. Whoever pulls the plug leaves neither.

Before the first step `try_largest_pass` runs the longest pass that the run could meet: where memory runs out, it does
so then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from minigrpo.algorithms.objective import Objective
from minigrpo.algorithms.packing import MicroBatch, PackedGroup, split_group
from minigrpo.config.schema import Recipe
from minigrpo.distributed.ranks import ALONE, Ranks
from minigrpo.errors import RecipeError, SharedPassError
from minigrpo.models.policy import Policy
from minigrpo.runs.rundir import RunDir, write_json
from minigrpo.training.memory.machine import plan_of
from minigrpo.training.memory.meta import UnplannableError
from minigrpo.training.memory.planner import largest_micro_batch
from minigrpo.utils.memory import count_memory_kills, empty_cache, first_line, free_before_kill, free_memory, ran_out

Work = TypeVar("Work")

NOTE = "updating.json"
TIGHT = 1.5
"""Memory is tight where an update is planned to take more than the free memory divided by this."""


def retry_on_oom(
    work: Callable[[Sequence[MicroBatch]], Work],
    parts: Sequence[MicroBatch],
    budget: int,
    *,
    clear: Callable[[], None],
    can_cut: bool = True,
) -> tuple[Work, int]:
    """Return `work(micro_batches)` and the tokens per pass that memory had room for.

    Nothing that a failed try added may stay: `clear` throws its gradients away. Raises RecipeError where no cut is
    left. `can_cut`: False where other ranks take part in each pass, which this one cannot begin again by itself: raises
    SharedPassError.
    """
    emptied = False
    while True:
        try:
            return work(parts), budget
        except (RuntimeError, MemoryError) as fault:
            place = ran_out(fault)
            if not place:
                raise
            message = first_line(fault)
        if not can_cut:
            raise SharedPassError(
                f"Memory ran out in a pass of {budget} tokens that all ranks share ({message[:120]}), so one of them "
                f"cannot cut it. The same command with --resume goes on with passes of {max(1, budget // 2)}.",
                entry="memory-ran-out",
            )
        # Beyond the handler: until then the traceback holds the tensors of the pass that failed.
        clear()
        empty_cache()
        if place == "CPU" or emptied:
            budget, parts = _halved(parts, budget, message)
        emptied = True


def _halved(parts: Sequence[MicroBatch], budget: int, message: str) -> tuple[int, list[MicroBatch]]:
    longest = max(part.tokens for part in parts)
    smaller = budget // 2
    while smaller >= longest:
        smaller //= 2
    pieces = [piece for part in parts for piece in split_micro_batch(part, smaller)]
    if len(pieces) == len(parts):
        raise RecipeError(
            f"Memory ran out in a pass over a single completion, which cannot be cut ({message[:120]}). See what takes "
            "it: minigrpo plan RECIPE. A lower --rollout.max_tokens or --model.checkpointing on takes less",
            entry="memory-ran-out",
        )
    return smaller, pieces


def split_micro_batch(part: MicroBatch, tokens_per_pass: int) -> Iterator[MicroBatch]:
    """Split a micro-batch into smaller ones, with the advantages, weights and log-probabilities of their tokens."""
    start = 0
    for bundles in _bundles(part, tokens_per_pass):
        stop = start + sum(n for bundle in bundles for n in bundle.lengths)
        here = slice(start, stop)
        known: dict[str, Any] = {
            name: None if (value := getattr(part, name)) is None else value[here]
            for name in ("advantages_N", "weights_N", "shares_N", "engine_N", "old_N", "ref_N", "chosen_N")
        }
        yield replace(part, groups=tuple(bundles), **known)
        start = stop


def _bundles(part: MicroBatch, tokens_per_pass: int) -> Iterator[list[PackedGroup]]:
    waiting: list[PackedGroup] = []
    for bundle in part.groups:
        for piece in split_group(bundle, tokens_per_pass):
            # Siblings are counted alike in all bundles of a row, so a piece of a group has a row of its own.
            alike = not waiting or len(waiting[0].siblings) == len(piece.siblings)
            if waiting and (not alike or sum(b.tokens for b in waiting) + piece.tokens > tokens_per_pass):
                yield waiting
                waiting = []
            waiting.append(piece)
    if waiting:
        yield waiting


@contextmanager
def crash_note(run: RunDir | None, needs: int, free: int, what: dict[str, Any]) -> Iterator[None]:
    """Leave a note in the run's folder during an update, where `needs` bytes are tight for `free` ones.

    An exception takes it away as well: only a process that is killed leaves it. `run`: None leaves none.
    """
    if run is None or needs * TIGHT <= free:
        yield
        return
    note = run.path / NOTE
    write_json(note, what | {"needs": needs, "free": free, "kills": count_memory_kills()})
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def pop_crash_note(run: RunDir) -> dict[str, Any] | None:
    """Remove and return the note of a killed update, or None. A damaged note is an empty one."""
    note = run.path / NOTE
    if not note.is_file():
        return None
    text = note.read_text(encoding="utf-8")
    note.unlink()
    try:
        found: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found


def killed_for_memory(note: Mapping[str, Any]) -> str:
    """Return what says that the process which left this note was killed for its memory, or "" where nothing does.

    A note alone says only that it was killed meanwhile: by a user, or with the machine that it ran on.
    """
    then, now = note.get("kills"), count_memory_kills()
    if then and now and then[0] == now[0] and then[1] < now[1]:
        return "the system has killed for memory since"
    if note.get("step") in note.get("earlier", ()):
        return "it is the second time in the same step"
    return ""


def try_largest_pass(
    policy: Policy,
    objective: Objective,
    recipe: Recipe,
    *,
    run: RunDir | None,
    prompt_tokens: int,
    tokens_per_pass: int,
    killed_in: Sequence[int] = (),
    ranks: Ranks = ALONE,
) -> tuple[int, int]:
    """Run the largest pass that the recipe could meet forward and back, and throw its gradient away.

    Returns the bytes that an update takes at its height, and the tokens per pass that memory had room for. On a CPU
    the pass is spared where memory is ample. `prompt_tokens`: of the longest prompt. `killed_in`: steps in whose
    updates the run was killed.
    """
    try:
        fixed = recipe.train.model_copy(update={"tokens_per_pass": tokens_per_pass})
        plan = plan_of(policy, recipe.model_copy(update={"train": fixed}), prompt_tokens)
        needs = plan.update_rises + plan.line("optimizer")
    except UnplannableError:
        needs = 1 << 62
    # Where one rank tries, all do: of a sharded model none can by itself.
    if not ranks.any(policy.device.type != "cpu" or needs * TIGHT > free_memory(policy.device)):
        return needs, tokens_per_pass
    vocabulary = policy.model.config.get_text_config().vocab_size
    micro_batches = [largest_micro_batch(recipe.rollout, prompt_tokens, tokens_per_pass, vocabulary)]
    what = {"step": -1, "tokens_per_pass": tokens_per_pass, "earlier": list(killed_in)}
    with crash_note(run, needs, free_before_kill(policy.device), what):
        work = partial(_forward_and_back, policy, objective)
        _, tokens_per_pass = retry_on_oom(
            work,
            micro_batches,
            tokens_per_pass,
            clear=partial(clear_gradients, policy),
            can_cut=not policy.is_sharded,
        )
    clear_gradients(policy)
    return needs, tokens_per_pass


def _forward_and_back(policy: Policy, objective: Objective, parts: Sequence[MicroBatch]) -> None:
    for part in parts:
        scores = policy.logprobs(part, step=0, entropy_learns=objective.entropy > 0)
        (scores.logprobs_N.sum() + (scores.entropy_N.sum() if objective.entropy > 0 else 0.0)).backward()


def clear_gradients(policy: Policy) -> None:
    """Drop the gradients that a pass accumulated."""
    for parameter in policy.trainable:
        parameter.grad = None
