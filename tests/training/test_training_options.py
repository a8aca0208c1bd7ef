"""Every option through the whole loop: it trains, says what it did, and is resumed without a trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import DivergenceError, RecipeError
from minigrpo.models.chat_template import render
from minigrpo.models.policy import Policy, open_policy
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training import checkpoint
from minigrpo.training.grpo import grpo
from minigrpo.types import Grade, Prompt, Sampling, Task
from minigrpo.utils import signals


def letters(step: float = 0.25) -> Task:
    """Reward: the share of small letters, rounded so that siblings often tie. Even random weights can learn it."""

    def prompts(split: str) -> list[Prompt]:
        return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(20)]

    def grade(prompt: Prompt, text: str) -> Grade:
        share = sum(letter.islower() for letter in text) / 8
        short = float(len(text) < 8)
        rounded = round(share / step) * step
        return Grade(rounded + short, {"letters": rounded, "short": short}, solved=share > 0.4)

    return Task("letters", prompts, grade)


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    plain = {
        "model.path": folder,
        "lora.rank": 8,
        "lora.alpha": 16,
        "rollout.prompts": 3,
        "rollout.completions": 4,
        "rollout.max_tokens": 8,
        "train.steps": 6,
        "train.lr": 0.01,
        "train.tokens_per_pass": 90,
        "save.every": 2,
        "watch.explosion": 0,
    }
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return load_recipe(None, {**plain, **named})


def train(recipe: Recipe, run: RunDir, task: Task | None = None) -> Policy:
    policy = open_policy(recipe)
    run.path.mkdir(exist_ok=True)
    grpo(recipe, task or letters(), policy, open_engine(policy, recipe), RunLogger(run, recipe.train.steps))
    return policy


def stopped_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if somebody pressed Ctrl-C in the `count`-th step."""
    from contextlib import contextmanager

    asked = iter([False] * (count - 1) + [True] * 10)

    @contextmanager
    def finish_first() -> Any:
        yield lambda: next(asked)

    monkeypatch.setattr("minigrpo.training.supervisor.finish_first", finish_first)


def lines(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in rows]


OPTIONS: list[dict[str, Any]] = [
    {"objective__name": "gspo", "train__inner_epochs": 2, "objective__kl": 0.05, "objective__kl_unbiased": "true"},
    {"objective__name": "cispo", "objective__compare": "gdpo", "groups__resample": 2.0},
    {"objective__name": "sapo", "objective__entropy": 0.05, "objective__entropy_target": 5.0},
    {"objective__name": "bnpo", "objective__top_entropy": 0.4, "objective__mask_truncated": "true"},
    {"objective__name": "dapo", "objective__overlong": 4, "objective__clip_dual": 3.0, "objective__compare": "batch"},
    {"groups__replay": 2, "groups__resample": 1.0, "groups__rest": 0.9, "groups__focus": 2.0, "lora__dropout": 0.1},
    {"objective__importance": "sequence_mask", "objective__off_policy": 0.5, "eval__every": 2, "eval__held_out": 4},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k.rpartition('__')[2]}={v}" for k, v in o.items())
)
def test_a_run_with_it_resumes_without_a_trace(
    options: dict[str, Any], tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(tiny_folder(), **options)
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    straight = train(recipe, whole)
    with monkeypatch.context() as patch:
        stopped_after(3, patch)
        train(recipe, cut)
    assert len(lines(cut.metrics)) == 3
    resumed = train(recipe, cut)
    assert lines(cut.metrics) == lines(whole.metrics)
    assert cut.groups.read_bytes() == whole.groups.read_bytes()
    for one, two in zip(straight.trainable, resumed.trainable, strict=True):
        assert torch.equal(one, two)


def test_resampling_is_told_apart_from_progress(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_for(tiny_folder(), groups__resample=3.0), run, letters(step=1.0))
    logged = lines(run.metrics)
    assert sum(row["resample/tried"] for row in logged) > 0
    rows = [json.loads(line) for line in run.groups.read_text().splitlines()]
    for row in logged:
        sampled = [group for group in rows if group["step"] == row["step"]]
        assert len(sampled) == 3 + row["resample/tried"]


def test_the_overlong_penalty_is_a_part_of_the_reward_with_a_name(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    train(recipe_for(tiny_folder(), objective__overlong=6, train__steps=1), run)
    for group in [json.loads(line) for line in run.groups.read_text().splitlines()]:
        for one in group["completions"]:
            assert one["parts"]["overlong"] == pytest.approx(min(0.0, max(-1.0, (2 - one["tokens"]) / 6)))
            assert one["reward"] == pytest.approx(sum(one["parts"].values()))
    assert lines(run.metrics)[0]["rewards/overlong/mean"] < 0


def test_the_checkpoint_that_did_best_on_held_out_prompts_is_kept_and_taken(
    tiny_folder: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(
        tiny_folder(), eval__every=1, eval__held_out=4, save__keep=1, save__take="best", train__steps=6, train__lr=0.02
    )
    run = RunDir(tmp_path / "run")
    policy = train(recipe, run)
    logged = lines(run.metrics)
    best = max(logged, key=lambda row: (row["eval/accuracy"], row["eval/reward"], row["step"]))["step"]
    assert f"Taken: the weights of step {best}" in capfd.readouterr().err
    assert {int(folder.name) for folder in run.checkpoints.iterdir()} == {best, 6}
    again = open_policy(recipe)
    again.restore(checkpoint.find_step(run, best).folder)
    for one, two in zip(policy.trainable, again.trainable, strict=True):
        assert torch.equal(one, two)
    asked = {json.loads(line)["prompt"] for line in run.groups.read_text().splitlines()}
    assert len(asked) <= 16


def test_the_engine_that_is_handed_on_speaks_with_the_weights_that_were_taken(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Evaluation follows in the same process: it must judge what was delivered, not the last step."""
    recipe = recipe_for(tiny_folder(), eval__every=4, eval__held_out=4, save__take="best", train__lr=0.05)
    policy, run = open_policy(recipe), RunDir(tmp_path / "run")
    run.path.mkdir()
    engine = open_engine(policy, recipe)
    grpo(recipe, letters(), policy, engine, RunLogger(run, recipe.train.steps))
    asked = [render(policy.tokenizer, letters().prompts("train")[0])]
    fresh = open_engine(policy, recipe)
    fresh.update(policy)
    assert engine.generate(asked, 4, Sampling(1.0, 8, 0)) == fresh.generate(asked, 4, Sampling(1.0, 8, 0))


def test_a_step_that_looks_like_an_explosion_is_never_the_best(
    tiny_folder: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Held-out accuracy that leaps while training is in ruins: such steps have no checkpoint to be taken from."""
    calls = iter(range(10**6))

    def grade(prompt: Prompt, text: str) -> Grade:
        count = next(calls)
        if count < 48:  # three steps of twelve answers, and four held-out ones
            return Grade(float(count % 4))
        return Grade(-1.0 - 1e-9 * count, formed=False, solved=True)

    changes = {"eval__every": 1, "eval__held_out": 4, "save__take": "best", "save__every": 10}
    recipe = recipe_for(tiny_folder(), watch__explosion=20, watch__patience=20, **changes)
    train(recipe, RunDir(tmp_path / "run"), Task("ruined", letters().prompts, grade))
    assert "Taken: the weights of step 3" in capfd.readouterr().err


def test_a_run_without_any_step_has_a_checkpoint_so_a_full_disk_is_found_at_once(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    stopped_after(1, monkeypatch)
    train(recipe_for(tiny_folder()), run)
    assert [folder.name for folder in sorted(run.checkpoints.iterdir())] == ["000000", "000001"]


def test_an_explosion_ends_the_run_at_the_last_checkpoint_before_it(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The reward falls to nothing and every group ties once the third step is done: what too large a step does."""
    calls = iter(range(10**6))

    def grade(prompt: Prompt, text: str) -> Grade:
        count = next(calls)
        return Grade(float(count % 4), formed=True) if count < 36 else Grade(-1.0, formed=False)

    task = Task("ruined", letters().prompts, grade)
    run = RunDir(tmp_path / "run")
    recipe = recipe_for(tiny_folder(), train__steps=20, watch__explosion=20)
    with pytest.raises(DivergenceError, match=r"Training exploded: at step 4.*--train\.lr 0\.001 --run"):
        train(recipe, run, task)
    assert len(lines(run.metrics)) == 6
    found, _ = checkpoint.find_latest(run)
    assert found is not None
    assert found.step == 2


def test_keeping_aside_more_prompts_than_there_are_is_refused(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"eval\.held_out"):
        train(recipe_for(tiny_folder(), eval__every=2, eval__held_out=20), RunDir(tmp_path / "run"))


def test_a_finished_signal_handler_is_the_one_that_was_there() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    with signals.finish_first():
        pass
    assert signal.getsignal(signal.SIGINT) is before
