"""Groups sampled ahead: by which policy, with what correction, and with the same bytes after a kill."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from minigrpo.algorithms.objective import open_objective
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import GroupsConfig, Recipe, RolloutConfig
from minigrpo.distributed.ranks import Ranks
from minigrpo.errors import DivergenceError, RecipeError, TaskError
from minigrpo.models.policy import open_policy
from minigrpo.pipeline import stages
from minigrpo.pipeline.forks import plan_fork
from minigrpo.pipeline.replay import replay
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.runs.logger import RunLogger, read_groups
from minigrpo.runs.rundir import RunDir
from minigrpo.training.ahead import RolloutAhead, refuse_ahead
from minigrpo.training.grpo import grpo
from minigrpo.types import Grade, Prompt, Task
from tests.training.test_grpo import TASK, letters, lines_in, recipe_for, untimed

WEIGHTS = "adapter_model.safetensors"


def ahead_recipe(folder: Path, ahead: int = 1, *, groups: GroupsConfig | None = None, **train: Any) -> Recipe:
    recipe = recipe_for(folder, **train)
    rollout = RolloutConfig(prompts=3, completions=4, max_tokens=8, ahead=ahead)
    return recipe.model_copy(update={"rollout": rollout, "groups": groups or recipe.groups})


def train(recipe: Recipe, folder: Path, task: Task | None = None) -> RunDir:
    run, policy = RunDir(folder), open_policy(recipe)
    run.path.mkdir(exist_ok=True)
    logger = RunLogger(run, recipe.train.last_step)
    grpo(recipe, task or letters(), policy, open_engine(policy, recipe), logger)
    return run


def sampled(run: RunDir, step: int) -> list[tuple[str, str]]:
    rows = (row for row in read_groups(run) if row["step"] == step)
    return sorted((row["prompt"], completion["text"]) for row in rows for completion in row["completions"])


def test_the_policy_before_the_last_update_samples_and_the_loss_knows_it(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder()
    ahead = train(ahead_recipe(folder, steps=3), tmp_path / "ahead")
    still = train(ahead_recipe(folder, 0, steps=3, lr=1e-12), tmp_path / "still")
    moved = train(ahead_recipe(folder, 0, steps=3), tmp_path / "moved")
    # Step 2 is what the untrained policy says, though it was updated in step 1; without ahead it says something else.
    assert sampled(ahead, 1) == sampled(still, 1) == sampled(moved, 1)
    assert sampled(ahead, 2) == sampled(still, 2) != sampled(moved, 2)
    assert sampled(ahead, 3) != sampled(still, 3)
    first, *later = [json.loads(line) for line in ahead.metrics.read_text().splitlines()]
    assert first["engine_gap"] < 1e-4
    assert "sampled_ahead" not in first
    assert all(row["sampled_ahead"] == 1 and row["off_policy_gap"] > 1e-3 for row in later)
    assert open_objective(load_recipe("quickstart", {"rollout.ahead": "1"}), inexact_engine=False).importance
    assert not open_objective(load_recipe("quickstart"), inexact_engine=False).importance


@pytest.mark.parametrize("groups", [GroupsConfig(), GroupsConfig(resample=1.0, replay=2, focus=1.0, min_spread=0.3)])
def test_a_run_that_goes_on_from_any_checkpoint_ends_with_the_same_bytes(
    groups: GroupsConfig, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = ahead_recipe(tiny_folder(), steps=5, groups=groups)
    recipe = recipe.model_copy(update={"save": recipe.save.model_copy(update={"every": 1, "keep": 9})})
    whole = train(recipe, tmp_path / "whole")
    for kept in (1, 3):
        shutil.copytree(whole.path, cut := tmp_path / f"cut{kept}")
        for step in range(kept + 1, 6):
            shutil.rmtree(cut / "checkpoints" / f"{step:06d}")
        again = train(recipe, cut)
        assert again.groups.read_bytes() == whole.groups.read_bytes()
        assert untimed(again.metrics) == untimed(whole.metrics)
        for step in range(kept + 1, 6):
            for name in (WEIGHTS, "trainer.json"):
                pair = [run.checkpoint(step) / name for run in (again, whole)]
                assert pair[0].read_bytes() == pair[1].read_bytes(), (step, name)
    states = [json.loads((whole.checkpoint(step) / "trainer.json").read_text()) for step in range(6)]
    assert [state["ahead"]["step"] if "ahead" in state else None for state in states] == [None, 1, 2, 3, 4, None]


BETWEEN_SAVES = (
    ("minigrpo.training.ahead:RolloutAhead.check", 5),  # tokens of the next step come, beside the update
    ("minigrpo.training.ahead:RolloutAhead.wait", 4),  # the update is done; the next groups may be, or not
    (
        "minigrpo.training.checkpoint:write_sealed",
        3,
    ),  # in a save: the groups that wait are written, and all is not
)
ANYWHERE = (
    "minigrpo.training.ahead:RolloutAhead.check",
    "minigrpo.training.ahead:RolloutAhead.take",
    "minigrpo.training.ahead:RolloutAhead.wait",
    "minigrpo.training.ahead:RolloutAhead.state",
    "minigrpo.training.ahead:_named",
    "minigrpo.training.grpo:update_policy",
    "minigrpo.runs.logger:RunLogger.record",
    "minigrpo.training.checkpoint:write_sealed",
    "minigrpo.training.checkpoint:append_link",
    "minigrpo.training.checkpoint:prune",
)


def train_until_killed(recipe: Recipe, folder: Path, place: str, count: int) -> bool:
    """Train in a process that ends with kill -9 at the count-th call of a function; return whether it came so far."""

    def work() -> None:
        owner, _, name = place.replace(":", ".").rpartition(".")
        called, calls = resolve_name(place), itertools.count(1)

        def dies(*given: Any, **options: Any) -> Any:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return called(*given, **options)

        setattr(resolve_name(owner), name, dies)
        train(recipe, folder)
        os._exit(0)  # what pytest would do at its end is the parent's

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def ends_as(whole: RunDir, again: RunDir, step: int) -> None:
    assert again.groups.read_bytes() == whole.groups.read_bytes()
    assert untimed(again.metrics) == untimed(whole.metrics)
    for name in (WEIGHTS, "optimizer.pt", "trainer.json"):
        assert (again.checkpoint(step) / name).read_bytes() == (whole.checkpoint(step) / name).read_bytes(), name


@pytest.mark.needs("linux")
def test_a_run_that_is_killed_while_it_samples_ahead_updates_or_saves_ends_with_the_same_bytes(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = ahead_recipe(tiny_folder(), steps=5, groups=GroupsConfig(resample=1.0, replay=2, min_spread=0.3))
    whole = train(recipe, tmp_path / "whole")
    for number, (place, count) in enumerate(BETWEEN_SAVES):
        assert train_until_killed(recipe, tmp_path / f"cut{number}", place, count), place
        ends_as(whole, train(recipe, tmp_path / f"cut{number}"), 5)


@pytest.mark.long
@pytest.mark.needs("linux")
@pytest.mark.parametrize("place", ANYWHERE)
def test_wherever_a_run_that_samples_ahead_is_killed_it_ends_with_the_same_bytes(
    place: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = ahead_recipe(tiny_folder(), steps=5, groups=GroupsConfig(resample=1.0, replay=2, min_spread=0.3))
    whole, kills = train(recipe, tmp_path / "whole"), 0
    for count in range(1, 8):
        kills += train_until_killed(recipe, tmp_path / f"cut{count}", place, count)
        ends_as(whole, train(recipe, tmp_path / f"cut{count}"), 5)
    assert kills >= 2


def test_an_earlier_end_leaves_the_same_checkpoint(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """So that steps can be done again up to a checkpoint, and compared."""
    recipe = ahead_recipe(tiny_folder(), steps=4)
    whole, part = train(recipe, tmp_path / "whole"), tmp_path / "part"
    until = recipe.model_copy(update={"train": recipe.train.model_copy(update={"until": 2})})
    short = train(until, part)
    one, other = (run.checkpoint(2) / "trainer.json" for run in (whole, short))
    assert one.read_bytes() == other.read_bytes()


def test_its_steps_are_done_again_to_the_bit_and_a_fork_changes_nothing_in_it(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "letters.py").write_text(TASK)
    recipe = ahead_recipe(tiny_folder(), steps=4)
    recipe = recipe.model_copy(
        update={"task": recipe.task.model_copy(update={"name": f"{tmp_path}/letters.py:letters"})}
    )
    run = RunDir(tmp_path / "run")
    stages.train(recipe, run)
    again = replay(run, 4, quiet=True)
    assert (again.ok, again.exact, again.saved) == (True, (3, 4), (4,)), again.differences
    with pytest.raises(RecipeError, match="sampled ahead"):
        plan_fork(run, 2, {"train.lr": "1e-4"})
    assert plan_fork(run, 2, {}).until == 4


def test_what_goes_wrong_in_a_rollout_ahead_ends_the_run_and_leaves_no_thread(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    graded: list[str] = []

    def grade(prompt: Prompt, text: str) -> Grade:
        graded.append(text)
        if len(graded) > 20:  # in the second rollout, which is beside the first update
            raise TaskError("the grader is broken")
        return Grade(len(text))

    task = Task("broken", letters().prompts, grade)
    with pytest.raises(TaskError, match="grader is broken"):
        train(ahead_recipe(tiny_folder()), tmp_path / "run", task)
    assert lines_in(tmp_path / "run" / "metrics.jsonl") == 0, "the step beside which it happened is not logged"
    assert not threads_ahead()


def threads_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rollout ahead"]


def test_an_update_that_fails_leaves_no_thread_that_samples(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **options: Any) -> Any:
        assert threads_ahead(), "the next step is being sampled"
        raise DivergenceError("broken")

    def grade(prompt: Prompt, text: str) -> Grade:
        time.sleep(0.05)
        return Grade(len(text))

    monkeypatch.setattr("minigrpo.training.grpo.update_policy", fails)
    with pytest.raises(DivergenceError, match="broken"):
        train(ahead_recipe(tiny_folder()), tmp_path / "run", Task("slow", letters().prompts, grade))
    assert not threads_ahead()


def test_a_rollout_that_nobody_waits_for_ends_soon() -> None:
    ahead, asked = RolloutAhead(), threading.Event()

    def sample() -> Any:
        while True:
            asked.set()
            ahead.check()
            time.sleep(0.01)

    ahead.start(1, sample)
    asked.wait()
    began = time.monotonic()
    ahead.abandon()
    assert time.monotonic() - began < 5
    assert ahead.state() is None


def test_ahead_is_refused_where_it_cannot_be_done(tiny_folder: Callable[..., Path]) -> None:
    for wrong, told in (
        ({"objective.importance": "off"}, "rollout.ahead brings samples of an older policy"),
        ({"train.full": "true"}, "rollout.ahead samples while weights change"),
        ({"rollout.ahead": "2"}, "rollout.ahead"),
    ):
        with pytest.raises(RecipeError, match=told):
            load_recipe("quickstart", {"rollout.ahead": "1", **wrong})
    recipe = ahead_recipe(tiny_folder())
    policy = open_policy(recipe)
    engine = open_engine(policy, recipe)
    refuse_ahead(recipe, engine, Ranks())
    with pytest.raises(RecipeError, match="for one process"):
        refuse_ahead(recipe, engine, Ranks(0, 2))
    other = recipe.model_copy(update={"rollout": RolloutConfig(engine="transformers", ahead=1)})
    with pytest.raises(RecipeError, match="engine whose weights stay"):
        refuse_ahead(other, open_engine(policy, other), Ranks())
