"""Open task, policy and engine of a recipe, once for all stages."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigrpo.config.schema import Recipe
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Engine, Task
from minigrpo.ui.progress import stage
from minigrpo.utils.memory import expandable_segments

if TYPE_CHECKING:
    from minigrpo.models.policy import Policy


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A recipe with its task, policy and engine, loaded once and handed from stage to stage."""

    recipe: Recipe
    task: Task
    policy: Policy
    engine: Engine


def open_all(recipe: Recipe, run: RunDir | None = None) -> OpenedRun:
    """Open what a recipe names. `run`: a run that has begun; its engine decodes as many rows at once as it did then."""
    from minigrpo.models.policy import open_policy
    from minigrpo.rollouts.engines.registry import open_engine
    from minigrpo.tasks.registry import open_task

    task = open_task(recipe)
    with stage(f"model {recipe.model.path}", 0) as report:
        policy = open_policy(recipe, report)
    return OpenedRun(recipe, task, policy, open_engine(policy, recipe, count_rows(policy, recipe, task, run)))


def allocator_for(recipe: Recipe) -> AbstractContextManager[None]:
    """Set torch's allocator for this recipe inside the block, which begins before torch is loaded.

    vLLM in this process could not sleep with it.
    """
    in_process = recipe.rollout.engine == "vllm" and not recipe.rollout.server
    return nullcontext() if in_process else expandable_segments()


def count_rows(policy: Policy, recipe: Recipe, task: Task, run: RunDir | None) -> int:
    """Return how many completions are decoded side by side: as many as when the run began, or as memory admits."""
    from minigrpo.models.context_window import longest_prompt
    from minigrpo.rollouts.groups import prompts_of
    from minigrpo.training.checkpoint import read_machine
    from minigrpo.training.memory.machine import planned_rows

    began = read_machine(run) if run else None
    if began is not None:
        return began.rows
    return planned_rows(policy, recipe, longest_prompt(prompts_of(task, "train"), policy.tokenizer))
