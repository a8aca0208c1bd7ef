"""A chat template may write the date into prompts: a run says so when it begins, and when another day changed them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from minigrpo.config.schema import ModelConfig, Recipe
from minigrpo.models.policy import open_policy
from minigrpo.rollouts.engines.registry import open_engine
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.training.grpo import grpo
from minigrpo.types import Task
from tests.helpers.tiny import TEMPLATE, build_tokenizer

DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- 'Today is ' + date_string + '. ' }}" + TEMPLATE
)
BEGIN = "writes the date into the prompt"
CHANGED = "is other tokens than when this run began"


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the day of November 2026 that chat templates read."""

    def set_day(number: int) -> None:
        class Fixed(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Fixed:
                return cls(2026, 11, number, 23, 59)

        monkeypatch.setattr(chat_template_utils, "datetime", Fixed)

    set_day(28)
    return set_day


@pytest.fixture
def model(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that gives a model's folder a chat template."""
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))

    def with_template(template: str) -> Path:
        build_tokenizer(template).save_pretrained(folder)
        return folder

    return with_template


def train(run: RunDir, folder: Path, task: Task, steps: int, **options: Any) -> None:
    recipe = Recipe(
        model=ModelConfig(path=str(folder), template=options),
        rollout={"prompts": 1, "completions": 2, "max_tokens": 2},  # type: ignore[arg-type]
        train={"steps": steps, "tokens_per_pass": 512},  # type: ignore[arg-type]
        save={"every": 1},  # type: ignore[arg-type]
    )
    run.path.mkdir(exist_ok=True)
    policy = open_policy(recipe)
    grpo(recipe, task, policy, open_engine(policy, recipe), RunLogger(run, recipe.train.steps))


def test_a_run_says_once_that_its_prompts_tell_the_date_and_how_to_fix_it(
    model: Any, echo_task: Task, tmp_path: Path, day: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run, folder = RunDir(tmp_path / "run"), model(DATED)
    train(run, folder, echo_task, 2)
    told = capfd.readouterr().err
    assert told.count(BEGIN) == 1
    assert "--model.template.date_string" in told
    train(run, folder, echo_task, 3)  # resumed on the same day
    told = capfd.readouterr().err
    assert BEGIN not in told
    assert CHANGED not in told


def test_a_run_that_is_resumed_on_another_day_says_that_its_prompts_have_changed(
    model: Any, echo_task: Task, tmp_path: Path, day: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run, folder = RunDir(tmp_path / "run"), model(DATED)
    train(run, folder, echo_task, 1)
    capfd.readouterr()
    for tomorrow, steps in ((29, 2), (30, 3)):
        day(tomorrow)
        train(run, folder, echo_task, steps)
        told = capfd.readouterr().err
        assert told.count(CHANGED) == 1
        assert "its chat template writes the date into it" in told
        assert BEGIN not in told
    day(28)  # as when it began
    train(run, folder, echo_task, 4)
    assert CHANGED not in capfd.readouterr().err


@pytest.mark.parametrize("fixed", ["option", "template"])
def test_a_run_on_one_date_and_one_without_any_say_nothing(
    model: Any, echo_task: Task, tmp_path: Path, day: Any, capfd: pytest.CaptureFixture[str], fixed: str
) -> None:
    run, options = RunDir(tmp_path / "run"), {"date_string": "1 May 2026"} if fixed == "option" else {}
    folder = model(DATED if options else TEMPLATE)
    train(run, folder, echo_task, 1, **options)
    day(29)
    train(run, folder, echo_task, 2, **options)
    told = capfd.readouterr().err
    assert BEGIN not in told
    assert CHANGED not in told


def test_a_template_that_was_changed_between_two_sessions_is_told(
    model: Any, echo_task: Task, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    train(run, model(TEMPLATE), echo_task, 1)
    train(run, model("Answer. " + TEMPLATE), echo_task, 2)
    assert f"{CHANGED}: template, tokenizer or task have changed" in capfd.readouterr().err
