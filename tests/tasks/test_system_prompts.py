"""The system message of every prompt: the task's own, the user's, or an empty one that keeps the template's out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.load import dump_recipe, load_recipe
from minigrpo.models.chat_template import render
from minigrpo.pipeline import stages
from minigrpo.runs.rundir import RunDir
from minigrpo.tasks.registry import open_task

DEFAULT_SYSTEM = "Ask who wants what, and look it up."
ADDING_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}[S]{{ messages[0]['content'] }}[/S]{% set rest = messages[1:] %}"
    "{%- else %}[S]WORDS[/S]{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("WORDS", DEFAULT_SYSTEM)
"""A template that, like published ones, adds text of its own where a conversation has no system message."""


@pytest.mark.parametrize(
    ("flags", "opening"),
    [
        ([], f"[S]{DEFAULT_SYSTEM}[/S]"),
        ([("task.system", "null")], f"[S]{DEFAULT_SYSTEM}[/S]"),
        ([("task.system", "")], "[S][/S]"),
        ([("task.system", "Play.")], "[S]Play.[/S]"),
    ],
)
def test_the_system_prompt_is_that_of_the_recipe(make_tokenizer: Any, flags: Any, opening: str) -> None:
    tokenizer = make_tokenizer(ADDING_TEMPLATE)
    task = open_task(load_recipe("sudoku-ministral", [("task.size", "2"), *flags]))
    for split in ("train", "test"):
        read = tokenizer.decode(render(tokenizer, task.prompts(split)[0]).ids)  # type: ignore[arg-type]
        assert read.startswith(f"{opening}<|im_start|>user\nSudoku with")


def test_the_recipes_system_prompt_replaces_the_tasks_and_changes_nothing_else() -> None:
    plain = open_task(load_recipe("quickstart", {"task.size": 4}))
    told = open_task(load_recipe("quickstart", {"task.size": 4, "task.system": "Be brief."}))
    for before, after in zip(plain.prompts("test"), told.prompts("test"), strict=True):
        assert before.messages[0]["role"] == "system"
        assert after.messages == ({"role": "system", "content": "Be brief."}, *before.messages[1:])
        assert (after.id, after.target) == (before.id, before.target)


@pytest.mark.parametrize("words", [None, "", "null", 'Say "no": it\'s\n\tfine # or not', "  ", "~"])
def test_a_recipe_file_keeps_the_system_prompt_exactly(tmp_path: Path, words: str | None) -> None:
    shown = load_recipe("sudoku-tiny")
    shown = shown.model_copy(update={"task": shown.task.model_copy(update={"system": words})})
    (tmp_path / "mine.yaml").write_text(dump_recipe(shown), encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.yaml")) == shown


def test_training_preflight_and_evaluation_ask_with_the_same_words(tmp_path: Path, tiny_folder: Any) -> None:
    brief = {"rollout.prompts": 2, "rollout.completions": 2, "rollout.max_tokens": 4, "train.steps": 1, "lora.rank": 2}
    knobs = {"model.path": tiny_folder(), "task.system": "Be brief.", "task.size": 8, "train.threads": 1}
    recipe, run = load_recipe("quickstart", {**brief, **knobs}), RunDir(tmp_path / "run")
    stages.preflight(recipe, run)
    stages.train(recipe, run)
    stages.evaluate(str(run.path), limit=2)
    asked = [json.loads(line) for line in run.groups.read_text().splitlines()]
    asked += json.loads(next(run.evals.glob("*.json")).read_text())["scores"]["answers"]
    assert len(asked) == 4
    for answer in asked:
        assert [message["content"] for message in answer["messages"] if message["role"] == "system"] == ["Be brief."]
