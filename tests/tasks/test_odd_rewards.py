"""Reward functions of every make: each has a name, and whatever one gives or raises ends in a sentence."""

import asyncio
import functools
import math
import types

import pytest

from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.errors import TaskError
from minigrpo.rollouts.grading import judge, judge_group
from minigrpo.tasks.custom.reward_task import reward_task
from minigrpo.tasks.registry import open_task
from minigrpo.types import Completion, Grade, Prompt, Task

ROWS = [{"prompt": f"say {i}", "answer": str(i)} for i in range(12)]
SIBLINGS = [Completion(text, (1,), (0.0,), "stop") for text in ("0", "seven")]


def scaled(completion, by):
    return by * len(completion)


class Length:
    def __init__(self, by=1.0):
        self.by = by

    def __call__(self, completion):
        return self.by * len(completion)

    def measure(self, completion):
        return self.by * len(completion)


def factory(by):
    def made(completion):
        return by * len(completion)

    return made


def grades(*functions, rows=ROWS, **options):
    task = reward_task(*functions, rows=rows, **options)
    return judge_group(task, task.prompts("train")[0], SIBLINGS)


two, three = functools.partial(scaled, by=2.0), functools.partial(scaled, by=3.0)


@pytest.mark.parametrize(
    ("functions", "names"),
    [
        ([lambda completion: 1.0, lambda completion: 2.0], ["lambda_1", "lambda_2"]),
        ([two, three], ["scaled_1", "scaled_2"]),
        ([Length(), Length(2.0)], ["Length_1", "Length_2"]),
        ([Length().measure, Length(2.0).measure], ["measure_1", "measure_2"]),
        ([factory(1.0), factory(2.0)], ["made_1", "made_2"]),
        ([functools.cache(lambda completion: 1.0), lambda completion: 2.0], ["lambda_1", "lambda_2"]),
        ([functools.partial(functools.partial(scaled, by=1.0), by=2.0), two], ["scaled_1", "scaled_2"]),
        ([functools.partial(Length(), **{}), Length()], ["Length_1", "Length_2"]),
        ([lambda completion: 1.0, Length(), two], ["lambda", "Length", "scaled"]),
    ],
)
def test_functions_without_a_name_are_told_apart_in_parts_and_weights(functions, names):
    first, second = grades(*functions)
    assert list(first.parts) == list(second.parts) == names
    halved = grades(*functions, weights={names[-1]: 0.5})[0]
    assert halved.reward == sum(first.parts.values()) - first.parts[names[-1]] / 2


FILE = """
import functools
rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(12)]

def right(completion, answer, worth=1.0):
    return worth * (completion == answer)

class Long:
    def __call__(self, completion):
        return len(completion)

short = lambda completion: -len(completion)
half = functools.partial(right, worth=0.5)
long = Long()
call = long.__call__
all_of_them = [right, short, half, long, call, lambda completion: 1.0, functools.partial(right, worth=2.0)]
"""


def test_the_variable_of_a_users_file_is_the_name(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    task = open_task(Recipe(task=TaskConfig(name=f"{tmp_path}/mine.py:all_of_them", weights={"half": 3.0})))
    grade = task.grade(task.prompts("train")[0], "x")
    assert list(grade.parts) == ["right", "short", "half", "long", "call", "lambda", "right_2"]
    assert grade.weights["half"] == 3.0


def test_the_same_function_twice_is_still_refused():
    for same in (two, Length(), factory(1.0)):
        with pytest.raises(TaskError, match="share a name"):
            grades(same, same)


def test_a_name_that_another_function_has_is_not_given_again():
    def lambda_2(completion):
        return 5.0

    first, _ = grades(lambda completion: 1.0, lambda completion: 2.0, lambda_2)
    assert first.parts == {"lambda_1": 1.0, "lambda_3": 2.0, "lambda_2": 5.0}


@pytest.mark.parametrize("value", [1e308, -1e308, 1e200, 1e155, 1e39, 1e20, 10**40, float("1e17")])
def test_numbers_whose_squares_overflow_are_refused_with_function_and_row(value):
    with pytest.raises(TaskError, match=r"huge gave .* for prompt train-1, answer '0', beyond 1e\+16.*Its row: rows\["):
        grades(named("huge", lambda completion: value))
    with pytest.raises(TaskError, match=r"huge gave .*beyond.*Its row: rows\[\d+\]\."):
        grades(named("huge", lambda completions, **columns: [0.0, value]))
    for grade in (Grade(value), Grade(0.0, {"part": value}), Grade(0.0, metrics={"figure": value})):
        own = Task("own", lambda split: [], lambda prompt, text, grade=grade: grade)
        with pytest.raises(TaskError, match=r"task own gave .*prompt p, answer 'x'.*at most 1e\+16"):
            judge(own, Prompt("p", ()), "x")


def test_weights_that_make_a_sum_overflow_are_refused():
    with pytest.raises(TaskError, match=r"1e\+300 x fine = 1e\+10.*beyond 1e\+16.*Its row: rows"):
        grades(named("fine", lambda completion: 1e10), weights={"fine": 1e300})
    with pytest.raises(TaskError, match="beyond"):
        grades(named("fine", lambda completion: 1e15), weights={"fine": -1e6})
    assert grades(named("fine", lambda completion: 1e15))[0].reward == 1e15


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Shapeless:
    def __float__(self):
        raise RuntimeError("a tensor of two numbers")

    def __repr__(self):
        raise RuntimeError("no picture")


class Outcome(BaseException):
    """As those by which pytest skips and fails."""


@pytest.mark.parametrize("value", [math.nan, float("-inf"), Shapeless(), 10**400])
def test_what_is_no_number_is_refused_with_the_row(value):
    with pytest.raises(TaskError, match=r"odd gave .*Return a finite number\. Its row: rows\[\d+\]\."):
        grades(named("odd", lambda completion: value))
    own = Task("own", lambda split: [], lambda prompt, text: Grade(value))
    with pytest.raises(TaskError, match="task own gave reward = "):
        judge(own, Prompt("p", ()), "x")


def named(name, function):
    return types.FunctionType(function.__code__, function.__globals__, name, None, function.__closure__)


FAULTS = [
    SystemExit(0),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError(),
    Outcome("out"),
    UnspeakableError(),
    RecursionError("x" * 10_000),
    BaseExceptionGroup("two", [SystemExit(1), ValueError()]),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_whatever_a_reward_raises_ends_in_a_sentence_with_function_and_row(fault):
    def falls(completion):
        raise fault

    def fall_together(completions, **columns):
        raise fault

    async def falls_later(completion):
        raise fault

    for function in (falls, fall_together, falls_later):
        with pytest.raises(TaskError) as told:
            grades(function)
        words = str(told.value)
        assert f"{function.__name__} raised {type(fault).__name__}" in words
        assert "test_odd_rewards.py" in words
        assert "Its row: rows[" in words
        assert len(words) < 1000
    for task in (
        Task("own", lambda split: [], lambda prompt, text: falls(text)),
        Task("own", lambda split: [], lambda prompt, text: Grade(0.0), grade_group=lambda prompt, group: falls(group)),
    ):
        with pytest.raises(TaskError, match=f"task own raised {type(fault).__name__}.*prompt p"):
            judge_group(task, Prompt("p", ()), SIBLINGS)


def test_ctrl_c_in_the_middle_of_a_reward_stays_ctrl_c():
    import signal

    def interrupted(completion):
        signal.raise_signal(signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        grades(interrupted)


@pytest.mark.parametrize("none", [None, math.nan])
def test_a_null_answer_is_no_answer(none):
    def right(completion, answer):
        return None if answer is none else completion == answer

    task = reward_task(right, rows=[*ROWS, {"prompt": "say nothing", "answer": none}])
    assert task.gold is None
    assert reward_task(right, rows=ROWS).gold is not None
    everywhere = reward_task(right, rows=[{"prompt": f"say {i}", "answer": none} for i in range(5)])
    assert everywhere.gold is None
    assert math.isnan(everywhere.grade(everywhere.prompts("train")[0], "None").reward)


def test_null_in_a_file_is_no_answer(tmp_path):
    (tmp_path / "mine.py").write_text("def score(completion, answer):\n    return completion == answer\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "answer": null}\n{"prompt": "y", "answer": "2"}\n')
    knobs = TaskConfig(name=f"{tmp_path}/mine.py:score", data=f"{tmp_path}/rows.jsonl")
    assert open_task(Recipe(task=knobs)).gold is None
