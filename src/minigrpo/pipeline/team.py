"""One run on several ranks: one leads, writes and speaks, and the others do what they are told in its plan.

The leading rank does all that stands before training as a process does that is alone. Meanwhile the others open the
model; then they hear the plan, and train beside it from the checkpoint that it goes on from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.text import Text

from minigrpo.config.schema import Recipe
from minigrpo.distributed.place import Place
from minigrpo.errors import RecipeError
from minigrpo.pipeline import prepare
from minigrpo.pipeline.context import OpenedRun, allocator_for
from minigrpo.runs.logger import RankLog
from minigrpo.runs.rundir import RunDir
from minigrpo.ui.screen import Screen

if TYPE_CHECKING:
    from minigrpo.distributed.join import Team
    from minigrpo.distributed.ranks import Ranks


@contextmanager
def joined(recipe: Recipe) -> Iterator[Team | None]:
    """Join the ranks that a launcher started, until the block ends; None where it started this process alone, or none.

    Raise RecipeError where the recipe means one process.
    """
    place = Place.of(os.environ)
    if place is None:
        yield None
        return
    if recipe.rollout.engine == "vllm":
        raise RecipeError("rollout.engine vllm samples for one process: train with one rank, or with another engine")
    if recipe.model.device.startswith("cuda:"):
        raise RecipeError("model.device names one GPU for all ranks: leave it at auto, and each takes one of its own")
    with allocator_for(recipe):
        from minigrpo.distributed.join import joined_ranks

        with joined_ranks(place) as team:
            yield team


def refuse_ranks() -> None:
    """Raise RecipeError where a launcher started several processes for a stage that one does."""
    if place := Place.of(os.environ):
        raise RecipeError(
            f"A launcher has started {place.size} processes, and only `minigrpo train` shares its work among them. "
            "Begin with that; one process does the other stages afterwards: minigrpo run RECIPE --resume"
        )


def lead(opened: OpenedRun, team: Team | None) -> Ranks:
    """Tell the others the plan of the run that this rank has opened, connect, and shard the policy where that is due.

    Return ALONE where there are no others.
    """
    import torch

    from minigrpo.distributed.join import JOIN_S, exchange_seconds
    from minigrpo.distributed.ranks import ALONE

    if team is None:
        if opened.recipe.train.shard == "on":
            words = "train.shard on: this process is alone, so it holds the whole model. Several: --nproc 2"
            Screen(stderr=True).show(Text(words))
        return ALONE
    rows = getattr(opened.engine, "rows", 0)
    weights = sum(parameter.numel() for parameter in opened.policy.model.parameters())
    seconds = exchange_seconds(opened.recipe, team.size, weights=weights, rows=rows, device=opened.policy.device.type)
    blocks = {"blocks": getattr(opened.engine, "blocks", False), "training_blocks": opened.policy.blocks_due}
    team.tell("plan", {"rows": rows, "threads": torch.get_num_threads(), "seconds": seconds, **blocks})
    team.connect(seconds)
    where = ", ".join(f"{count} on {host}" for host, count in team.hosts().items())
    patience = timedelta(seconds=round(seconds))
    sentence = (
        f"{team.size} ranks: {where}. One that does not come is missed after {JOIN_S:.0f} s, one that stands still "
        f"after {team.watch.silence:g} s. For one another they wait up to {patience}: twice the longest rollout of the "
        "plan, and five minutes."
    )
    if shard_policy(opened, team):
        sentence += f" Weights, gradients and moments are sharded: each rank holds one part of {team.size}."
    Screen(stderr=True).show(Text(sentence))
    return team


def shard_policy(opened: OpenedRun, ranks: Ranks) -> bool:
    """Shard the policy over the ranks where the recipe means it, and tell whether it did. All ranks come to the same.

    Raise RecipeError where it cannot be done.
    """
    from minigrpo.rollouts.engines.registry import shards

    due = shards(opened.recipe, opened.policy.model, opened.policy.device.type, ranks.size)
    if due:
        opened.policy.shard(ranks)
    return due


def dismiss(team: Team | None) -> None:
    """Tell the others that there is nothing to train."""
    if team is not None:
        team.tell("plan", None)


def follow(recipe: Recipe, run: RunDir, team: Team) -> None:
    """Train as a rank beside the one that leads. Writes nothing into the run's folder, which it must see."""
    import torch

    from minigrpo.models.policy import open_policy
    from minigrpo.rollouts.engines.registry import open_engine
    from minigrpo.tasks.registry import open_task
    from minigrpo.training.grpo import grpo
    from minigrpo.utils.process import process_settings

    team.at("opening the model")
    recipe = _on_own_device(recipe, team.place)
    with process_settings():
        task, policy = open_task(recipe), open_policy(recipe)
        plan = team.hear("plan")
        if plan is None:
            return
        torch.set_num_threads(plan["threads"])
        policy.blocks_due = plan["training_blocks"]
        opened = OpenedRun(recipe, task, policy, open_engine(policy, recipe, plan["rows"], blocks=plan["blocks"]))
        if recipe.warmup.steps:
            prepare.begin_with_warmup(opened, run)
        team.connect(plan["seconds"])
        shard_policy(opened, team)
        grpo(recipe, task, policy, opened.engine, RankLog(run, team.rank), ranks=team)


def _on_own_device(recipe: Recipe, place: Place) -> Recipe:
    """Return the recipe for the GPU of this rank's number on its machine. The leading rank's is the first."""
    import torch

    if recipe.model.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return recipe
    model = recipe.model.model_copy(update={"device": f"cuda:{place.local_rank}"})
    return recipe.model_copy(update={"model": model})
