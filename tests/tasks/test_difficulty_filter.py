"""task.rates: prompts that are too hard or too easy are left out, whatever the task, and faults are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.errors import TaskError
from minigrpo.evaluation.evaluate import evaluate
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.runs.rundir import write_json
from minigrpo.tasks.builtin import gsm8k
from minigrpo.tasks.registry import open_task
from minigrpo.types import Sampling


def recipe(name: str = "wordproblems", **knobs: Any) -> Recipe:
    return Recipe.model_validate({"task": {"name": name, "size": 4, **knobs}})


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """Save rates of prompts solved 0, 1, 2 and 4 times of four."""
    prompts = open_task(recipe()).prompts("train")
    return saved(tmp_path, {prompt.id: right for prompt, right in zip(prompts, (0, 1, 2, 4), strict=True)})


def saved(folder: Path, rights: dict[str, int], **other: Any) -> Path:
    answers = [{"prompt": name, "solved": turn < right} for name, right in rights.items() for turn in range(4)]
    file = folder / "rates.json"
    write_json(file, {"split": "train", "task": "wordproblems", "scores": {"answers": answers}} | other)
    return file


@pytest.mark.parametrize(
    ("hardest", "easiest", "kept"),
    [(0.0, 1.0, [0, 1, 2, 3]), (0.1, 0.9, [1, 2]), (0.25, 0.5, [1, 2]), (0.3, 1.0, [2, 3]), (0.0, 0.0, [0])],
)
def test_prompts_outside_the_range_are_left_out(rates: Path, hardest: float, easiest: float, kept: list[int]) -> None:
    every = open_task(recipe()).prompts("train")
    chosen = open_task(recipe(rates=str(rates), hardest=hardest, easiest=easiest)).prompts("train")
    assert [every.index(prompt) for prompt in chosen] == kept


def test_the_test_split_is_left_alone(rates: Path) -> None:
    task = open_task(recipe(rates=str(rates), hardest=0.3, easiest=0.6))
    assert task.prompts("test") == open_task(recipe()).prompts("test")


def test_what_evaluate_saves_is_read(tmp_path: Path, tokenizer: Any) -> None:
    task = open_task(recipe("gsm8k", data=gsm8k.GENERATED_DATA))
    prompts = task.prompts("train")
    assert task.gold is not None
    right, wrong = task.gold(prompts[0]), "<think>a</think><answer>many</answer>"
    found = evaluate(
        Scripted([right, wrong], tokenizer),
        task,
        name="scripted",
        prompts=prompts,
        sampling=Sampling(1.0),
        tokenizer=tokenizer,
        n=2,
        split="train",
    )
    write_json(tmp_path / "rates.json", found.to_dict())
    kept = open_task(recipe("gsm8k", data=gsm8k.GENERATED_DATA, rates=str(tmp_path / "rates.json"), hardest=0.1))
    assert prompts[0].id in [prompt.id for prompt in kept.prompts("train")]
    assert len(kept.prompts("train")) < len(prompts)


def test_prompts_that_nobody_measured_are_left_out_and_said_so(tmp_path: Path) -> None:
    prompts = open_task(recipe()).prompts("train")
    file = saved(tmp_path, {prompts[0].id: 2, prompts[1].id: 2})
    with pytest.warns(UserWarning, match=r"does not know 2 of the 4 training prompts.*--limit 4"):
        assert open_task(recipe(rates=str(file))).prompts("train") == prompts[:2]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "is missing"),
        ("{", "is no JSON"),
        ("[]", "is no evaluation"),
        ("{}", "is no evaluation"),
        ('{"split": "train", "task": "wordproblems", "scores": {"answers": [{"prompt": 1}]}}', "is no evaluation"),
        ('{"split": "test", "task": "wordproblems", "scores": {"answers": []}}', "measured on the test split"),
        ('{"split": "train", "task": "echo", "scores": {"answers": []}}', "measured on the task echo"),
        ('{"split": "train", "task": "wordproblems", "scores": {"answers": []}}', "knows none of the 4 training"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "rates.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=told) as fault:
        open_task(recipe(rates=str(file))).prompts("train")
    assert str(file) in str(fault.value)


def test_a_range_that_leaves_nothing_is_refused(rates: Path) -> None:
    with pytest.raises(TaskError, match=r"Of 4 training prompts 3 are .*hardest 0\.6 and 1 more often"):
        open_task(recipe(rates=str(rates), hardest=0.6, easiest=0.9)).prompts("train")
    with pytest.raises(TaskError, match=r"task\.hardest 0\.5 is above task\.easiest 0\.1"):
        open_task(recipe(rates=str(rates), hardest=0.5, easiest=0.1))
    with pytest.raises(TaskError, match=r"no meaning without task\.rates"):
        open_task(recipe(easiest=0.9))


def test_rates_apply_to_a_custom_task(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(20)]
    (tmp_path / "mine.py").write_text(f"rows = {rows!r}\ndef score(completion, answer): return completion == answer\n")
    name = f"{tmp_path / 'mine.py'}:score"
    prompts = open_task(recipe(name)).prompts("train")
    file = saved(tmp_path, {prompt.id: place for place, prompt in enumerate(prompts)}, task="score")
    assert json.loads(file.read_text())["task"] == "score"
    chosen = open_task(recipe(name, rates=str(file), hardest=0.5)).prompts("train")
    assert [prompt.id for prompt in chosen] == [prompt.id for prompt in prompts[2:]]
