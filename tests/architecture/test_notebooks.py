"""The notebooks run from top to bottom, and what is printed there is for people: results, and refusals as sentences."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from minigrpo import notebook
from minigrpo.config.fields import field_table
from minigrpo.config.load import load_recipe
from minigrpo.errors import ArtifactError, MinigrpoError, RecipeError
from minigrpo.models.embedded import seedling
from tests.helpers.logged_runs import logged_run

pytestmark = pytest.mark.extra("notebook")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
COLAB, OWN, QUICKSTART, SUDOKU = (
    NOTEBOOKS[0].parent / f"{name}.ipynb" for name in ("gsm8k_colab", "own_task", "quickstart", "sudoku_colab")
)
PNG = b"\x89PNG\r\n"
STEPS, QUESTIONS = 3, 6

# What makes a run short; what it does stays the same.
KNOBS = {
    "train.steps": STEPS,
    "rollout.prompts": 2,
    "rollout.completions": 2,
    "rollout.max_tokens": 24,
    "task.size": 16,
    "save.every": 2,
    "lora.rank": 4,
}
# So hasty a model earns nothing but ties; the bonus moves it all the same, by more than Q8_0 rounds away.
MOVED = KNOBS | {"objective.entropy": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder to work in, and a cache with hastily built embedded models under the real ones' names."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("home")
    for path in ("seedling", seedling.CODER_PATH):
        real = seedling.parse_blueprint(path, seed=0)
        school = replace(real.school, steps=min(2, real.school.steps))
        seedling.build_seedling(
            replace(real, school=school, imitation=replace(real.imitation, steps=20)), cache / "hasty"
        )
        (cache / "hasty").rename(cache / f"seedling-{real.name}-{real.seed}-{seedling.fingerprint(real)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGRPO_CACHE", str(cache))
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.chdir(folder)
        yield folder


def with_parameters(path: Path, **values: object) -> Any:
    """The notebook with other values in the cell that has the tag `parameters`; a name that it lacks is refused."""
    book = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    names = re.findall(r"^(\w+) = ", cell.source, re.MULTILINE)
    assert values.keys() <= set(names)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    return book


def execute(book: Any, folder: Path) -> Any:
    return NotebookClient(book, timeout=250, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.fixture(scope="module")
def executed(home: Path) -> Any:
    tiny = {"RECIPE": "gsm8k-tiny", "RUN": "runs/tiny", "QUESTIONS": QUESTIONS, "DESPITE_PREFLIGHT": True}
    return execute(with_parameters(COLAB, **tiny, KNOBS=KNOBS), home)


@pytest.fixture(scope="module")
def sudoku(home: Path) -> Any:
    # Programs of so hasty a model all earn the same; the bonus gives it something to learn.
    brief = KNOBS | {"objective.entropy": 0.1, "sandbox.workers": 1}
    tiny = {"RECIPE": "sudoku-tiny", "RUN": "runs/play", "PUZZLES": 2, "DESPITE_PREFLIGHT": True}
    return execute(with_parameters(SUDOKU, **tiny, KNOBS=brief), home)


def outputs(book: Any, ident: str) -> list[Any]:
    (cell,) = [cell for cell in book.cells if cell.id == ident]
    return list(cell.outputs)


def words(found: list[Any]) -> str:
    """What a cell printed, which a kernel may send in pieces, and what it showed."""
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") + "\n" for out in found)


def images(found: list[Any]) -> list[bytes]:
    data = [out.get("data", {}).get("image/png") for out in found]
    return [base64.b64decode(image) for image in data if image]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_output_is_kept_in_a_notebook(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]


@pytest.mark.long
def test_the_notebook_for_colab_runs_from_top_to_bottom(executed: Any, home: Path) -> None:
    run = home / "runs/tiny"
    assert (run / "adapter/adapter_model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert json.loads((run / "preflight.json").read_text())["figures"]["groups"] >= 8
    assert [file.name for file in (run / "evals").glob("*.json")] == ["tiny-gsm8k-test.json"]


@pytest.mark.long
def test_the_notebook_for_sudoku_runs_from_top_to_bottom(sudoku: Any, home: Path) -> None:
    run = home / "runs/play"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert [file.name for file in (run / "evals").glob("*.json")] == ["play-sudoku-test.json"]
    assert json.loads((run / "check.json").read_text())["ok"], words(outputs(sudoku, "check"))
    assert (run / "merged/model.safetensors").is_file(), words(outputs(sudoku, "merge"))
    (image,) = images(outputs(sudoku, "train"))
    assert image == notebook.draw_png(notebook.read_steps(notebook.run_dir(run)), "runs/play", STEPS)
    assert images(outputs(sudoku, "resume")) == []


@pytest.mark.long
@pytest.mark.extra("gguf")
def test_the_quickstart_runs_from_the_machine_to_the_answer_of_the_file(home: Path) -> None:
    tiny = {"RECIPE": "quickstart", "RUN": "runs/quick", "QUESTIONS": QUESTIONS, "DESPITE_PREFLIGHT": True}
    book = execute(with_parameters(QUICKSTART, **tiny, KNOBS=MOVED), home)
    delivered(book, home / "runs/quick")
    assert re.search(r"after: +[\d.]+% right", words(outputs(book, "figures")))


@pytest.mark.long
@pytest.mark.extra("gguf")
def test_the_notebook_for_a_task_of_ones_own_runs_from_the_function_to_the_answer_of_the_file(home: Path) -> None:
    tiny = {"TASK": "letters.py:letters", "RUN": "runs/letters", "DESPITE_PREFLIGHT": True}
    book = execute(with_parameters(OWN, **tiny, KNOBS=MOVED), home)
    delivered(book, home / "runs/letters")
    assert "fit to train on" in words(outputs(book, "check-task"))
    shown = words(outputs(book, "group")).splitlines()
    assert re.fullmatch(r"Write \d+ small letters\.", shown[0])
    earned = [float(line.split()[0]) for line in shown[1:]]
    assert len(earned) == KNOBS["rollout.completions"]
    assert earned == sorted(earned, reverse=True)


def delivered(book: Any, run: Path) -> None:
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert (run / "merged/model.safetensors").is_file(), words(outputs(book, "merge"))
    assert list((run / "gguf").glob("*-Q8_0.gguf")), words(outputs(book, "export"))
    assert re.search(r"^answer: ", words(outputs(book, "ask")), re.MULTILINE)


def test_the_function_of_the_notebook_pays_for_small_letters_as_many_as_are_wanted() -> None:
    (cell,) = [cell for cell in nbformat.read(OWN, as_version=4).cells if cell.id == "task"]
    head, _, source = cell.source.partition("\n")
    assert head == "%%writefile letters.py"
    scope: dict[str, Any] = {}
    exec(compile(source, "letters.py", "exec"), scope)
    earned = [scope["letters"](text, wanted=4) for text in ("abcd", "abc", "abcdefgh", "Ab12", "")]
    assert earned == [1.0, 0.875, 0.5, -0.125, -0.5]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_is_python_and_every_knob_is_one(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    sources = {cell.id: cell.source for cell in book.cells if cell.cell_type == "code"}
    for ident, source in sources.items():
        compile(TransformerManager().transform_cell(source), ident, "exec")
    scope: dict[str, Any] = {}
    exec(sources["parameters"], scope)
    load_recipe(scope.get("RECIPE", "quickstart"), scope["KNOBS"])  # refuses what is no knob
    text = "\n".join(cell.source for cell in book.cells)
    assert set(re.findall(r'"([a-z_]+\.[a-z_]+)":', text)) <= {knob.name for knob in field_table()}


@pytest.mark.long
def test_the_notebook_for_sudoku_tells_of_locks_puzzles_programs_and_figures(sudoku: Any) -> None:
    assert "forbidden calls" in words(outputs(sudoku, "sandbox"))
    assert re.search(r"\d into row 0, column \d: ongoing after 1 move\n(\+-{7}){3}\+", words(outputs(sudoku, "puzzle")))
    assert words(outputs(sudoku, "question")).startswith("Sudoku with 2")
    for ident in ("winners", "cheats"):
        assert re.search(r"There is none|--- step \d", words(outputs(sudoku, ident)))
    assert re.search(r"after: +[\d.]+% win all  \[", words(outputs(sudoku, "figures")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_command_that_a_notebook_names_is_one_with_these_options(path: Path) -> None:
    from typer.testing import CliRunner

    from minigrpo.cli.main import app

    lines = [line.lstrip("!") for cell in nbformat.read(path, as_version=4).cells for line in cell.source.splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith("minigrpo ")]
    assert commands
    for verb, *rest in commands:
        told = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
        assert told.exit_code == 0, verb
        assert [word for word in rest if word.startswith("--") and word not in told.output] == []


@pytest.mark.long
def test_its_plot_is_one_image_that_followed_the_steps(executed: Any) -> None:
    (live,) = images(outputs(executed, "train"))
    (after,) = images(outputs(executed, "plot"))
    assert live.startswith(PNG)
    assert after.startswith(PNG)
    assert live == notebook.draw_png(notebook.read_steps(notebook.run_dir("runs/tiny")), "runs/tiny", STEPS)


@pytest.mark.long
def test_it_prints_what_preflight_found_and_both_accuracies(executed: Any) -> None:
    assert "the whole training" in words(outputs(executed, "preflight"))
    assert f"step {STEPS}/{STEPS}" in words(outputs(executed, "train"))
    told = words(outputs(executed, "figures"))
    assert re.search(r"before: +[\d.]+% right  \[[\d.]+%, [\d.]+%\]\n +after: +[\d.]+% right", told)


@pytest.mark.long
def test_what_is_installed_is_not_installed_again_and_the_command_line_is_at_hand(executed: Any) -> None:
    assert outputs(executed, "install") == []
    assert "torch" in words(outputs(executed, "machine"))


@pytest.mark.long
def test_the_same_cells_once_more_train_nothing_twice(executed: Any, home: Path) -> None:
    before = (home / "runs/tiny/metrics.jsonl").read_bytes()
    notebook.train(notebook.recipe("gsm8k-tiny", KNOBS), "runs/tiny", live=False, despite_preflight=True)
    assert (home / "runs/tiny/metrics.jsonl").read_bytes() == before


def test_a_mistake_is_a_sentence_in_the_notebook_and_stops_it(home: Path) -> None:
    book = with_parameters(COLAB, RECIPE="gsm8k-tiny", RUN="runs/slip", KNOBS={"lora.rnk": 4, "train.steps": -1})
    book.cells = [
        cell for cell in book.cells if cell.id in ("parameters", "preflight", "train") or cell.metadata.get("tags")
    ]
    with pytest.raises(CellExecutionError):
        execute(book, home)
    (fault,) = [out for out in outputs(book, "preflight") if out.output_type == "error"]
    told = "\n".join(fault.traceback)
    assert told.startswith("error: 2 mistakes:")
    assert "Did you mean lora.rank?" in told
    assert "Traceback" not in told
    assert ".py" not in told
    assert outputs(book, "train") == []


def test_training_does_not_begin_where_preflight_said_no(home: Path) -> None:
    hopeless = notebook.recipe("gsm8k-tiny", {**KNOBS, "rollout.max_tokens": 1})
    assert not notebook.preflight(hopeless, "runs/hopeless").go
    with pytest.raises(MinigrpoError, match="despite_preflight=True"):
        notebook.train(hopeless, "runs/hopeless", live=False)
    assert not (home / "runs/hopeless/recipe.yaml").exists()


def test_an_interrupted_cell_saves_says_so_and_goes_on_when_it_is_run_again(home: Path) -> None:
    train = f"train(recipe('gsm8k-tiny', {KNOBS | {'train.steps': 30, 'save.every': 50}!r}), 'runs/stopped')"
    stopping = f"""
import os, signal, threading, time
from pathlib import Path
from minigrpo.notebook import recipe, train
def stop():
    while not Path("runs/stopped/metrics.jsonl").exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop).start()
{train}
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (stopping, train)])
    book.cells[0].metadata["tags"] = ["raises-exception"]
    first, second = execute(book, home).cells
    (fault,) = [out for out in first.outputs if out.output_type == "error"]
    assert (fault.ename, fault.traceback) == ("KeyboardInterrupt", [notebook.STOPPED])
    (step,) = re.findall(r"Stopped after step (\d+) of 30", words(first.outputs))
    assert int(step) < 30
    assert "step 30/30" in words(second.outputs)
    steps = [row["step"] for row in notebook.read_steps(notebook.run_dir(home / "runs/stopped"))]
    assert steps == list(range(1, 31))


def test_a_refusal_keeps_its_kind_and_no_frame_in_which_a_model_could_live() -> None:
    with pytest.raises(RecipeError) as caught:
        notebook.recipe("gsm8k-tin")
    assert caught.value.__context__ is None
    assert {frame.name for frame in caught.traceback} <= {"wrapped", caught.traceback[0].name}


def test_what_is_not_there_is_named_with_the_call_that_makes_it(home: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no run\. Train first: train\(recipe, 'runs/none'\)"):
        notebook.evaluate("runs/none")
    with pytest.raises(ArtifactError, match="no step to draw"):
        notebook.plot("runs/none")
    with pytest.raises(ArtifactError, match="no answers"):
        notebook.show("runs/none")


def test_answers_are_shown_newest_first_once_each_with_what_they_earned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(text: str, **other: Any) -> dict[str, Any]:
        return {"text": text, "reward": 1.5, "parts": {"works": 1.0, "passed": 0.5}, "solved": True} | other

    cheat = answer("import os", reward=None, solved=False, notes={"cheats": "import"})
    groups = [[answer("one"), cheat], [answer("two"), answer("one")], [answer("two"), answer("three", solved=False)]]
    lines = [json.dumps({"step": step, "completions": rows}) for step, rows in enumerate(groups, 1)]
    (tmp_path / "groups.jsonl").write_text("\n".join([*lines, '{"step": 4, "comple']))
    notebook.show(tmp_path, solved=True)
    told = "--- step {}: reward 1.5, works 1, passed 0.5\n{}\n\n"
    assert capsys.readouterr().out == told.format(3, "two") + told.format(2, "one")
    notebook.show(tmp_path, note="cheats")
    cheated = "--- step 1: no reward could be told, works 1, passed 0.5\n    cheats: import\nimport os\n\n"
    assert capsys.readouterr().out == cheated
    notebook.show(tmp_path, count=1)
    assert capsys.readouterr().out == told.format(3, "three")
    notebook.show(tmp_path, note="odd")
    assert capsys.readouterr().out == "There is none among the answers of this training.\n"


def test_a_half_written_line_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.5}\n[1]\n{"step": 2, "reward": null}\n{"step": 3, "rew'
    )
    rows = notebook.read_steps(notebook.run_dir(tmp_path))
    assert [row["step"] for row in rows] == [1, 2]
    assert notebook.draw_png(rows, "half").startswith(PNG)
    assert notebook.draw_png([], "none yet", 10).startswith(PNG)


def test_the_plot_has_the_charts_of_the_view_with_their_titles_and_sentences(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from minigrpo.view.charts import CHARTS, sentence_of

    charts = {chart.id: chart for chart in CHARTS}
    drawn = Figure().subplots(1, len(notebook.PANELS))
    for axes, name in zip(drawn, notebook.PANELS, strict=True):
        notebook._draw_chart(axes, charts[name], [{"step": 1, "reward": 0.5}])
        assert axes.get_title() == charts[name].title
        assert axes.get_xlabel().replace("\n", " ") == sentence_of(charts[name].about)


def test_a_report_is_shown_in_a_cell_that_runs_no_script(tmp_path: Path) -> None:
    run = logged_run(tmp_path / "my", steps=4)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    shown = notebook.report(run).data
    assert shown.startswith("<div><iframe sandbox srcdoc=")
    assert "Right and well-formed" in shown
    assert "&lt;script" not in shown
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    with pytest.raises(ArtifactError, match="has no step to tell"):
        notebook.report(tmp_path)


def test_smoothing_is_a_mean_over_the_last_ten() -> None:
    assert notebook.smooth([]) == []
    assert notebook.smooth([float(i) for i in range(1, 13)])[-1] == sum(range(3, 13)) / 10
    assert notebook.smooth([1.0, 0.0])[:2] == [1.0, 0.5]


def test_without_the_extra_its_pip_line_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from minigrpo.notebook import recipe, train\n"
        f"train(recipe('gsm8k-tiny'), {str(tmp_path / 'run')!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "A plot needs matplotlib: pip install 'minigrpo[notebook]'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_module_is_imported_without_torch() -> None:
    script = "import sys, minigrpo.notebook; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]
