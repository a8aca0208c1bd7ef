"""Whole runs on several ranks: the draws of one process, one writer, and a resume on another number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.config.schema import (
    AdapterConfig,
    EvalConfig,
    GroupsConfig,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
    RolloutConfig,
    SaveConfig,
    TrainConfig,
)
from minigrpo.distributed.ranks import ALONE, Ranks
from minigrpo.errors import TaskError
from minigrpo.models.policy import open_policy
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.runs.logger import RankLog, RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training import checkpoint
from minigrpo.training.grpo import grpo
from minigrpo.types import Grade, Prompt, Task
from tests.helpers.ranks import on_ranks

pytestmark = pytest.mark.needs("linux")


def small_letters(split: str) -> list[Prompt]:
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": "say " * (i % 5) + str(i)},)) for i in range(20)]


def share_of_small_letters(prompt: Prompt, text: str) -> Grade:
    return Grade(sum(letter.islower() for letter in text) / 8, solved="e" in text)


LETTERS = Task("letters", small_letters, share_of_small_letters)


def recipe_for(folder: Path, *, until: int = 3, full: bool = False, **sections: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(path=str(folder)),
        lora=AdapterConfig(rank=4, alpha=8),
        rollout=RolloutConfig(prompts=3, completions=3, max_tokens=5),
        train=TrainConfig(steps=6, until=until, lr=1e-4, tokens_per_pass=90, inner_epochs=2, full=full),
        save=SaveConfig(every=2, keep=9),
        **sections,
    )


def train(ranks: Ranks, recipe: Recipe, run: RunDir, task: Task = LETTERS) -> list[torch.Tensor]:
    """Train on these ranks, and return the weights that this one came to."""
    run.path.mkdir(parents=True, exist_ok=True)
    policy = open_policy(recipe)
    log = RunLogger(run, recipe.train.last_step) if ranks.leads else RankLog(run, ranks.rank)
    grpo(recipe, task, policy, open_engine(policy, recipe), log, ranks=ranks)
    return [weight.detach().clone() for weight in policy.trainable]


def sampled(run: RunDir) -> list[tuple[int, str]]:
    """Return what was sampled, group by group: the hash of its tokens."""
    return [(row["step"], row["ids"]) for row in map(json.loads, run.groups.read_text().splitlines())]


def gap(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


EVERYTHING: dict[str, Any] = {
    "groups": GroupsConfig(resample=2.0, min_spread=0.05, replay=2, rest=0.9, focus=2.0),
    "objective": ObjectiveConfig(kl=0.05, overlong=2),
    "eval": EvalConfig(every=2, held_out=5),
}


def test_a_run_that_goes_on_with_other_numbers_of_ranks_is_that_of_one_process(
    tmp_path: Path, tiny_folder: Any
) -> None:
    def until(step: int) -> Recipe:
        return recipe_for(tiny_folder(), until=step, **EVERYTHING)

    alone, together = RunDir(tmp_path / "alone"), RunDir(tmp_path / "together")
    weights = train(ALONE, until(3), alone)
    on_ranks(2, tmp_path / "first", lambda ranks: train(ranks, until(1), together))
    train(ALONE, until(2), together)
    first, second = on_ranks(2, tmp_path / "second", lambda ranks: train(ranks, until(3), together))
    assert gap(first, second) == 0
    assert sampled(together) == sampled(alone)
    assert 0 < gap(first, weights) < 1e-6
    for left, right in zip(*(run.metrics.read_text().splitlines() for run in (alone, together)), strict=True):
        one, two = (
            {
                name: value
                for name, value in json.loads(line).items()
                if not name.startswith(("seconds", "tokens_per", "memory_gb", "sent_bytes"))
            }
            for line in (left, right)
        )
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    assert json.loads(together.machine.read_text())["ranks"] == 2
    assert checkpoint.find_latest(together)[0].machine.ranks == 2  # type: ignore[union-attr]


def test_an_error_of_the_task_names_the_share_of_all_ranks(tmp_path: Path, tiny_folder: Any) -> None:
    """Where one rank's groups could not be scored and the other's could, that is no fault of the task."""

    def grade(prompt: Prompt, text: str) -> Grade:
        scored = prompt.id in ("train-1", "train-3", "train-5")
        return Grade(1.0 if scored else float("nan"), notes={} if scored else {"grader": "no function applied"})

    run = RunDir(tmp_path / "run")
    recipe = recipe_for(tiny_folder(), until=1)
    task = Task("some", lambda split: small_letters(split)[:6], grade)
    two = recipe.model_copy(update={"rollout": RolloutConfig(prompts=6, completions=2, max_tokens=4)})
    on_ranks(2, tmp_path / "wire", lambda ranks: train(ranks, two, run, task))
    assert len(sampled(run)) == 6
    never = Task("never", small_letters, lambda prompt, text: Grade(float("nan"), notes={"grader": "no"}))

    def refused(ranks: Ranks) -> str:
        with pytest.raises(TaskError) as told:
            train(ranks, recipe, RunDir(tmp_path / "never"), never)
        return str(told.value)

    first, second = on_ranks(2, tmp_path / "never wire", refused)
    assert first == second
    assert "could not score one completion" in first


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_the_same_number_of_ranks_repeats_byte_for_byte_and_any_other_draws_the_same(
    tmp_path: Path, tiny_folder: Any, size: int, full: bool
) -> None:
    recipe = recipe_for(tiny_folder(), full=full, **EVERYTHING)
    weights = train(ALONE, recipe, RunDir(tmp_path / "alone"))
    runs = [RunDir(tmp_path / name) for name in ("first", "again")]
    first, again = (
        on_ranks(size, tmp_path / f"wire {run.path.name}", lambda ranks, run=run: train(ranks, recipe, run))
        for run in runs
    )
    assert all(gap(first[0], others) == 0 for others in [*first, *again])
    assert [sampled(run) for run in runs] == [sampled(RunDir(tmp_path / "alone"))] * 2
    assert gap(weights, first[0]) < 2e-6  # six updates of 1e-4 each
    names = [{path.name for path in run.path.rglob("*")} for run in (*runs, RunDir(tmp_path / "alone"))]
    assert names[0] == names[1] == names[2]
