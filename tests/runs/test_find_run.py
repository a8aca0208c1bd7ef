"""From a path to the run that it belongs to: one answer for every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from minigrpo.delivery.artifacts.source import source_of
from minigrpo.delivery.gguf.export import export_job
from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import RunDir, find_run

HOMES = ["runs/mine", "./runs/mine", "{here}/runs/mine", "runs/other/../mine"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with a recipe and nothing else, named from the folder where the user stands."""
    monkeypatch.chdir(tmp_path)
    run = RunDir(Path("runs/mine"))
    run.path.mkdir(parents=True)
    run.path.with_name("other").mkdir()
    run.recipe.write_text("seed: 9\n", encoding="utf-8")
    return run


@pytest.mark.parametrize("home", HOMES)
def test_every_artefact_of_a_run_is_named_and_the_run_is_spelled_as_the_user_spelled_it(
    run: RunDir, tmp_path: Path, home: str
) -> None:
    own = RunDir(Path(home.format(here=tmp_path)))
    kinds = {
        own.path: "run",
        own.adapter: "adapter",
        own.model: "model",
        own.merged: "merged",
        own.warmup: "warmup",
        own.gguf: "gguf",
        own.gguf / "mine-Q8_0.gguf": "gguf file",
        own.checkpoint(100): "checkpoint",
        own.checkpoints: "other",
        own.checkpoints / "000100.exploded": "other",
        own.gguf / "made.json": "other",
        own.evals: "other",
    }
    for path, kind in kinds.items():
        found = find_run(str(path))
        assert found is not None
        assert (found.run, found.artefact) == (own, kind)
        assert find_run(path) == find_run(RunDir(path)) == found


def test_what_lies_deeper_or_elsewhere_belongs_to_no_run(run: RunDir) -> None:
    paths = [run.merged / "config.json", run.evals / "a.json", run.checkpoint(1) / "adapter_model.safetensors"]
    for path in [*paths, run.path.parent, run.path.with_name("other"), Path("me/model"), Path("/"), Path(".."), Path()]:
        assert find_run(path) is None


@pytest.mark.parametrize(
    ("folder", "path", "kind"),
    [
        (".", ".", "run"),
        (".", "adapter", "adapter"),
        ("adapter", ".", "adapter"),
        ("adapter", "..", "run"),
        ("adapter", "../merged", "merged"),
        ("gguf", "mine-Q8_0.gguf", "gguf file"),
        ("checkpoints/000100", "", "checkpoint"),
    ],
)
def test_a_user_who_stands_inside_a_run_is_understood(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, folder: str, path: str, kind: str
) -> None:
    (run.path / folder).mkdir(parents=True, exist_ok=True)
    home = run.path.absolute()
    monkeypatch.chdir(run.path / folder)
    found = find_run(path)
    assert found is not None
    assert (found.run.path.resolve(), found.artefact) == (home, kind)


def test_the_home_folder_is_understood(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_run("~/runs/mine/adapter")
    assert found is not None
    assert found.run.path == tmp_path / "runs/mine"


def test_only_results_stand_for_their_run_when_it_is_checked_or_merged(run: RunDir) -> None:
    """A warm-up's adapter has not been trained with GRPO: it is looked at for itself."""
    run.adapter.mkdir()
    assert source_of(run.adapter) == source_of(run)
    assert source_of(run.model) == source_of(run)
    for path in (run.warmup, run.checkpoint(100)):
        path.mkdir(parents=True)
        with pytest.raises(ArtifactError, match=f"adapter_config.json is missing, so {path} is no adapter"):
            source_of(path)


def test_a_merged_model_is_exported_as_its_run_is(run: RunDir) -> None:
    """Both are refused in the same words: it is the run's own seal that is looked for."""
    run.merged.mkdir()
    (run.merged / "config.json").write_text("{}", encoding="utf-8")
    for path in (run.path, run.merged):
        with pytest.raises(ArtifactError, match=r"merged holds no made\.json.*Move it away.*minigrpo merge runs/mine"):
            export_job(path, out=None, llama_cpp=None, writer="own")
