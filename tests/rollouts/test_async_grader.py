"""Grading beside generation: the same outcome as without; and what hangs or fails stops nothing else."""

import math
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.errors import TaskError
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.rollouts.groups import rollout
from minigrpo.tasks.registry import open_task
from minigrpo.types import Grade, Sampling

SAY = ["1", "2", "no"]


class Patient(Scripted):
    """Samples the second prompt only once the first has been graded."""

    def __init__(self, script, tokenizer, graded):
        super().__init__(script, tokenizer)
        self.graded = graded

    def line(self, prompt, sibling):
        assert prompt.id == "train-0" or self.graded.wait(60), "nobody graded the first prompt in the meantime"
        return super().line(prompt, sibling)


class Silent(Scripted):
    """An engine that never calls `ready`."""

    def generate(self, prompts, n, sampling, ready=None, *, progress=None):
        return super().generate(prompts, n, sampling)


def roll(task, tokenizer, grader=None, count=6, engine=Scripted):
    prompts = task.prompts("train")[:count]
    return rollout(engine(SAY, tokenizer), task, prompts, n=3, sampling=Sampling(), tokenizer=tokenizer, grader=grader)


def slowly(task, seconds):
    def grade(prompt, text):
        time.sleep(seconds)
        return task.grade(prompt, text)

    return replace(task, grade=grade)


@pytest.mark.parametrize("engine", [Scripted, Silent])
@pytest.mark.parametrize("workers", [1, 8])
def test_the_outcome_is_that_of_grading_one_after_the_other(echo_task, tokenizer, workers, engine):
    with Grader(slowly(echo_task, 0.002), workers=workers) as grader:
        for _ in range(2):
            assert roll(echo_task, tokenizer, grader, engine=engine) == roll(echo_task, tokenizer)


def test_all_siblings_at_once_are_graded_alike(echo_task, tokenizer):
    whole = replace(echo_task, grade_group=lambda prompt, group: [echo_task.grade(prompt, one.text) for one in group])
    with Grader(whole, workers=2) as grader:
        assert roll(whole, tokenizer, grader) == roll(whole, tokenizer) == roll(echo_task, tokenizer)


def test_a_group_is_graded_while_others_are_still_being_sampled(echo_task, tokenizer):
    graded = threading.Event()

    def grade(prompt, text):
        graded.set()
        return echo_task.grade(prompt, text)

    task = replace(echo_task, grade=grade)
    with Grader(task) as grader:
        groups = roll(task, tokenizer, grader, engine=lambda script, tokenizer: Patient(script, tokenizer, graded))
    assert groups == roll(echo_task, tokenizer)


def hanging(task, hangs):
    """Never returns where `hangs` says so."""

    def grade(prompt, text):
        if hangs(prompt, text):
            threading.Event().wait()
        return task.grade(prompt, text)

    return replace(task, grade=grade)


def test_a_group_that_hangs_is_left_out_from_there_on_and_told_once(echo_task, tokenizer):
    said = []
    task = hanging(echo_task, lambda prompt, text: prompt.id in ("train-1", "train-4") and text == "2")
    with Grader(task, seconds=0.5, say=said.append) as grader:
        groups = roll(task, tokenizer, grader)
    assert [[grade.scored for grade in group.grades] for group in groups] == [
        [True, group.prompt.id not in ("train-1", "train-4"), group.prompt.id not in ("train-1", "train-4")]
        for group in groups
    ]
    assert groups[1].grades[2].notes == {"grader": "took longer than 0.5 s"}
    assert len(said) == 1
    assert "train-1" in said[0]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("each", "limit", "own"), [(0.2, 0.5, 0.0), (0.15, 0.01, 0.4), (0.1, 0.25, 0.0)])
def test_a_group_from_which_grades_still_come_is_not_hung(echo_task, tokenizer, workers, each, limit, own):
    """Each sibling keeps the limit, the group of three does not; `own` is the limit that the task knows itself."""
    task = replace(slowly(echo_task, each), grading_seconds=lambda side_by_side: own)
    with Grader(task, workers=workers, seconds=limit) as grader:
        assert roll(task, tokenizer, grader, count=4) == roll(echo_task, tokenizer, count=4)


@pytest.mark.parametrize(
    ("games", "cpu_seconds", "side_by_side", "workers", "seconds"),
    [(3, 5.0, 1, 2, 200.0), (3, 5.0, 4, 2, 400.0), (1, 0.5, 3, 8, 60.0), (1, 5.0, 8, 3, 300.0)],
)
def test_the_time_for_programs_follows_from_the_limits_of_the_sandbox(
    games, cpu_seconds, side_by_side, workers, seconds
):
    sandbox = {"cpu_seconds": cpu_seconds, "workers": workers, "memory_mb": 63 + workers}
    recipe = Recipe.model_validate({"task": {"name": "sudoku", "games": games}, "sandbox": sandbox})
    assert Grader(open_task(recipe), workers=side_by_side).seconds == seconds


def test_three_groups_that_hang_in_a_row_end_the_run(echo_task, tokenizer):
    task = hanging(echo_task, lambda prompt, text: True)
    with (
        Grader(task, seconds=0.1) as grader,
        pytest.raises(TaskError, match=r"task echo took longer than 0\.1 s on 3 groups in a row.*prompt train-2"),
    ):
        roll(task, tokenizer, grader)


def test_a_grader_that_hangs_keeps_no_process_from_ending():
    code = (
        "import threading\n"
        "from minigrpo.rollouts.async_grader import Grader\n"
        "from minigrpo.types import Completion, Prompt, Task\n"
        "task = Task('stuck', lambda split: [], lambda prompt, text: threading.Event().wait())\n"
        "with Grader(task, seconds=0.1) as grader:\n"
        "    print(grader.open_batch([Prompt('p', ())]).collect([(Completion('x', (), (), 'stop'),)])[0][0].reward)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout) == (0, "nan\n")


def test_the_first_fault_by_prompts_is_raised_as_without_threads(echo_task, tokenizer):
    def falls(prompt, text):
        if prompt.id == "train-2":
            raise KeyError("late")
        return Grade(1 / (prompt.id != "train-1"))

    broken = replace(echo_task, grade=falls)
    with Grader(broken, workers=4) as grader:
        for given in (grader, None):
            with pytest.raises(TaskError, match=r"task echo raised ZeroDivisionError.*prompt train-1, answer '1'"):
                roll(broken, tokenizer, given)


@pytest.mark.parametrize(
    ("grades", "told"),
    [
        ([Grade(1.0)], "returned 1 grades for the 3 completions of prompt train-0"),
        (None, "returned NoneType for the 3 completions"),
        ([Grade(1.0), 1.0, Grade(1.0)], "returned float on prompt train-0, answer '2'"),
        ([Grade(1.0), Grade(math.nan), Grade(1.0)], "gave reward = nan on prompt train-0, answer '2'"),
        ([Grade(1.0, metrics={"m": math.inf})] * 3, "gave m = inf"),
        ([Grade(1.0, {"a": "1"})] * 3, "gave a = 1"),
    ],
)
def test_grades_of_a_group_are_checked_like_any_other(echo_task, tokenizer, grades, told):
    with pytest.raises(TaskError, match=told):
        roll(replace(echo_task, grade_group=lambda prompt, group: grades), tokenizer)


def test_a_grader_cannot_change_the_prompt(echo_task, tokenizer):
    prompt = replace(echo_task.prompts("train")[0], target={"list": [1]})

    def spoils(prompt, text):
        prompt.target["list"].clear()
        prompt.messages[0]["content"] = "spoilt"
        return Grade(0.0)

    task = replace(echo_task, prompts=lambda split: [prompt], grade=spoils)
    assert roll(task, tokenizer)[0].prompt is prompt
    assert (prompt.target, prompt.messages[0]["content"]) == ({"list": [1]}, "say 0")
