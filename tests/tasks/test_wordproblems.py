"""The word-problem task, and how tasks are found: by name or in a user's file."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest

from minigrpo.config.schema import TASK_NAMES, Recipe
from minigrpo.errors import TaskError
from minigrpo.models.embedded.wordproblem_demos import (
    HABITS,
    habit_weights,
    schoolbook_texts,
    unreadable_questions,
    wordproblem_demonstrations,
)
from minigrpo.tasks.builtin.wordproblems import RESULTS, STORIES, generate_problems, split_of_sum
from minigrpo.tasks.registry import TASKS, open_task
from minigrpo.types import Prompt, Task

Sum = tuple[tuple[int, ...], tuple[str, ...]]


def opened(seed: int = 0, **task: object) -> Task:
    return open_task(Recipe.model_validate({"seed": seed, "task": task}))


def sum_of(prompt: Prompt) -> Sum:
    return tuple(prompt.target["operands"]), tuple(prompt.target["operations"])


@pytest.fixture(scope="module")
def test_sums() -> set[Sum]:
    return {sum_of(prompt) for prompt in opened().prompts("test")}


def test_the_registry_holds_the_names_of_the_recipe() -> None:
    assert tuple(TASKS) == TASK_NAMES


def test_the_test_problems_are_many_and_the_same_for_everybody() -> None:
    prompts = opened(seed=0).prompts("test")
    assert len(prompts) >= 500
    assert prompts == opened(seed=7, size=3).prompts("test")
    assert len({prompt.id for prompt in prompts}) == len(prompts)


def test_the_kinds_of_story_are_balanced_in_any_number_of_problems() -> None:
    kinds = [prompt.target["kind"] for prompt in opened().prompts("test")[:400]]
    assert {kinds.count(kind.name) for kind in STORIES} == {50}


def test_training_problems_follow_seed_and_size() -> None:
    first = opened(seed=1, size=100).prompts("train")
    assert len(first) == 100
    assert first == opened(seed=1, size=100).prompts("train")
    assert first != opened(seed=2, size=100).prompts("train")


def test_no_test_sum_is_trained_on(test_sums: set[Sum]) -> None:
    for seed in range(3):
        assert not test_sums & {sum_of(prompt) for prompt in opened(seed=seed, size=3000).prompts("train")}


def test_no_test_sum_is_shown_in_the_warm_start(test_sums: set[Sum]) -> None:
    for seed in range(3):
        shown = {(d.problem.operands, d.problem.operations) for d in wordproblem_demonstrations(seed, 5000)}
        assert not test_sums & shown


def test_no_two_neighbouring_sums_of_the_schoolbook_are_a_test_sum(test_sums: set[Sum]) -> None:
    def windows(steps: str) -> list[Sum]:
        split = [step.partition("=")[0].replace("+", " + ").replace("-", " - ").split() for step in steps.split()]
        return [((int(one[0]), int(one[2]), int(two[2])), (one[1], two[1])) for one, two in pairwise(split)]

    shown = {window for _, steps in schoolbook_texts(0, 8000) for window in windows(steps)}
    assert len(shown) > 5000
    assert not test_sums & shown


def test_the_split_of_a_sum_does_not_depend_on_the_order_of_its_numbers() -> None:
    assert split_of_sum((23, 8, 5), "+-") == split_of_sum((23, 5, 8), "-+")
    assert split_of_sum((23, 8, 5), "++") == split_of_sum((8, 5, 23), "++")
    sides = [split_of_sum((a, b, c), "+-") for a in range(11, 90) for b in range(2, 10) for c in range(2, 10)]
    assert 0.15 < sides.count("test") / len(sides) < 0.25


def test_steps_and_answers_are_right() -> None:
    for problem in islice(generate_problems("train", 0), 2000):
        first, second = problem.steps
        for step in (first, second):
            left, _, right = step.partition("=")
            assert eval(left) == int(right)
            assert int(right) in RESULTS
        assert second.endswith(f"={problem.answer}")
        assert all(str(number) in problem.story for number in problem.operands)


def test_gold_earns_everything() -> None:
    task = opened()
    assert task.gold is not None
    for prompt in task.prompts("test"):
        grade = task.grade(prompt, task.gold(prompt))
        assert (grade.reward, grade.formed, grade.solved) == (1.2, True, True)


def test_form_and_correctness_are_told_apart() -> None:
    task = opened()
    prompt = task.prompts("test")[0]
    right = prompt.target["answer"]
    wrong = task.grade(prompt, f"<think>Easy.</think><answer>{right + 1}</answer>")
    assert (wrong.reward, wrong.formed, wrong.solved) == (0.2, True, False)
    bare = task.grade(prompt, f"<think>Easy.</think>{right}")
    assert (bare.reward, bare.formed, bare.solved) == (0.0, False, False)
    words = task.grade(prompt, "<think>Easy.</think><answer>many</answer>")
    assert (words.reward, words.formed) == (0.0, False)


def test_reward_weights_come_from_the_recipe() -> None:
    task = opened(weights={"format": 0.0})
    prompt = task.prompts("test")[0]
    grade = task.grade(prompt, "<think>Easy.</think><answer>0</answer>")
    assert (grade.reward, grade.parts) == (0.0, {"correct": 0.0, "format": 1.0})
    with pytest.raises(TaskError, match=r"Its rewards: correct, format"):
        opened(weights={"fromat": 1.0})


def test_targets_survive_json() -> None:
    target = opened().prompts("test")[0].target
    assert json.loads(json.dumps(target)) == target


def test_asking_for_more_problems_than_exist_is_reported() -> None:
    with pytest.raises(TaskError, match=r"different problems: lower --task\.size"):
        opened(size=100_000).prompts("train")


def test_in_two_kinds_of_eight_the_careful_habit_prevails_and_elsewhere_it_is_a_minority() -> None:
    prevailing = [max(weights, key=weights.__getitem__) for weights in (habit_weights(k.name) for k in STORIES)]
    assert prevailing.count("careful") == 2
    assert set(prevailing) == set(HABITS)
    for kind in STORIES:
        weights = habit_weights(kind.name)
        assert abs(sum(weights.values()) - 1) < 1e-9
        assert weights["careful"] >= 0.15


def test_only_the_careful_are_right_and_all_habits_occur() -> None:
    task = opened()
    shown = wordproblem_demonstrations(0, 4000)
    assert {d.habit for d in shown} == set(HABITS)
    for d in shown:
        prompt = Prompt("", (), target={"answer": d.problem.answer})
        assert task.grade(prompt, d.text).solved == (d.habit == "careful")


def test_unreadable_questions_are_answered_in_the_form_with_a_guess() -> None:
    task, shown = opened(), unreadable_questions(0, 200)
    assert shown == unreadable_questions(0, 200) != unreadable_questions(1, 200)
    assert max(len(question.split()) for question, _ in shown) > 90
    for _, text in shown:
        grade = task.grade(Prompt("", (), target={"answer": 72}), text)
        assert grade.formed
        assert not grade.solved


OWN = """
from minigrpo.types import Grade, Prompt, Task

def prompts(split):
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": "hi"},)) for i in range(10)]

finished = Task("own", prompts, lambda prompt, text: Grade(1.0))

def made(recipe):
    return Task(f"own-{recipe.seed}", prompts, lambda prompt, text: Grade(1.0))

def fails(recipe):
    return 1 / 0

def odd(recipe):
    return "a task"

empty = Task("none", lambda split: [], lambda prompt, text: Grade(1.0))
twice = Task("twice", lambda split: prompts(split) * 2, lambda prompt, text: Grade(1.0))
number = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_custom_task_is_found_in_its_file(own: Path) -> None:
    assert opened(name=f"{own}:finished").name == "own"
    assert opened(name=f"{own}:made", seed=5).name == "own-5"
    assert len(opened(name=f"{own}:finished", size=4).prompts("train")) == 4
    assert len(opened(name=f"{own}:finished", size=4).prompts("test")) == 10


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("wordproblem", "No task is called 'wordproblem'. Did you mean wordproblems"),
        ("zzz", "There are: wordproblems.*FILE.py:NAME"),
        ("{own}", "Write FILE.py:NAME"),
        ("{own}:", "Write FILE.py:NAME"),
        ("missing.py:task", "missing.py is missing"),
        ("{own}:nothing", "has no 'nothing'. Tasks and functions in it: empty, fails, finished, made"),
        ("{own}:number", "is a int. Make it a Task"),
        ("{own}:odd", "returned a str"),
        ("{own}:fails", "mine.py, line 13: ZeroDivisionError: division by zero"),
    ],
)
def test_a_task_that_cannot_be_opened_is_reported_in_a_sentence(own: Path, name: str, complaint: str) -> None:
    with pytest.raises(TaskError, match=complaint):
        opened(name=name.format(own=own))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1\ny = x +\n", "line 2: SyntaxError: invalid syntax"),
        ("import json\njson.loads('{')\n", "line 2: JSONDecodeError"),
        ("import no_such_module_anywhere\n", "line 1: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "line 1: SystemExit"),
        ("x = '\\ud800'\nraise KeyError(x)", "line 2: KeyError"),
    ],
)
def test_a_python_error_in_a_custom_file_is_reported_with_its_line(tmp_path: Path, source: str, complaint: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(TaskError, match=complaint):
        opened(name=f"{path}:task")


def test_prompts_are_checked_when_asked_for(own: Path) -> None:
    with pytest.raises(TaskError, match="none has no train prompts"):
        opened(name=f"{own}:empty").prompts("train")
    with pytest.raises(TaskError, match="two test prompts with the id 'test-0'"):
        opened(name=f"{own}:twice").prompts("test")


def test_weights_that_cannot_reach_a_finished_task_are_refused(own: Path) -> None:
    with pytest.raises(TaskError, match=r"minigrpo\.tasks\.common\.rewards\.reweighted"):
        opened(name=f"{own}:finished", weights={"right": 2.0})
