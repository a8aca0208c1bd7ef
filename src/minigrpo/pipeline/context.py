"""Open task, policy and engine of a recipe, once for all stages; find what a recipe names in a published run."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minigrpo.config.schema import Recipe
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Engine, Task
from minigrpo.ui.progress import stage
from minigrpo.utils.memory import expandable_segments
from minigrpo.utils.paths import user_path

if TYPE_CHECKING:
    from minigrpo.models.policy import Policy
    from minigrpo.training.memory.machine import SamplingPlan


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
    plan = plan_sampling(policy, recipe, task, run)
    policy.blocks_due = plan.training_blocks
    return OpenedRun(recipe, task, policy, open_engine(policy, recipe, plan.rows, blocks=plan.blocks))


def located(recipe: Recipe, run: RunDir, base: str | None = None) -> Recipe:
    """Return the run's recipe with the files that a published run carries, where this machine lacks what it names.

    `base`: where the base lies here, in place of what the recipe names.
    """
    task = recipe.task
    carried = sorted(run.task_files.iterdir()) if run.task_files.is_dir() else []
    values = {name: getattr(task, name) for name in ("name", "data", "rates")}
    changed = {name: _carried(value, file) for name, value in values.items() for file in carried if value}
    found = {name: value for name, value in changed.items() if value != values[name]}
    recipe = recipe.model_copy(update={"task": task.model_copy(update=found)}) if found else recipe
    if base is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": base, "revision": None})})


def _carried(value: str, file: Path) -> str:
    """Return a knob of the task with this file in place of one of the same name that is not here."""
    parts = re.fullmatch(rf"((?:judge|classifier):)?((?:.*[\\/])?{re.escape(file.name)})(:.*)?", value)
    if parts is None or user_path(parts[2]).exists():
        return value
    return f"{parts[1] or ''}{file.absolute()}{parts[3] or ''}"


def allocator_for(recipe: Recipe) -> AbstractContextManager[None]:
    """Set torch's allocator for this recipe inside the block, which begins before torch is loaded.

    vLLM in this process could not sleep with it.
    """
    in_process = recipe.rollout.engine == "vllm" and not recipe.rollout.server
    return nullcontext() if in_process else expandable_segments()


def plan_sampling(policy: Policy, recipe: Recipe, task: Task, run: RunDir | None) -> SamplingPlan:
    """Plan how many completions are decoded side by side: as many as when the run began, or as memory admits. And
    whether there is room for weights in blocks, now: they change no bit, so a run may go on with others.
    """
    from minigrpo.models.context_window import longest_prompt
    from minigrpo.models.onednn import gains_by_blocks
    from minigrpo.rollouts.groups import prompts_of
    from minigrpo.training.checkpoint import read_machine
    from minigrpo.training.memory.machine import SamplingPlan, planned_sampling

    began = read_machine(run) if run else None
    if began and not gains_by_blocks(policy.dtype, policy.device.type):
        return SamplingPlan(began.rows)
    plan = planned_sampling(policy, recipe, longest_prompt(prompts_of(task, "train"), policy.tokenizer))
    return replace(plan, rows=began.rows) if began else plan
