"""Attacks with a trained cheater: it learns what pays without the question, and nothing where nothing does."""

import math
from pathlib import Path

import pytest

from minigrpo.config.load import load_recipe
from minigrpo.pipeline import attack
from minigrpo.pipeline.attack import attack_task
from tests.helpers.planted import planted_recipe

# Random weights write noise; a grader that pays for small letters pays for more of them.
TASK = """
from minigrpo.tasks.common.rewards import Reward, graded
from minigrpo.types import Prompt, Task

def prompts(split):
    numbers = range(24) if split == "train" else range(50, 74)
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), str(i)) for i in numbers]

def right(prompt, text):
    return float(text.strip() == prompt.target)

def small(prompt, text):
    return WEIGHT * sum(letter.islower() for letter in text) / 8

rewards = (Reward("right", 1.0, right), Reward("small", 1.0, small))

def grade(prompt, text):
    return graded(rewards, prompt, text, formed=True, solved=right(prompt, text) == 1)

task = Task("letters", prompts, grade, GOLD)
"""


def recipe_of(folder: Path, model: Path, weight: float, gold: str = "lambda prompt: prompt.target"):
    file = folder / f"letters{abs(hash((weight, gold)))}.py"
    file.write_text(TASK.replace("WEIGHT", str(weight)).replace("GOLD", gold))
    knobs = {"lora.rank": 8, "lora.alpha": 16, "rollout.max_tokens": 8, "train.lr": 0.02, "train.tokens_per_pass": 2048}
    return load_recipe(None, {"model.path": str(model), "task.name": f"{file}:task", "model.device": "cpu", **knobs})


def test_a_cheater_learns_what_pays_without_the_question_and_leaves_nothing_behind(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(attack.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found = attack_task(recipe_of(tmp_path, tiny_folder("qwen2"), 1.0), steps=20)
    way = next(way for way in found.exploits if way.name == "a model, trained without the question")
    assert way.parts.keys() == {"small"}
    assert way.examples[0][1] > 0.3
    assert found.steps == 20
    assert found.hidden == ({"role": "user", "content": "say ..."},)
    assert list((tmp_path / "temporary").glob("minigrpo*")) == []


def test_where_only_the_right_answer_pays_a_cheater_finds_nothing(tiny_folder, tmp_path):
    found = attack_task(recipe_of(tmp_path, tiny_folder("qwen2"), 0.0), steps=20)
    assert [way.name for way in found.exploits if not way.name.startswith("copied")] == []
    assert (found.steps, found.trained.value) == (20, pytest.approx(0, abs=0.02))


def test_without_right_answers_the_models_own_stand_for_them(tiny_folder, tmp_path):
    found = attack_task(recipe_of(tmp_path, tiny_folder("qwen2"), 1.0, gold="None"), steps=0)
    assert (found.right, found.solving) == (False, None)
    assert found.chance.value > 0
    assert math.isfinite(found.shuffled)


@pytest.mark.long
@pytest.mark.parametrize("name", ["tagged", "lengthy", "sayable"])
def test_the_embedded_model_learns_each_planted_weakness(tmp_path, name):
    found = attack_task(planted_recipe(tmp_path, name))
    assert "a model, trained without the question" in [way.name for way in found.exploits]
    assert found.seconds < 300


@pytest.mark.long
@pytest.mark.timeout(1800)  # the embedded coder may have to be built first
@pytest.mark.parametrize(("name", "steps"), [("quickstart", 60), ("gsm8k-tiny", 60), ("sudoku-tiny", 20)])
def test_no_cheater_is_paid_by_the_tasks_of_the_package(name, steps):
    found = attack_task(load_recipe(name), steps=steps)
    assert found.exploits == ()
