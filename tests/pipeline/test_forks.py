"""Forks: the same again is the same bytes, twins differ by their change alone, and the run is only read."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, MinigrpoError, RecipeError
from minigrpo.pipeline import forks, stages
from minigrpo.runs.logger import read_groups, read_metrics
from minigrpo.runs.rundir import RunDir, digest, read_json

# A part that can be learned, and a decoy that is the same for every answer.
TASK = """
from minigrpo.tasks.common.rewards import Reward, graded, reweighted
from minigrpo.types import Prompt, Task

def even(prompt, text):
    return sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))

def task(recipe):
    rewards = reweighted((Reward("even", 1.0, even), Reward("decoy", 0.5, lambda p, t: 1.0)), recipe.task.weights)

    def prompts(split):
        return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), str(i)) for i in range(12)]

    def grade(prompt, text):
        return graded(rewards, prompt, text, formed=True, solved=even(prompt, text) > 0.5)

    return Task("even", prompts, grade)
"""


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory) -> RunDir:
    """A run of four steps with a checkpoint after each, made once; it is only read."""
    folder = tmp_path_factory.mktemp("forked")
    (folder / "even.py").write_text(TASK)
    recipe = Recipe(
        model={"path": str(tiny_folder("qwen2")), "device": "cpu"},
        lora={"rank": 2, "alpha": 4},
        task={"name": f"{folder / 'even.py'}:task"},
        rollout={"prompts": 3, "completions": 4, "max_tokens": 6},
        train={"steps": 4, "lr": 0.01, "tokens_per_pass": 512, "schedule": "linear"},
        save={"every": 1, "keep": 9},
        eval={"limit": 6},
    )
    run = RunDir(folder / "run")
    stages.train(recipe, run)
    return run


def files_of(run: RunDir) -> dict[str, str]:
    """Hash every file of a run but those of its forks."""
    found = (path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file())
    return {str(name): digest(run.path / name) for name in found if name.parts[0] != "forks"}


def without_clock(run: RunDir) -> list[dict]:
    measured = ("seconds", "tokens_per_second", "memory_gb")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in read_metrics(run)]


def test_a_fork_without_a_change_is_the_run_byte_for_byte_and_the_run_is_not_touched(trained, capsys):
    before = files_of(trained)
    figures = forks.fork(trained, at=2)
    twin = RunDir(trained.path / "forks/at2-to4")
    assert twin.groups.read_bytes() == trained.groups.read_bytes()
    assert without_clock(twin) == without_clock(trained)
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer.json"):
        assert (twin.checkpoint(4) / name).read_bytes() == (trained.checkpoint(4) / name).read_bytes()
    weights = "adapter_model.safetensors"
    assert (twin.adapter / weights).read_bytes() == (trained.adapter / weights).read_bytes()
    assert figures["repeats"] == {"steps": 2, "first_difference": None, "checkpoint": True}
    assert files_of(trained) == before
    assert "takes about" in capsys.readouterr().out


def test_twins_say_the_same_until_their_weights_differ_and_differ_then(trained):
    forks.fork(trained, at=2, change={"train.lr": 0.2}, limit=4)
    same, changed = (RunDir(trained.path / "forks" / name) for name in ("at2-to4", "at2-to4-train.lr-0.2"))
    rows = [{(row["step"], row["prompt"]): row for row in read_groups(run)} for run in (same, changed)]
    assert rows[0].keys() == rows[1].keys()  # the same prompts
    assert all(rows[0][key] == rows[1][key] for key in rows[0] if key[0] <= 3)  # step 3 samples from the checkpoint
    assert any(rows[0][key] != rows[1][key] for key in rows[0] if key[0] == 4)
    assert [row["learning_rate"] for row in read_metrics(changed)][2:] == pytest.approx([0.1, 0.05])


def test_other_draws_have_other_answers_to_the_same_prompts(trained):
    figures = forks.fork(trained, at=2, change=[("task.weights.decoy", "0")], times=2, limit=6)
    twins = [RunDir(trained.path / "forks" / name) for name in ("at2-to4", "at2-to4-draw1")]
    rows = [[row for row in read_groups(twin) if row["step"] > 2] for twin in twins]
    assert [row["prompt"] for row in rows[0]] == [row["prompt"] for row in rows[1]]
    texts = [[one["text"] for row in each for one in row["completions"]] for each in rows]
    assert sum(a != b for a, b in zip(*texts, strict=True)) > len(texts[0]) / 2
    # What is paid for every answer tells no sibling from another: leaving it out changes nothing at all.
    assert figures["over"] == "2 draws"
    assert figures["kl"] == 0
    assert {name: figure["difference"]["value"] for name, figure in figures["figures"].items()} == {
        "reward": 0.0,
        "right": 0.0,
        "length": 0.0,
    }
    assert len(figures["prompts"]) == 6


def test_one_group_is_left_out_and_another_turned(trained):
    chosen = [row for row in read_groups(trained) if row["step"] == 3]
    out, turned = chosen[0]["prompt"], chosen[1]["prompt"]
    change = {f"groups.factor.{out}@3": 0, f"groups.factor.{turned}@3": -1, f"groups.factor.{chosen[2]['prompt']}@4": 0}
    forks.fork(trained, at=2, change=change, steps=1, name="regrouped", limit=2)
    twin = RunDir(trained.path / "forks/regrouped")
    found = [row for row in read_groups(twin) if row["step"] == 3]
    rates = [[row["learning_rate"] for row in read_metrics(run)][:3] for run in (trained, twin)]
    assert rates[0] == rates[1]  # the twin ends a step earlier, and its schedule does not
    advantages = [[[one["advantage"] for one in row["completions"]] for row in rows] for rows in (chosen, found)]
    then, now = advantages
    assert any(then[0])
    assert any(then[1])
    assert now == [[0.0] * 4, [-value for value in then[1]], then[2]]


def test_every_twin_is_a_run_and_the_table_its_plot_and_the_differences_are_there(trained, capsys):
    figures = forks.fork(trained, at=2, change={"train.lr": 0.2}, limit=4)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("unchanged", "KL from unchanged", "4 prompts, one draw", "fork.svg"))
    assert max(map(len, printed.partition("intervals over")[2].partition("Every prompt")[0].splitlines())) <= 80
    twin = Path(figures["twins"])
    assert figures["kl"] > 0
    assert read_json(twin / "fork.json") == json.loads(json.dumps(figures))
    assert ElementTree.parse(twin / "fork.svg").getroot().tag.endswith("svg")
    result = stages.evaluate(str(twin), limit=3, temperature=0.0)
    assert Path(result["file"]).parent == twin / "evals"


def test_a_fork_that_was_stopped_goes_on_and_ends_as_one_that_was_not(trained, tmp_path, monkeypatch):
    whole, cut = (RunDir(tmp_path / name / "run") for name in ("whole", "cut"))
    for run in (whole, cut):
        shutil.copytree(trained.path, run.path, ignore=shutil.ignore_patterns("forks"))
    ask = {"at": 2, "change": {"train.lr": 0.2}, "limit": 4}
    train, begun = stages.train_opened, []

    def stop(opened, run, show_samples=False):
        begun.append(run)
        if len(begun) == 2:
            raise KeyboardInterrupt
        train(opened, run, show_samples)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_opened", stop)
        with pytest.raises(KeyboardInterrupt):
            forks.fork(cut, **ask)
    ended, again = forks.fork(whole, **ask), forks.fork(cut, **ask)
    assert len(begun) == 2
    places = ("run", "twins", "plot")
    assert {k: v for k, v in again.items() if k not in places} == {k: v for k, v in ended.items() if k not in places}


def test_a_run_that_cannot_be_repeated_is_told_and_where_it_differs_first(trained, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, run.path, ignore=shutil.ignore_patterns("forks"))
    lines = run.groups.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    place = next(place for place, row in enumerate(rows) if row["step"] == 4)
    rows[place]["completions"][0]["reward"] += 1
    run.groups.write_text("".join([*lines[:place], json.dumps(rows[place]) + "\n", *lines[place + 1 :]]))
    found = forks.fork(run, at=2)["repeats"]
    assert found["first_difference"] == f"prompt {rows[place]['prompt']} of step 4"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"at": 2, "change": {"seed": 3}}, "--set seed"),
        ({"at": 2, "change": {"lora.rank": 4}}, "--set lora.rank"),
        ({"at": 2, "change": {"eval.every": 2}}, "--set eval.every"),
        ({"at": 2, "change": {"train.lrr": 1}}, "Did you mean train.lr?"),
        ({"at": 2, "change": {"task.weights.evn": 0}}, "Its rewards: even, decoy"),
        ({"at": 2, "change": {"groups.factor.train-99": 0}}, "no training prompt"),
        ({"at": 2, "steps": 3}, "Ask for 1 to 2"),
        ({"at": 4}, "no step left"),
        ({"at": 2, "times": 3}, "nothing is changed"),
    ],
)
def test_what_no_fork_can_do_is_refused_in_a_sentence(trained, ask, words):
    with pytest.raises(MinigrpoError) as refused:
        forks.fork(trained, **ask)
    assert words in str(refused.value)


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(trained, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, run.path, ignore=shutil.ignore_patterns("forks", "000002"))
    with pytest.raises(ArtifactError, match=r"no checkpoint of step 2\. There are: 0, 1, 3, 4"):
        forks.fork(run, at=2)
    with pytest.raises(ArtifactError, match="is no run"):
        forks.fork(RunDir(tmp_path / "nowhere"), at=2)


def test_a_dry_run_says_how_long_it_would_take_and_makes_nothing(trained, tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, run.path, ignore=shutil.ignore_patterns("forks"))
    figures = forks.fork(run, at=2, change={"train.lr": 0.2}, times=50, dry_run=True)
    pace = [row["seconds"] for row in read_metrics(run)]
    assert figures["seconds"] >= 50 * 2 * 2 * min(pace)
    assert not (run.path / "forks").exists()
    assert "100 twins" in capsys.readouterr().out


def test_twins_that_are_there_already_cost_nothing_and_that_is_said(trained, tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, run.path, ignore=shutil.ignore_patterns("forks"))
    ask = {"at": 2, "change": {"train.lr": 0.2}, "limit": 2}
    first = forks.fork(run, dry_run=True, **ask)["seconds"]
    forks.fork(run, at=2)
    second = forks.fork(run, dry_run=True, **ask)["seconds"]
    told = " ".join(capsys.readouterr().out.split())
    assert "Of these twins 1 are there already. At the run's own pace the rest takes about" in told
    forks.fork(run, **ask)
    assert first > second > forks.fork(run, dry_run=True, **ask)["seconds"] == 0


def test_a_run_may_end_before_its_learning_rate_does(trained):
    recipe = load_recipe(str(trained.path), {"train.until": 3})
    assert (recipe.train.last_step, recipe.train.steps) == (3, 4)
    with pytest.raises(RecipeError, match=r"train\.until is more than train\.steps"):
        load_recipe(str(trained.path), {"train.until": 5})


DECOY = """
from dataclasses import replace

from minigrpo.tasks.builtin.wordproblems import wordproblems_task
from minigrpo.tasks.common.rewards import Reward, graded, reweighted

def task(recipe):
    plain = wordproblems_task(recipe.model_copy(update={"task": recipe.task.model_copy(update={"weights": {}})}))

    def part(name):
        return lambda prompt, text: plain.grade(prompt, text).parts[name]

    def decoy(prompt, text):
        return float(len(text) % 2 == 0)

    own_parts = [Reward("correct", 1.0, part("correct")), Reward("format", 0.2, part("format"))]
    rewards = reweighted([*own_parts, Reward("decoy", 0.1, decoy)], recipe.task.weights)

    def grade(prompt, text):
        own = plain.grade(prompt, text)
        return graded(rewards, prompt, text, formed=own.formed, solved=own.solved)

    return replace(plain, name="decoy", grade=grade)
"""


@pytest.mark.long
@pytest.mark.timeout(1800)  # twelve twins: two minutes on a quiet machine
def test_leaving_out_the_part_that_matters_shows_and_leaving_out_a_decoy_does_not(tmp_path):
    (tmp_path / "decoy.py").write_text(DECOY)
    knobs = {"task.name": f"{tmp_path / 'decoy.py'}:task", "save.every": 10, "save.keep": 9, "train.until": 30}
    run = RunDir(tmp_path / "run")
    stages.train(load_recipe("quickstart", knobs), run)
    without = {
        part: forks.fork(run, at=10, change={f"task.weights.{part}": 0}, times=4)["figures"]["right"]["difference"]
        for part in ("correct", "decoy")
    }
    assert without["correct"]["high"] < 0
    assert without["decoy"]["low"] < 0 < without["decoy"]["high"]
    assert without["decoy"]["high"] - without["decoy"]["low"] < 0.05
