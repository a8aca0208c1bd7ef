"""check-task: a sound task passes, and each way of rewarding the wrong thing is named."""

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from minigrpo.cli import main
from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.evaluation.check_task import check_task
from minigrpo.tasks.registry import open_task
from minigrpo.types import Grade, Prompt


def told(task, **knobs):
    found = check_task(task, TaskConfig(**knobs))
    return found.ok, " ".join(fault.what for fault in found.faults)


@pytest.mark.extra("reasoning-gym")
def test_the_tasks_of_the_package_are_fit_to_train_on():
    for name in ("wordproblems", "rg:leg_counting", "rg:chain_sum"):
        recipe = Recipe(task=TaskConfig(name=name, size=64))
        found = check_task(open_task(recipe), recipe.task)
        assert (found.ok, [fault for fault in found.faults if fault.stops]) == (True, [])


def test_a_sound_task_passes_and_its_figures_are_json(echo_task):
    found = check_task(echo_task, TaskConfig())
    assert found.ok
    kinds = {kind["name"]: kind for kind in json.loads(json.dumps(found.to_dict()))["kinds"]}
    assert (kinds["gold"]["mean"], kinds["gold"]["solved"], kinds["empty"]["high"]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("grade", "words"),
    [
        (lambda p, t: Grade(0.5 * (t == p.target)), "does not count the right answer as solved"),
        (lambda p, t: Grade(1.0 if t == p.target else 0.1, solved=True), "pays for an empty answer"),
        (lambda p, t: Grade(float(t.isdigit()), solved=True), "as much for the right answer of another prompt"),
        (lambda p, t: Grade(float(len(t)), solved=True), "as much for the very long text"),
        (lambda p, t: Grade(1.0, solved=True), "Every answer earns 1."),
        (lambda p, t: Grade(float("RESULT" in t)), "Every answer earns 0, also the right one ('"),
        (lambda p, t: Grade(1 / len(t)), "raised ZeroDivisionError"),
    ],
)
def test_rewards_for_wrong_answers_are_named(echo_task, grade, words):
    ok, faults = told(replace(echo_task, grade=grade))
    assert not ok
    assert words in faults


def test_scores_that_change_and_graders_that_hang_are_named(echo_task):
    counter = itertools.count()
    assert "another score when asked again" in told(replace(echo_task, grade=lambda p, t: Grade(next(counter))))[1]

    def hangs(prompt, text):
        time.sleep(1.0 if prompt.id == "train-1" and text == "" else 0)
        return echo_task.grade(prompt, text)

    assert "takes too long" in told(replace(echo_task, grade=hangs), seconds=0.5)[1]


def test_prompts_in_both_splits_are_named(echo_task):
    train = echo_task.prompts("train")
    same = replace(echo_task, prompts=lambda split: train)
    moved = [Prompt(f"other-{i}", prompt.messages, prompt.target) for i, prompt in enumerate(train)]
    copied = replace(echo_task, prompts=lambda split: train if split == "train" else moved)
    assert "20 ids stand in both splits, such as train-0" in told(same)[1]
    assert "20 test prompts stand in train word for word, such as other-0" in told(copied)[1]


def test_a_task_with_equal_prompt_texts_is_compared_by_its_hidden_data():
    recipe = load_recipe("sudoku-tiny", {"task.size": "24"})
    task = open_task(recipe)
    words = [prompt.messages for split in ("train", "test") for prompt in task.prompts(split)]
    assert len(words) > len({str(one) for one in words})
    found = check_task(task, recipe.task, limit=2)
    assert (found.ok, [fault for fault in found.faults if "prompts" in fault.what]) == (True, [])
    told = [fault.what for fault in check_task(replace(task, unseen=None), recipe.task, limit=2).faults]
    assert any("stand in train word for word" in what for what in told)


def test_one_puzzle_of_a_test_that_stands_in_train_is_caught_though_ids_and_words_differ():
    recipe = load_recipe("sudoku-tiny", {"task.size": "24"})
    task = open_task(recipe)
    known = task.prompts("train")[5].target["games"][0]
    tested = list(task.prompts("test"))
    tested[7] = replace(tested[7], target={"games": [tested[7].target["games"][0], known]})
    leaking = replace(task, prompts=lambda split: tested if split == "test" else task.prompts(split))
    found = check_task(leaking, recipe.task, limit=2)
    assert not found.ok
    assert [fault.what for fault in found.faults if fault.stops] == [
        "1 test prompts are judged by what train is judged by too, such as test-7."
    ]


def test_a_prompt_twice_and_a_part_that_never_changes_are_notes_alone(echo_task):
    def constant(prompt, text):
        grade = echo_task.grade(prompt, text)
        return replace(grade, parts={**grade.parts, "polite": 1.0})

    again = replace(echo_task.prompts("train")[0], id="again")
    ok, faults = told(
        replace(echo_task, grade=constant, prompts=lambda s: echo_task.prompts(s) + ([again] if s == "train" else []))
    )
    assert ok
    assert "1 train prompts repeat" in faults
    assert "polite is 1 for every answer" in faults


def test_a_task_without_right_answers_is_tried_without_them(echo_task):
    ok, faults = told(replace(echo_task, gold=None))
    assert ok
    assert "gives no right answers" in faults


def test_the_exit_code_reports_the_result_and_no_torch_is_loaded(tmp_path):
    (tmp_path / "mine.py").write_text(
        "rows = [{'prompt': f'say {i}', 'answer': str(i)} for i in range(20)]\n"
        "def good(completion, answer): return completion == answer\n"
        "def bad(completion): return 1\n"
    )
    code = (
        "import sys\nfrom minigrpo.cli.main import main\n"
        "try: main(['check-task', '--json', '--task.name', sys.argv[1]])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    for name, expected in (("good", 0), ("bad", 1), ("none", 2)):
        command = [sys.executable, "-c", code, f"{tmp_path}/mine.py:{name}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == expected, ended.stderr
        if expected < 2:
            assert json.loads(ended.stdout)["ok"] == (expected == 0)


def test_the_table_says_what_to_change(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("rows = [{'prompt': 'a'}, {'prompt': 'b'}]\ndef score(completion): return 1\n")
    with pytest.raises(SystemExit):
        main.main(["check-task", "--task.name", f"{tmp_path}/mine.py:score"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "change this: The grader pays for an empty answer: 2 of 2" in shown
    assert "not yet fit" in shown
