"""Where an evaluation may be written: only where nothing is, or over an earlier evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError
from minigrpo.pipeline.evaluate import evaluate, require_free, tell_where_fewer
from minigrpo.pipeline.tables import answer_panel
from minigrpo.runs.manifest import create_run, stamp
from minigrpo.runs.rundir import RunDir, write_json
from minigrpo.ui.screen import Screen

EVALUATION = {"scores": {}, "made": stamp("evaluate", Recipe())}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "mine")
    create_run(Recipe(), run)
    run.groups.write_text('{"step": 1}\n')
    run.metrics.write_text('{"step": 1}\n')
    write_json(run.evals / "comparison.json", {"comparisons": {}})
    return run


@pytest.mark.parametrize(
    "name",
    [
        *("recipe.yaml", "made.json", "groups.jsonl", "metrics.jsonl", "evals/comparison.json"),
        *("new.json", "adapter/new.json", "checkpoints/000001/new.json", "evals/deep/new.json"),
    ],
)
def test_an_evaluation_touches_none_of_a_runs_files(run: RunDir, name: str) -> None:
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(ArtifactError, match=r"among the files of the run|is no evaluation"):
        evaluate("no/model", Recipe(), out=run.path / name, quiet=True)
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


def test_a_link_to_a_runs_file_is_seen_through(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "mine.json").symlink_to(run.groups)
    (run.evals / "other.json").symlink_to(run.groups)
    for file in (tmp_path / "mine.json", run.evals / "other.json"):
        with pytest.raises(ArtifactError, match="among the files of the run"):
            require_free(file)


@pytest.mark.parametrize("text", ["", "my thesis", "[]", "{}", '{"made": {"verb": "merge"}, "scores": {}}'])
def test_a_file_of_the_users_is_not_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "thesis.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=r"thesis\.json is no evaluation.*--out FILE"):
        evaluate("no/model", Recipe(), out=file, quiet=True)
    assert file.read_text() == text
    with pytest.raises(ArtifactError, match="is no evaluation"):
        require_free(tmp_path)


def test_a_new_file_and_an_earlier_evaluation_are_free(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("about: mine, beside my files: no run\n")
    for file in (tmp_path / "new.json", tmp_path / "deep" / "new.json", run.evals / "new.json"):
        require_free(file)
        write_json(file, EVALUATION)
        require_free(file)
    assert json.loads((run.evals / "new.json").read_text())["made"]["verb"] == "evaluate"


@pytest.mark.parametrize(
    ("target", "shown"), [("5", ", target 5"), ({"answer": "5"}, ", target 5"), ({}, ""), (None, "")]
)
def test_an_answer_is_shown_with_its_target_where_it_has_one(target: Any, shown: str) -> None:
    answer = {"prompt": "2 + 3?", "text": "6", "solved": False, "formed": True, "finish": "stop", "reward": 0.5}
    body = str(answer_panel(answer | {"target": target}, "wrong").renderable)
    assert body == f"2 + 3?\n→ 6\nwrong: reward 0.5{shown}"


@pytest.mark.parametrize(("limit", "told"), [(12, True), (11, False), (None, False)])
def test_that_a_task_has_fewer_prompts_than_were_asked_for_is_said(
    limit: int | None, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_where_fewer(Screen(), 11, "test", limit)
    assert ("The task has 11 test prompts: all of them are asked." in capsys.readouterr().out) is told
