"""The stages after training: what a whole run leaves beside its adapter, and what it could not make."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.pipeline import stages
from minigrpo.runs.manifest import seconds_of
from minigrpo.runs.rundir import RunDir, read_json
from tests.helpers.exported import model_folder

TASK = """
from minigrpo.types import Grade, Prompt, Task

def prompts(split):
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), str(i)) for i in range(6)]

def grade(prompt, text):
    share = sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))
    return Grade(share, {"even": share}, formed=len(text) > 1, solved=share > 0.5)

task = Task("even", prompts, grade)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("ending")
    (folder / "even.py").write_text(TASK)
    model_folder(folder / "model", "qwen2")
    sections: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "device": "cpu"},
        "lora": {"rank": 2, "alpha": 4},
        "task": {"name": f"{folder}/even.py:task"},
        "rollout": {"prompts": 2, "completions": 4, "max_tokens": 6},
        "train": {"steps": 2, "lr": 0.01, "tokens_per_pass": 512},
        "eval": {"limit": 4},
    }
    return Recipe(**sections)


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    return Recipe(**{**recipe.model_dump(), **sections})


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    """A whole run, made once; tests that change it copy it first."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "whole")
    return run, stages.run_all(recipe, run)


def copied(done: tuple[RunDir, dict[str, Any]], path: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(done[0].path, path)))


@pytest.mark.extra("gguf")
def test_a_run_ends_with_a_file_that_answers_and_a_summary_to_keep(done: tuple[RunDir, dict[str, Any]]) -> None:
    run, figures = done
    assert (run.gguf / "whole-Q8_0.gguf").is_file()
    assert [row["name"] for row in read_json(run.parity)["stages"][::2]] == ["base", "merged", "gguf Q8_0"]
    answer = figures["delivered"]["answer"]
    assert answer["question"]
    assert answer["engine"].startswith("llama.cpp")
    summary = run.summary.read_text(encoding="utf-8")
    for words in ("greedy", "gguf Q8_0", "proved", str(run.merged), "whole-Q8_0.gguf", "in all", "minigrpo serve"):
        assert words in summary
    assert seconds_of(run).keys() >= {"train", "evaluate", "check", "merge", "export", "question"}
    assert json.loads(json.dumps(figures)) == read_json(run.evals / "comparison.json")


@pytest.mark.extra("gguf")
def test_a_missing_artefact_is_made_again_and_no_other(
    done: tuple[RunDir, dict[str, Any]], recipe: Recipe, tmp_path: Path
) -> None:
    run = copied(done, tmp_path / "whole")
    file = run.gguf / "whole-Q8_0.gguf"
    file.unlink()
    before = {path: path.stat().st_mtime_ns for path in [*run.adapter.iterdir(), *run.merged.iterdir()]}
    stages.run_all(recipe, run, resume=True)
    assert file.is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.extra("gguf")
def test_proofs_that_were_lost_are_told_again_by_what_they_prove(
    done: tuple[RunDir, dict[str, Any]], recipe: Recipe, tmp_path: Path
) -> None:
    run = copied(done, tmp_path / "whole")
    before = read_json(run.parity)
    run.parity.unlink()
    stages.run_all(recipe, run, resume=True)
    assert read_json(run.parity) == before
    run.parity.write_text("{")
    with pytest.raises(ArtifactError, match=r"parity.json is damaged"):
        stages.run_all(recipe, run, resume=True)


def test_an_adapter_cut_short_is_told_on_resume_with_the_way_to_make_it_again(
    done: tuple[RunDir, dict[str, Any]], recipe: Recipe, tmp_path: Path
) -> None:
    run = copied(done, tmp_path / "whole")
    file = run.adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match=rf"was cut short: .* Or remove {run.adapter} and .*--resume"):
        stages.run_all(recipe, run, resume=True)
    shutil.rmtree(run.adapter)
    stages.run_all(recipe, run, resume=True)
    assert file.read_bytes() == whole


def test_formats_that_do_not_exist_are_refused_before_anything_begins(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(MinigrpoError, match="Q9 is not known"):
        stages.run_all(changed(recipe, export={"formats": "Q9"}), run)
    assert not run.path.exists()


def test_without_llama_cpp_the_road_says_so_at_both_ends_and_goes_on(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as if it were not installed
    run = RunDir(tmp_path / "run")
    figures = stages.run_all(recipe, run)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("pip install 'minigrpo[gguf]'") == 2
    assert figures["delivered"]["exported"] is None
    assert "xllamacpp is not installed" in figures["delivered"]["missing"][0]
    assert run.merged.is_dir()


@pytest.mark.extra("gguf")
def test_a_model_that_llama_cpp_cannot_read_is_told_and_merged_all_the_same(
    recipe: Recipe, tiny_folder: Any, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    model = recipe.model.model_dump() | {"path": str(tiny_folder("qwen2"))}  # its tokenizer is nobody's
    figures = stages.run_all(changed(recipe, model=model), run)
    assert figures["delivered"]["missing"][0].startswith("Not exported. ")
    assert run.merged.is_dir()
    assert "Not exported" in run.summary.read_text(encoding="utf-8")


@pytest.mark.extra("gguf")
def test_a_file_that_is_not_the_model_ends_the_run_with_a_refusal(
    done: tuple[RunDir, dict[str, Any]], recipe: Recipe, tmp_path: Path
) -> None:
    run = copied(done, tmp_path / "whole")
    file = run.gguf / "whole-Q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="put there or changed by somebody"):
        stages.run_all(recipe, run, resume=True)
