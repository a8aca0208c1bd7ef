"""The gsm8k task: where its questions come from, and how they are asked.

Tests on the real questions take their folder from MINIGRPO_GSM8K.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minigrpo.config.load import load_recipe, recipe_names
from minigrpo.config.schema import Recipe
from minigrpo.errors import TaskError
from minigrpo.tasks.builtin import gsm8k
from minigrpo.tasks.registry import open_task
from minigrpo.types import Prompt, Split

REAL = os.environ.get("MINIGRPO_GSM8K", "")

ROWS = [
    {"question": "Ada has 3 bags of 24 nuts. How many nuts?", "answer": "3*24=<<3*24=72>>72\n#### 72"},
    {"question": "A house costs $1,000 and a fence $200. What do both cost?", "answer": "Together $1,200.\n#### 1,200"},
    {"question": "It is 3 degrees and gets 8 colder. How warm is it?", "answer": "3-8=-5\n#### -5"},
    {"question": "Two share a cake. How much has each?", "answer": "Half.\n#### 0.5"},
]
TESTS = [{"question": "What is left of 9 after 2 are gone?", "answer": "9-2=7\n#### $7.00"}]

Recipes = Callable[..., Recipe]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", TESTS)
    return tmp_path


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def recipe(data: Path | str, **knobs: object) -> Recipe:
    return Recipe.model_validate({"task": {"name": "gsm8k", "data": str(data), **knobs}})


def tagged(answer: str) -> str:
    return f"<think>Let me see.</think>\n<answer>{answer}</answer>"


def test_a_folder_gives_both_splits_with_their_gold_numbers(folder: Path) -> None:
    task = open_task(recipe(folder))
    assert [prompt.target["answer"] for prompt in task.prompts("train")] == ["72", "1200", "-5", "1/2"]
    assert [prompt.target["answer"] for prompt in task.prompts("test")] == ["7"]
    assert [prompt.id for prompt in task.prompts("train")] == ["train-1", "train-2", "train-3", "train-4"]
    assert len(open_task(recipe(folder, size=2)).prompts("train")) == 2


def test_a_file_alone_is_divided(tmp_path: Path) -> None:
    write(tmp_path / "all.jsonl", ROWS + TESTS)
    task = open_task(recipe(tmp_path / "all.jsonl"))
    assert len(task.prompts("train")) + len(task.prompts("test")) == 5


def test_gold_is_a_worked_answer_that_earns_everything(folder: Path) -> None:
    task = open_task(recipe(folder))
    assert task.gold is not None
    prompts = task.prompts("train")
    assert task.gold(prompts[0]) == "<think>3*24=72</think><answer>72</answer>"
    assert all(task.grade(prompt, task.gold(prompt)).reward == 1.0 for prompt in prompts)


def test_a_worked_example_comes_on_demand_and_in_both_splits(folder: Path) -> None:
    plain, shown = open_task(recipe(folder)), open_task(recipe(folder, example=True))
    splits: tuple[Split, Split] = ("train", "test")
    for split in splits:
        for without, with_one in zip(plain.prompts(split), shown.prompts(split), strict=True):
            assert with_one.messages[-1] == without.messages[-1]
            assert with_one.messages[0]["content"] == gsm8k.SYSTEM_PROMPT_WITH_EXAMPLE
            assert without.messages[0]["content"] == gsm8k.GSM8K_SYSTEM_PROMPT
    example = gsm8k.SYSTEM_PROMPT_WITH_EXAMPLE[gsm8k.SYSTEM_PROMPT_WITH_EXAMPLE.rindex("<think>") :]
    assert shown.grade(Prompt("p", (), {"answer": "22"}), example).reward == 1.0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", r"train.jsonl:2 is no JSON"),
        ("[1]", r"train.jsonl:2 is \[1\], not a row"),
        ('{"question": "q"}', r"train.jsonl:2 has no text under 'answer'"),
        ('{"question": 3, "answer": "#### 3"}', r"train.jsonl:2 has no text under 'question'"),
        ('{"question": "q", "answer": "three"}', r"train.jsonl:2: its answer has no ####"),
        ('{"question": "q", "answer": "#### many"}', r"train.jsonl:2: its answer ends in 'many'"),
        ('{"question": "q", "answer": "#### 1,2"}', r"train.jsonl:2: its answer ends in '1,2'"),
        ('{"question": " ", "answer": "#### 1"}', r"train.jsonl:2: its prompt is empty"),
    ],
)
def test_a_faulty_line_is_named(folder: Path, line: str, told: str) -> None:
    (folder / "train.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{line}\n", encoding="utf-8")
    with pytest.raises(TaskError, match=told):
        open_task(recipe(folder)).prompts("train")


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is missing"):
        open_task(recipe("./nowhere")).prompts("train")
    with pytest.raises(TaskError, match="has no train file"):
        open_task(recipe(tmp_path)).prompts("test")


def test_without_network_the_way_out_is_named() -> None:
    plain = Recipe.model_validate({"task": {"name": "gsm8k"}})
    with pytest.raises(TaskError, match=r"could not be loaded from the Hub .*--task\.data FOLDER"):
        open_task(plain).prompts("test")


def test_the_hub_is_asked_for_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[object, ...]] = []

    def load(name: str, config: str, revision: str) -> dict[str, list[dict[str, str]]]:
        calls.append((name, config, revision))
        return {"train": ROWS, "test": TESTS}

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = open_task(Recipe.model_validate({"task": {"name": "gsm8k"}}))
    assert (len(task.prompts("train")), len(task.prompts("test"))) == (4, 1)
    assert calls == [("openai/gsm8k", "main", gsm8k.REVISION)]
    assert len(gsm8k.REVISION) == 40


def test_a_test_question_is_no_training_question(folder: Path) -> None:
    again = {**TESTS[0], "question": f" {TESTS[0]['question'].upper()}  "}
    write(folder / "train.jsonl", [ROWS[0], again, ROWS[0], ROWS[1]])
    with pytest.warns(UserWarning, match="2 questions were there before and are left out"):
        prompts = open_task(recipe(folder)).prompts("train")
    assert [prompt.id for prompt in prompts] == ["train-1", "train-4"]


def test_generated_questions_need_no_file_and_keep_their_sides() -> None:
    task = open_task(recipe(gsm8k.GENERATED_DATA, size=300))
    train, test = task.prompts("train"), task.prompts("test")
    assert (len(train), len(test)) == (300, 1000)
    assert not {gsm8k.question_key(prompt) for prompt in train} & {gsm8k.question_key(prompt) for prompt in test}
    assert task.gold is not None
    assert all(task.grade(prompt, task.gold(prompt)).reward == 1.0 for prompt in train)


def test_only_gsm8k_has_a_worked_example_and_data_of_its_own() -> None:
    with pytest.raises(TaskError, match=r"task\.example has no meaning for wordproblems"):
        open_task(Recipe.model_validate({"task": {"example": True}}))
    with pytest.raises(TaskError, match=r"task\.data has no meaning for wordproblems"):
        open_task(Recipe.model_validate({"task": {"data": "x.jsonl"}}))


def test_the_recipes_of_gsm8k_are_there_and_name_it() -> None:
    names = [name for name in recipe_names() if name.startswith("gsm8k-")]
    assert names == ["gsm8k-best", "gsm8k-cpu", "gsm8k-fast", "gsm8k-full", "gsm8k-tiny"]
    assert {load_recipe(name).task.name for name in names} == {"gsm8k"}
    assert load_recipe("gsm8k-tiny").task.data == gsm8k.GENERATED_DATA


# The real questions


@pytest.mark.env("MINIGRPO_GSM8K")
def test_every_real_gold_answer_earns_everything() -> None:
    task = open_task(recipe(REAL, size=10**6))
    train, test = task.prompts("train"), task.prompts("test")
    assert (len(train), len(test)) == (7473, 1319)
    for prompt in (*train, *test):
        assert task.gold is not None
        assert task.grade(prompt, task.gold(prompt)).reward == 1.0, prompt.id
        assert task.grade(prompt, tagged(f"${prompt.target['answer']}.0")).reward == 1.0


@pytest.mark.env("MINIGRPO_GSM8K")
def test_the_gold_text_of_every_real_row_earns_everything() -> None:
    task = open_task(recipe(REAL, size=10**6))
    for split in ("train", "test"):
        lines = (Path(REAL) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = task.prompts("train" if split == "train" else "test")
        for prompt, line in zip(prompts, lines, strict=True):
            gold = json.loads(line)["answer"].rpartition("####")[2]
            assert task.grade(prompt, tagged(gold)).reward == 1.0, prompt.id


@pytest.mark.env("MINIGRPO_GSM8K")
def test_no_real_training_question_is_in_the_test_split() -> None:
    task = open_task(recipe(REAL, size=10**6))
    train, test = ({gsm8k.question_key(prompt) for prompt in task.prompts(split)} for split in ("train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == (7473, 1319)
    assert not train & test


@pytest.mark.env("MINIGRPO_GSM8K")
@pytest.mark.long
def test_on_real_questions_the_embedded_model_keeps_the_form_and_every_group_ties(tmp_path: Path) -> None:
    line = ["preflight", "gsm8k-tiny", "--task.data", REAL, "--run", str(tmp_path / "run"), "--json"]
    ended = subprocess.run(
        [sys.executable, "-m", "minigrpo.cli.main", *line], capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 1, ended.stderr
    verdict = json.loads(ended.stdout)
    assert verdict["figures"]["formed"] > 0.3
    assert verdict["figures"]["informative"] == 0
    assert "the siblings earned the same reward" in verdict["reasons"][0]["what"]
