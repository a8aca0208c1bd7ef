"""Trackers get the figures under their own names and the completions as a table; they can neither stop nor slow a run,
and no secret reaches them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe, TrackConfig
from minigrpo.errors import MinigrpoError, RecipeError
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.manifest import flat
from minigrpo.runs.rundir import RunDir
from minigrpo.runs.trackers.tracking import MOST_ROWS, MOST_WAITING, Tracking, require_trackers
from tests.helpers.trackers import FAKES, Calls, as_text, everything_written
from tests.runs.test_run_logger import a_group, seen, watched

SECRET = "hf_plantedplantedplantedplantedplanted"
NAMES = tuple(FAKES)


def knobs_of(recipe: Recipe) -> dict[str, Any]:
    return flat(recipe.model_dump(mode="json", exclude={"about"}))


def tracked(folder: Path, to: str, steps: Sequence[int], *, recipe: Recipe | None = None, **options: Any) -> str:
    """Log steps of a run with trackers, and return what was said."""
    config = TrackConfig(to=to, offline=True, project="tests")
    console = watched(width=400)
    tracking = Tracking(RunDir(folder), config, knobs_of(recipe or Recipe()), **options)
    with RunLogger(RunDir(folder), 99, console=console, tracking=tracking) as logger:
        for step in steps:
            logger.record(step, {"reward": step / 10, "completions/mean_length": 3.0}, [a_group()], [[1.0, -1.0]])
    return seen(console)


@pytest.mark.parametrize("name", NAMES)
def test_each_tracker_gets_figures_under_their_names_and_a_table(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Calls = []
    FAKES[name](monkeypatch, calls)
    tracked(tmp_path / "my", name, range(1, 12))
    figures = [call for kind, call in calls if kind == "figure"]
    assert (3, "reward", 0.3) in figures
    assert (11, "completions/mean_length", 3.0) in figures
    tables = [call for kind, call in calls if kind == "completions"]
    assert len(tables) == 2  # steps 1 and 10
    assert "<answer>7</answer>" in as_text(tables).replace("&lt;", "<")
    assert [kind for kind, _ in calls][-1] == "close"


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_continued_where_it_was(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    FAKES[name](monkeypatch, calls)
    tracked(tmp_path / "my", name, [1, 2])
    known = json.loads((tmp_path / "my/tracking/runs.json").read_text())[name]
    tracked(tmp_path / "my", name, [3])
    second = [call for kind, call in calls if kind == "open"][1]
    assert second.get("known", known) == known
    if name == "tensorboard":
        assert second["purge"] == 3


@pytest.mark.parametrize("name", NAMES)
def test_what_a_kill_kept_from_a_tracker_is_sent_when_the_run_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Calls = []
    FAKES[name](monkeypatch, calls)
    tracked(tmp_path / "my", name, [1, 2])
    tracked(tmp_path / "my", "", [3, 4])  # logged, and not sent
    tracked(tmp_path / "my", name, [5])
    tracked(tmp_path / "my", name, [6])  # nothing is sent twice
    rewards = [call for kind, call in calls if kind == "figure" and call[1] == "reward"]
    assert rewards == [(step, "reward", step / 10) for step in range(1, 7)]


def test_a_database_that_a_kill_left_half_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAKES["mlflow"](monkeypatch, [])
    database = tmp_path / "my/tracking/mlflow.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"half")
    tracked(tmp_path / "my", "mlflow", [1])
    assert not database.exists()  # the real library would have made it anew
    database.write_bytes(b"whole")
    tracked(tmp_path / "my", "mlflow", [2])
    assert database.read_bytes() == b"whole"


@pytest.mark.parametrize("name", NAMES)
def test_no_secret_of_the_environment_or_of_a_path_is_sent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Calls = []
    FAKES[name](monkeypatch, calls)
    tracked(tmp_path / "my", name, [1], recipe=secret_recipe(tmp_path, monkeypatch))
    assert SECRET not in as_text(calls)
    assert "model.path" in as_text(calls) or name == "tensorboard"


def secret_recipe(folder: Path, patch: pytest.MonkeyPatch) -> Recipe:
    """A recipe in a folder whose name is a secret, which names a model there; and a knob that holds another."""
    patch.setenv("HF_TOKEN", SECRET)
    patch.setenv("ANY_API_KEY", f"{SECRET}-too")
    home = folder / SECRET
    (home / "model").mkdir(parents=True)
    (home / "my.yaml").write_text(f"model: {{path: {home}/model}}\ntask: {{system: 'say {SECRET}-too'}}\n")
    patch.setattr("sys.argv", ["minigrpo", "train", str(home / "my.yaml")])
    return load_recipe(str(home / "my.yaml"))


class Broken:
    """A tracker that fails at `where`."""

    def __init__(self, where: str) -> None:
        self._where = where

    def _fail_in(self, where: str) -> None:
        if where == self._where:
            raise RuntimeError(f"no network in {where}")

    def open(self, run: Any) -> str:
        self._fail_in("open")
        return "me"

    def log(self, step: int, figures: Any, table: Any) -> None:
        self._fail_in("log")

    def close(self) -> None:
        self._fail_in("close")


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Calls = []
    FAKES["mlflow"](monkeypatch, calls)
    from minigrpo.runs.trackers.adapters import ADAPTERS

    adapters = {**ADAPTERS, "wandb": lambda: Broken(where)}
    told = tracked(tmp_path / "my", "wandb,mlflow", range(1, 6), adapters=adapters)
    assert told.count("The tracker wandb failed") == 1
    assert f"no network in {where}" in told
    assert len([call for kind, call in calls if kind == "figure"]) == 10
    assert len((tmp_path / "my/metrics.jsonl").read_text().splitlines()) == 5


class Stuck(Broken):
    """A tracker that never answers."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__("")
        self._go = go

    def log(self, step: int, figures: Any, table: Any) -> None:
        self._go.wait(30)


def test_a_tracker_that_hangs_neither_slows_a_step_nor_holds_the_end(tmp_path: Path) -> None:
    go = threading.Event()
    start = time.monotonic()
    steps = range(1, MOST_WAITING + 20)
    told = tracked(tmp_path / "my", "wandb", steps, adapters={"wandb": lambda: Stuck(go)}, closing=0.2)
    spent = time.monotonic() - start
    go.set()
    assert spent < 20  # one step waits for 30
    assert told.count("steps behind") == 1
    assert "still sending 0.2 seconds after" in told
    assert len((tmp_path / "my/metrics.jsonl").read_text().splitlines()) == len(steps)


def test_of_a_large_step_the_first_completions_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    FAKES["wandb"](monkeypatch, calls)
    tracking = Tracking(RunDir(tmp_path), TrackConfig(to="wandb", offline=True), {})
    with RunLogger(RunDir(tmp_path), 9, console=watched(), tracking=tracking) as logger:
        logger.record(1, {"reward": 0.5}, [a_group()] * 100, [[1.0, -1.0]] * 100)
    [table] = [call[2] for kind, call in calls if kind == "completions"]
    assert len(table["data"]) == MOST_ROWS


def test_an_unknown_tracker_and_one_that_is_not_installed_are_named() -> None:
    with pytest.raises(RecipeError, match=r"track\.to names no tracker mlfow"):
        load_recipe("quickstart", {"track.to": "tensorboard, mlfow"})
    with pytest.raises(MinigrpoError, match=r"pip install 'minigrpo\[nothing\]'"):
        require_trackers(TrackConfig.model_construct(to="nothing"))


def test_without_trackers_no_thread_is_begun_and_nothing_is_written(tmp_path: Path) -> None:
    before = threading.active_count()
    tracking = Tracking(RunDir(tmp_path), TrackConfig(), {})
    tracking.begin(0, print)
    assert threading.active_count() == before
    tracking.send(1, {}, [])
    tracking.end()
    assert not any(tmp_path.iterdir())


# ---- with the real libraries


def really_tracked(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Track a run in two sittings, of which the second does step 3 again, in an environment with secrets."""
    run = folder / "my"
    recipe = secret_recipe(folder, patch)
    for variable, place in (("TRACKIO_DIR", "trackio"), ("WANDB_CACHE_DIR", "cache"), ("WANDB_CONFIG_DIR", "config")):
        patch.setenv(variable, str(folder / "written" / place))
    for steps in ([1, 2, 3], [3, 10]):
        lines = (run / "metrics.jsonl").read_text().splitlines() if run.exists() else []
        if lines:
            (run / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
        told = tracked(run, name, steps, recipe=recipe, closing=120)
        assert "failed" not in told, told
    assert SECRET.encode() not in everything_written(run)
    assert not (folder / "written").exists() or SECRET.encode() not in everything_written(folder / "written")
    return run


@pytest.mark.long
@pytest.mark.extra("tensorboard")
def test_tensorboard_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = really_tracked("tensorboard", tmp_path, monkeypatch)
    found = EventAccumulator(str(run / "tracking/tensorboard")).Reload()
    assert [(each.step, round(each.value, 3)) for each in found.Scalars("reward")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (10, 1.0),
    ]
    assert "completions/text_summary" in found.Tags()["tensors"]


@pytest.mark.long
@pytest.mark.extra("mlflow")
def test_mlflow_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    run = really_tracked("mlflow", tmp_path, monkeypatch)
    client = MlflowClient(f"sqlite:///{run / 'tracking/mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.data.params["model.path"] == "model"
    assert {each.step for each in client.get_metric_history(found.info.run_id, "reward")} == {1, 2, 3, 10}
    assert client.get_metric_history(found.info.run_id, "completions/mean_length")
    tables = sorted((run / "tracking/mlflow").rglob("completions/*.json"))
    assert [table.name for table in tables] == ["000001.json", "000010.json"]
    assert json.loads(tables[1].read_text())["data"][0][:4] == [10, "3 + 4?", "<answer>7</answer>", 1.0]


@pytest.mark.long
@pytest.mark.extra("trackio")
def test_trackio_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = really_tracked("trackio", tmp_path, monkeypatch)
    name = json.loads((run / "tracking/runs.json").read_text())["trackio"]
    import trackio

    [found] = list(trackio.Api().runs("tests"))
    assert found.name == name


@pytest.mark.long
@pytest.mark.extra("wandb")
def test_wandb_keeps_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = really_tracked("wandb", tmp_path, monkeypatch)
    files = list((run / "tracking/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2  # one a sitting, both of the same run
    assert b"mean_length" in b"".join(file.read_bytes() for file in files)
    name = json.loads((run / "tracking/runs.json").read_text())["wandb"]
    assert all(name in file.name for file in files)
