"""All stages on a two-layer model, one after the other; what a resumed run repeats; and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import minigrpo
from minigrpo.cli import main
from minigrpo.config.load import dump_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, MinigrpoError, ModelError, TaskError
from minigrpo.pipeline import stages
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.manifest import create_run, flat, read_sealed, seconds_of, stamp, write_sealed
from minigrpo.runs.rundir import RunDir, read_json

# The model's outputs are noise, but noise with more or fewer even tokens: something that can be compared and learned.
TASK = """
from minigrpo.types import Grade, Prompt, Task

def prompts(split):
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), str(i)) for i in range(SIZE)]

def grade(prompt, text):
    share = sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))
    return Grade(share, {"even": share}, formed=len(text) > 1, solved=share > 0.5)

task = Task("even", prompts, grade)
"""


@pytest.fixture(scope="module")
def make_recipe(tiny_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("tasks") / "even.py"
    file.write_text(TASK.replace("SIZE", "8"))

    def make(steps=2, **changes):
        sections = {
            "model": {"path": str(tiny_folder("qwen2")), "device": "cpu"},
            "lora": {"rank": 2, "alpha": 4},
            "task": {"name": f"{file}:task"},
            "rollout": {"prompts": 2, "completions": 4, "max_tokens": 6},
            "train": {"steps": steps, "lr": 0.01, "tokens_per_pass": 512},
            "eval": {"limit": 5},
        }
        for name, section in changes.items():
            sections[name] = sections.get(name, {}) | section if isinstance(section, dict) else section
        return Recipe(**sections)

    return make


@pytest.fixture(scope="module")
def done(make_recipe, tmp_path_factory):
    """A whole run, made once; tests that change it copy it first."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "whole")
    return run, stages.run_all(make_recipe(), run)


def test_the_whole_road_leaves_every_artefact_with_its_stamp(done):
    run, _ = done
    for artefact in (run.preflight, run.check, run.adapter / "made.json", run.evals / "tuned-even-test.json"):
        data = read_json(artefact)
        assert {"verb", "versions", "from"} <= (data.get("made") or data).keys()
    rows = read_json(run.parity)["stages"]
    assert [row["name"] for row in rows] == ["base", "base, other texts", "merged", "merged, other texts"]
    assert all(row["ok"] for row in rows)
    assert len(run.metrics.read_text().splitlines()) == 2


def test_both_sides_answer_the_same_prompts_with_the_same_decoding(done):
    run, figures = done
    for suffix in ("", "-t1"):
        base, tuned = (read_json(run.evals / f"{side}-even-test{suffix}.json") for side in ("base", "tuned"))
        assert base["sampling"] == tuned["sampling"]
        assert [a["prompt"] for a in base["scores"]["answers"]] == [a["prompt"] for a in tuned["scores"]["answers"]]
    assert figures["comparisons"].keys() == {"greedy", "temperature 1"}
    assert json.loads(json.dumps(figures)) == read_json(run.evals / "comparison.json")


def test_the_base_is_the_model_without_its_adapter(done, make_recipe, tmp_path):
    run, _ = done
    alone = stages.evaluate(make_recipe().model.path, make_recipe(), out=tmp_path / "base.json", quiet=True)
    texts = [answer["text"] for answer in read_json(tmp_path / "base.json")["scores"]["answers"]]
    kept = [answer["text"] for answer in read_json(run.evals / "base-even-test.json")["scores"]["answers"]]
    assert texts == kept
    assert alone["model"]["scores"]["accuracy"]["count"] == 5


def test_evaluating_a_run_finds_its_adapter_and_its_recipe(done):
    run, _ = done
    figures = stages.evaluate(str(run.path), quiet=True)
    answers = read_json(Path(figures["file"]))["scores"]["answers"]
    kept = read_json(run.evals / "tuned-even-test.json")["scores"]["answers"]
    assert [a["text"] for a in answers] == [a["text"] for a in kept]


def test_a_checkpoint_is_evaluated_by_its_runs_recipe_under_its_own_name(done):
    run, _ = done
    checkpoint = max(run.checkpoints.iterdir())
    figures = stages.evaluate(str(checkpoint), limit=2, quiet=True)
    assert Path(figures["file"]) == run.evals / f"{checkpoint.name}-even-test.json"
    assert figures["model"]["scores"]["accuracy"]["count"] == 2


def test_an_adapter_is_compared_with_a_base_prompt_by_prompt(done, make_recipe, tmp_path):
    run, _ = done
    out = tmp_path / "out.json"
    figures = stages.evaluate(str(run.adapter), base=make_recipe().model.path, limit=3, out=out, quiet=True)
    assert figures["change"].keys() >= {"difference", "p", "gained", "lost"}
    assert len(read_json(out)["base"]["scores"]["answers"]) == 3


def test_several_samples_of_each_prompt_are_graded(done, tmp_path):
    run, _ = done
    figures = stages.evaluate(str(run.path), limit=2, n=4, temperature=1.0, out=tmp_path / "out.json", quiet=True)
    assert figures["model"]["scores"]["pass_at"].keys() == {1, 2, 4}
    assert len(read_json(tmp_path / "out.json")["scores"]["answers"]) == 8


def test_a_resumed_run_that_is_done_does_nothing_again(done, make_recipe):
    run, _ = done
    told_again = ("seconds.json", "comparison.json", "summary.txt", "reward.svg")
    files = [path for path in run.path.rglob("*") if path.is_file() and path.name not in told_again]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = stages.run_all(make_recipe(), run, resume=True)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert again["comparisons"] == read_json(run.evals / "comparison.json")["comparisons"]


def test_an_evaluation_of_another_adapter_is_stale_and_made_again(done, make_recipe, tmp_path):
    run = RunDir(tmp_path / "copy")
    shutil.copytree(done[0].path, run.path)
    stale, base = run.evals / "tuned-even-test.json", run.evals / "base-even-test.json"
    (run.adapter / "README.md").write_text("changed")
    before = stale.stat().st_mtime_ns, base.stat().st_mtime_ns
    stages.run_all(make_recipe(), run, resume=True)
    assert stale.stat().st_mtime_ns > before[0]
    assert base.stat().st_mtime_ns == before[1]


def test_training_alone_equals_training_on_the_whole_road(done, make_recipe, tmp_path):
    run = RunDir(tmp_path / "alone")
    stages.train(make_recipe(), run)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (done[0].adapter / name).read_bytes()


def test_a_full_parameter_run_leaves_a_model_and_is_compared_with_the_one_it_began_from(make_recipe, tmp_path):
    run = RunDir(tmp_path / "full")
    figures = stages.run_all(make_recipe(steps=1, train={"full": True, "lr": 1e-3}), run)
    assert (run.model / "config.json").is_file()
    assert figures["comparisons"]["greedy"]["before"]["name"] == "base"


def test_quickstart_shows_answers_before_and_after_and_what_next(make_recipe, tmp_path, capsys):
    stages.quickstart(make_recipe(steps=1), RunDir(tmp_path / "quick"))
    shown = capsys.readouterr().out
    for words in ("before", "after", "right if formed", "how long it took", "What next"):
        assert words in shown


def test_preflight_leaves_its_verdict_and_the_run_can_follow(make_recipe, tmp_path):
    run = RunDir(tmp_path / "later")
    verdict = stages.preflight(make_recipe(), run)
    assert read_json(run.preflight)["go"] is verdict.go is True
    stages.train(make_recipe(steps=1), run)
    assert run.adapter.is_dir()


def test_a_verdict_against_training_stops_the_road(make_recipe, tmp_path):
    recipe = make_recipe(rollout={"max_tokens": 1})
    with pytest.raises(MinigrpoError, match="would teach nothing"):
        stages.run_all(recipe, RunDir(tmp_path / "cut"))


@pytest.mark.extra("gguf")
def test_stages_are_timed(done):
    assert seconds_of(done[0]).keys() == {"model", "preflight", "train", "evaluate", "check", "merge", "export"}


def test_a_run_folder_that_exists_is_refused(done, make_recipe):
    with pytest.raises(ArtifactError, match=r"already holds a run.*--resume.*--run"):
        stages.train(make_recipe(), done[0])


def test_a_folder_that_is_no_run_is_left_alone(make_recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match="holds files that are no run"):
        stages.train(make_recipe(), RunDir(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_with_another_recipe_names_the_knobs_that_differ(done, make_recipe):
    with pytest.raises(ArtifactError, match=r"lora\.rank was 2, is 4; train\.steps was 2, is 3"):
        stages.train(make_recipe(steps=3, lora={"rank": 4, "alpha": 4}), done[0], resume=True)


def test_resuming_what_never_began_begins_it(make_recipe, tmp_path):
    run = RunDir(tmp_path / "new")
    stages.train(make_recipe(steps=1), run, resume=True)
    assert run.adapter.is_dir()


def test_a_slip_in_the_recipe_leaves_no_folder_in_the_way(make_recipe, tmp_path):
    run = RunDir(tmp_path / "slip")
    for road in (stages.train, stages.run_all):
        with pytest.raises(ModelError):
            road(make_recipe(model={"path": str(tmp_path / "nowhere")}), run)
        assert not run.path.exists()


def test_a_run_that_trained_nothing_cannot_be_evaluated(make_recipe, tmp_path):
    create_run(make_recipe(), RunDir(tmp_path / "new"))
    with pytest.raises(ArtifactError, match="has trained nothing yet"):
        stages.evaluate(str(tmp_path / "new"), quiet=True)


def test_a_run_does_not_go_on_from_another_base_than_it_began_with(done, make_recipe, tmp_path):
    assert len(read_sealed(done[0].base)["sha256"]) == 64
    run = RunDir(tmp_path / "other")
    create_run(make_recipe(), run)
    write_sealed(run.base, {"base": "seedling", "sha256": "0"})
    with pytest.raises(ArtifactError, match=r"not the one that .*other began from"):
        stages.train(make_recipe(), run, resume=True)
    assert not run.metrics.exists()


def test_an_interrupted_training_goes_on_where_it_stopped(done, make_recipe, tmp_path, capsys, monkeypatch):
    run = RunDir(tmp_path / "interrupted")
    record = RunLogger.record

    def interrupt(track, step, *rest):
        record(track, step, *rest)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunLogger, "record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stages.train(make_recipe(), run)
    assert "Stopped after step 1 of 2" in capsys.readouterr().err
    assert not run.adapter.exists()
    stages.run_all(make_recipe(), run, resume=True)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (done[0].adapter / name).read_bytes()


def test_a_stamp_changes_with_the_recipe(make_recipe):
    assert stamp("preflight", make_recipe(1))["from"] != stamp("preflight", make_recipe(2))["from"]
    assert flat({"lora": {"rank": 1}, "task": {"weights": {"a": 2}}}) == {"lora.rank": 1, "task.weights": {"a": 2}}


def test_importing_the_package_loads_no_torch():
    code = (
        "import minigrpo, minigrpo.pipeline.stages, sys; assert 'torch' not in sys.modules; print(minigrpo.__version__)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == minigrpo.__version__


def test_every_public_name_can_be_imported():
    assert all(getattr(minigrpo, name) is not None for name in minigrpo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        minigrpo.trian  # noqa: B018


@pytest.fixture
def broken_folder(tiny_folder, tmp_path, make_tokenizer):
    """A model folder with one thing wrong."""

    def make(fault):
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder("llama"), folder)  # Qwen's tokenizer class has an eos of its own
        weights = folder / "model.safetensors"
        if fault in ("template", "eos"):
            (folder / "chat_template.jinja").unlink()
            broken = make_tokenizer(template=None) if fault == "template" else make_tokenizer(eos_token=None)
            broken.save_pretrained(folder)
        elif fault == "cut weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            (weights if fault == "weights" else folder / "config.json").unlink()
        return folder

    return make


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("config", "no config.json"),
        ("weights", "no weights"),
        ("cut weights", "could not be loaded"),
        ("template", "has no chat template"),
        ("eos", "has no eos token"),
    ],
)
def test_a_broken_model_folder_is_refused_with_a_sentence(make_recipe, broken_folder, tmp_path, fault, words):
    recipe = make_recipe(model={"path": str(broken_folder(fault))})
    with pytest.raises(ModelError, match=words):
        stages.preflight(recipe, RunDir(tmp_path / "run"))


def test_a_missing_model_folder_is_refused_with_a_sentence(make_recipe, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        stages.preflight(make_recipe(model={"path": str(tmp_path / "nowhere")}))


def test_empty_data_is_refused_with_a_sentence(make_recipe, tmp_path):
    (tmp_path / "none.py").write_text(TASK.replace("SIZE", "0"))
    with pytest.raises(TaskError, match="no train prompts"):
        stages.preflight(make_recipe(task={"name": f"{tmp_path}/none.py:task"}))


@pytest.fixture
def refusal(capsys):
    """What a command line says on stderr when it ends with exit code 2."""

    def run(*args):
        with pytest.raises(SystemExit) as ended:
            main.main([str(arg) for arg in args])
        told = capsys.readouterr().err
        assert ended.value.code == 2
        assert "Traceback" not in told
        return " ".join(told.split())

    return run


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    def write(**changes):
        file = tmp_path / "recipe.yaml"
        file.write_text(dump_recipe(make_recipe(**changes)))
        return file

    return write


def test_the_command_line_refuses_a_run_that_exists(refusal, recipe_file, done):
    assert "already" in refusal("train", recipe_file(), "--run", done[0].path)
    assert "holds a run" in refusal("run", recipe_file(), "--run", done[0].path)


def test_the_command_line_refuses_a_changed_recipe_on_resume(refusal, recipe_file, done):
    told = refusal("run", recipe_file(), "--run", done[0].path, "--resume", "--lora.rank", "4")
    assert "lora.rank was 2, is 4" in told


@pytest.mark.parametrize("fault", ["config", "weights", "cut weights", "template", "eos"])
def test_the_command_line_refuses_a_broken_model(refusal, recipe_file, broken_folder, tmp_path, fault):
    assert refusal("preflight", recipe_file(), "--model.path", broken_folder(fault), "--run", tmp_path / "r")
    assert refusal("evaluate", tmp_path / "model", "--recipe", recipe_file())


def test_the_command_line_refuses_a_missing_model(refusal, recipe_file, tmp_path):
    assert "no such folder" in refusal("train", recipe_file(), "--model.path", "./nowhere", "--run", tmp_path / "r")


def test_the_command_line_refuses_empty_data(refusal, recipe_file, tmp_path):
    (tmp_path / "none.py").write_text(TASK.replace("SIZE", "0"))
    args = ("--task.name", f"{tmp_path}/none.py:task", "--run", tmp_path / "r")
    assert "no train prompts" in refusal("train", recipe_file(), *args)


def test_the_command_line_refuses_a_group_of_one(refusal, recipe_file):
    assert "compares nothing" in refusal("train", recipe_file(), "--rollout.completions", "1")
