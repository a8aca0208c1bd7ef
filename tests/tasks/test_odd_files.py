"""Files of users that cannot be opened: whatever stands in them ends in a sentence that names the file and its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.errors import ArtifactError, TaskError
from minigrpo.evaluation.check_task import check_task
from minigrpo.tasks.common import dataset
from minigrpo.tasks.common.dataset import read_data
from minigrpo.tasks.custom import reward_task
from minigrpo.tasks.custom.judge_settings import read_judge_settings
from minigrpo.tasks.registry import open_task
from minigrpo.types import Task

ROWS = 'rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(4)]\n'
SCORE = "def score(completion):\n    return len(completion)\n"
FAULTS = ["SystemExit(0)", "KeyboardInterrupt()", "GeneratorExit()", "BaseException('why')", "RecursionError()"]


def opened(folder: Path, source: str, **knobs: Any) -> Task:
    (folder / "mine.py").write_text(source)
    return open_task(Recipe(task=TaskConfig(name=f"{folder}/mine.py:score", **knobs)))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "source",
    [
        "raise {}\n",
        SCORE + "def rows():\n    raise {}\n",
        SCORE + "def rows():\n    yield {{'prompt': 'x'}}\n    raise {}\n",
        "def score(recipe):\n    raise {}\n",
    ],
)
def test_whatever_a_file_raises_is_told_with_its_line(tmp_path: Path, source: str, fault: str) -> None:
    text = source.format(fault)
    line = text.splitlines().index(next(line for line in text.splitlines() if "raise" in line)) + 1
    with pytest.raises(TaskError, match=rf"mine\.py, line {line}: {fault.partition('(')[0]}"):
        opened(tmp_path, text)


def test_an_error_without_words_is_told_with_its_line(tmp_path: Path) -> None:
    text = "class Unspeakable(Exception):\n    def __str__(self):\n        raise ValueError\nraise Unspeakable\n"
    with pytest.raises(TaskError, match=r"mine\.py, line 4: Unspeakable: \(its text raised ValueError\)"):
        opened(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("system = 3", r"mine\.py: system is 3"),
        ("system = ' '", r"mine\.py: system is ' '"),
        ("system = '\\ud800'", r"mine\.py: system is '\\ud800'"),
        ("gold = 'x'", r"mine\.py: gold is 'x'"),
        ("rows = [3]", r"mine\.py: rows\[0\] is 3"),
        ("rows = None", r"mine\.py: rows is neither"),
        ("def score(completion, wishes): pass", r"mine\.py: The reward function score asks for 'wishes'"),
        ("score = ['judge:']", r"mine\.py: 'judge:' names nothing"),
    ],
)
def test_what_stands_beside_a_reward_is_refused_with_the_file(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        opened(tmp_path, f"{ROWS}{SCORE}{line}\n")


def test_rows_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_task, "MOST_PROMPTS", 100)
    with pytest.raises(TaskError, match=r"mine\.py: rows gives more than 100 rows"):
        opened(tmp_path, SCORE + "def rows():\n    while True:\n        yield {'prompt': 'x'}\n")


@pytest.mark.parametrize(
    ("gold", "told"),
    [
        ("return 3", "gave 3"),
        ("raise SystemExit(0)", "raised SystemExit"),
        ("return '\\ud800'", "gave half a character"),
    ],
)
def test_a_right_answer_that_is_none_is_told_with_its_prompt(tmp_path: Path, gold: str, told: str) -> None:
    task = opened(tmp_path, f"{ROWS}{SCORE}def gold(prompt):\n    {gold}\n")
    with pytest.raises(TaskError, match=rf"The `gold` of task score {told}.* on prompt train-1"):
        check_task(task, TaskConfig())


TASK = "from minigrpo import Grade, Task\nscore = Task('mine', {}, lambda prompt, text: Grade(0.0))\n"


@pytest.mark.parametrize("prompts", ["lambda split: 1 / 0", "lambda split: exit()", "3", "lambda split: None"])
def test_a_task_that_gives_no_prompts_is_named(tmp_path: Path, prompts: str) -> None:
    with pytest.raises(TaskError, match="task mine"):
        opened(tmp_path, TASK.format(prompts)).prompts("train")


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([10_000_000], pyarrow.date32()),
        pyarrow.array([2**62], pyarrow.timestamp("us")),
        pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Base")),
    ],
)
def test_values_that_python_cannot_hold_are_refused_with_the_file(tmp_path: Path, column: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"], "answer": column}), tmp_path / "rows.parquet")
    with pytest.raises(TaskError, match=r"rows\.parquet is no Parquet file that can be read"):
        read_data(str(tmp_path / "rows.parquet"))


CALL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"prompt": "x", "prompt": "y"}', "it names 'prompt' twice"),
        ('{"prompt": [{"role": "user", "content": "x", "content": "y"}]}', "it names 'content' twice"),
        (json.dumps({"prompt": [{"role": "\ud800", "content": "x"}]}), "half a character"),
        (json.dumps({"prompt": [{"role": "user", "content": "x", "name": "\ud800"}]}), "half a character"),
        (json.dumps({"prompt": [{"role": "assistant", "tool_calls": [{"name": "\ud800"}]}]}), "half a character"),
        (json.dumps({"prompt": [{"role": "assistant", "tool_calls": 3}]}), "its tool_calls are 3"),
        (json.dumps({"prompt": [{"role": "assistant", "tool_calls": CALL}]}), "its tool_calls are {'type'"),
        (json.dumps({"prompt": [{"role": "assistant", "tool_calls": ["add"]}]}), r"its tool_calls are \['add'\]"),
    ],
)
def test_a_row_that_no_template_could_write_is_refused_with_its_line(tmp_path: Path, row: str, told: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "z"}}\n{row}\n')
    with pytest.raises(TaskError, match=rf"rows\.jsonl:2.*{told}"):
        read_data(str(tmp_path / "rows.jsonl"))


def test_calls_that_json_cannot_hold_are_refused() -> None:
    rows = [{"prompt": [{"role": "assistant", "tool_calls": [{"name": {1}}]}]}]
    with pytest.raises(TaskError, match=r"rows\[0\]: its tool_calls are"):
        reward_task.reward_task(lambda completion: 1.0, rows=rows)


def test_a_folder_of_too_many_files_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_MOST_FILES", 3)
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.jsonl").write_text("")
    with pytest.raises(TaskError, match="holds more than 3 files"):
        read_data(str(tmp_path))


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "nul\0"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be looked at"):
        read_data(name)


def test_the_home_of_somebody_who_is_not_here_holds_nothing() -> None:
    with pytest.raises(TaskError, match="is missing"):
        read_data("~nobody-here/rows.jsonl")


@pytest.mark.parametrize("text", ["url: 2020-13-99", "calls: " + "9" * 5000, "[" * 5000, "\xff"])
def test_a_judges_file_that_is_no_yaml_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(TaskError, match=r"mine\.yaml is no YAML"):
        read_judge_settings(tmp_path / "mine.yaml")
