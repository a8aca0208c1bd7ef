"""Sample the groups of the next step while this one is updated (`rollout.ahead 1`).

    sample step n | update n             | sample the rest of n + 1, if any | update n + 1 ...
                  | sample step n + 1 ...

So the policy before the last update samples a step's groups. The objective corrects for it with what it has for any
sampler that is not quite the policy: the importance weight p_policy / p_sampler of each token.

One thread samples. It ends before the engine is given new weights, before anything is saved, and before anybody else
asks the engine, so what it samples is a function of names and weights, like every other rollout. A checkpoint holds the
groups that wait in it: the policy that sampled them is gone by then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from minigrpo.config.schema import Recipe
from minigrpo.distributed.ranks import Ranks
from minigrpo.errors import RecipeError
from minigrpo.rollouts.serialize import group_data, group_of
from minigrpo.training.group_source import StepGroups
from minigrpo.types import Engine, Prompt


class RolloutAhead:
    """The groups of one later step: being sampled, or waiting for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._waiting: tuple[int, StepGroups] | None = None
        self._fault: BaseException | None = None
        self._abandoned = False

    def start(self, step: int, sample: Callable[[], StepGroups]) -> None:
        """Begin to sample the groups of a step. Nothing else may ask the engine until `wait` has returned."""

        def work() -> None:
            try:
                self._waiting = step, _named(sample())
            except BaseException as fault:  # raised again by `wait`; here it would only end the thread
                self._fault = fault

        self._thread = threading.Thread(target=work, name="rollout ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being sampled any more. Raises what has ended the sampling."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def take(self, step: int) -> StepGroups | None:
        """Return the groups that wait for this step, once; None where there are none."""
        if self._waiting is None:
            return None
        (then, groups), self._waiting = self._waiting, None
        assert then == step, f"groups of step {then} are waiting in step {step}"
        return groups

    def check(self) -> None:
        """End a sampling that nobody waits for: called from its thread while tokens come."""
        if self._abandoned:
            raise _AbandonedError

    def abandon(self) -> None:
        """Have a sampling end soon, and wait until it has: the training has failed, and what it uses is closed next."""
        self._abandoned = True
        if self._thread is not None:
            self._thread.join()

    def state(self) -> dict[str, Any] | None:
        """Return the groups that wait, as JSON data; None where there are none."""
        if self._waiting is None:
            return None
        step, groups = self._waiting
        places = {id(group): place for place, group in enumerate(groups.sampled)}
        return {
            "step": step,
            "sampled": [group_data(group) for group in groups.sampled],
            # A group of an earlier step, replayed, is not among those that were sampled.
            "groups": [places[id(g)] if id(g) in places else group_data(g) for g in groups.groups],
            "drawn": groups.drawn,
            "figures": dict(groups.figures),
        }

    def restore(self, state: Mapping[str, Any] | None, known: Mapping[str, Prompt]) -> None:
        """Take up what `state` gave. `known`: prompts by id."""
        self._waiting = None
        if state is None:
            return
        sampled = tuple(group_of(row, known) for row in state["sampled"])
        groups = tuple(sampled[row] if isinstance(row, int) else group_of(row, known) for row in state["groups"])
        self._waiting = state["step"], StepGroups(groups, sampled, state["drawn"], state["figures"])


class _AbandonedError(Exception):
    """Ends a sampling whose training has ended."""


def _named(groups: StepGroups) -> StepGroups:
    """Mark the figures of a step whose groups an earlier policy has sampled."""
    return replace(groups, figures={**groups.figures, "sampled_ahead": 1.0})


def refuse_ahead(recipe: Recipe, engine: Engine, ranks: Ranks) -> None:
    """Raise RecipeError where the recipe samples ahead and this cannot be done."""
    if not recipe.rollout.ahead:
        return
    if ranks.size > 1:
        raise RecipeError("rollout.ahead is for one process: train with one rank, or leave it at 0")
    if not getattr(engine, "keeps_weights", False):
        raise RecipeError(
            "rollout.ahead needs an engine whose weights stay as they are while the policy is updated: rollout.engine "
            "native on a CPU, or vllm with rollout.server. Leave it at 0 here"
        )
