"""Tasks whose answers are functions, graded by test cases in the sandbox."""

from __future__ import annotations

from typing import Any

import pytest

from minigrpo.config.schema import SandboxConfig
from minigrpo.errors import TaskError
from minigrpo.tasks.common.code_task import Problem, code_task, find_program, format_code_block, is_same_result
from minigrpo.types import Grade

pytestmark = pytest.mark.needs("linux")  # the sandbox runs nowhere else
DOUBLE = Problem(
    "double", ("n",), "Twice it.", [((2,), 4), ((0,), 0), ((-3,), -6), ((5,), 10)], "def double(n): return 2 * n"
)
OTHER = Problem("half", ("n",), "Half of it.", [((2,), 1)], "def half(n): return n / 2")


def graded(source: str, problem: Problem = DOUBLE) -> Grade:
    task = code_task([problem], test=[OTHER], sandbox=SandboxConfig(cpu_seconds=0.3))
    return task.grade(task.prompts("train")[0], format_code_block(source))


@pytest.mark.parametrize(
    ("body", "works", "passed"),
    [
        ("return 2 * n", 1.0, 1.0),
        ("return n + n if n > 0 else 0", 1.0, 0.75),
        ("return 'no'", 1.0, 0.0),
        ("return 4 // n * 2", 1.0, 0.25),
        ("raise ValueError", 0.0, 0.0),
        ("while True: pass", 0.0, 0.0),
        ("return 2 * n if n else [0] * 10 ** 9", 1.0, 0.25),
        ("import math\n    return math.prod((2, n))", 1.0, 1.0),
        ("import os\n    return 2 * n", 0.0, 0.0),
        ("return (", 0.0, 0.0),
        ("return object()", 0.0, 0.0),
    ],
)
def test_a_function_earns_the_share_of_its_cases(body: str, works: float, passed: float) -> None:
    grade = graded(f"def double(n):\n    {body}")
    assert grade.parts == {"works": works, "passed": passed}
    assert grade.reward == works + passed
    assert grade.solved is (passed == 1.0)
    assert bool(grade.notes) is (not works or "//" in body or "10 **" in body)


@pytest.mark.parametrize("failure", ["raise ValueError", "return object()", "return unknown"])
def test_all_cases_share_one_limit_of_time(failure: str) -> None:
    """Twelve cases that fail, each within the limit of 0.3 s, leave nothing for the one that would pass."""
    cases = [((n,), 2 * n) for n in range(-12, 1)]
    problem = Problem("double", ("n",), "Twice it.", cases)
    grade = graded(
        f"def double(n):\n    if n < 0:\n        sum(range(4 * 10**6))\n        {failure}\n    return 0", problem
    )
    assert grade.parts == {"works": 0.0, "passed": 0.0}
    brief = graded(f"def double(n):\n    if n < 0:\n        {failure}\n    return 0", problem)
    assert brief.parts == {"works": 1.0, "passed": 1 / 13}


def test_the_task_gives_right_answers_for_both_splits() -> None:
    task = code_task([DOUBLE], test=[OTHER])
    assert task.gold is not None
    for split, name in (("train", "double"), ("test", "half")):
        prompt = task.prompts(split)[0]  # type: ignore[arg-type]
        assert prompt.id == name
        assert f"Write {name}(n)." in str(prompt.messages[-1]["content"])
        assert task.grade(prompt, task.gold(prompt)).solved
    assert code_task([Problem("f", (), "", [((), 1)]), OTHER]).gold is None


def test_neither_split_is_empty_and_none_share_a_problem() -> None:
    for count in range(2, 40):
        task = code_task([Problem(f"f{place}", (), "", [((), 1)]) for place in range(count)])
        train, test = ({prompt.id for prompt in task.prompts(split)} for split in ("train", "test"))
        assert train
        assert test
        assert not train & test
        assert len(train | test) == count


def test_problems_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(TaskError, match="double has no case"):
        code_task([Problem("double", ("n",), "", []), OTHER])
    with pytest.raises(TaskError, match="Two problems are called half"):
        code_task([OTHER, OTHER])
    with pytest.raises(TaskError, match="at least two problems"):
        code_task([OTHER])


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        *((1, 1, True), (2.0, 2, True), (True, 1, False), (1, True, False), (True, True, True), (None, None, True)),
        *(([1], (1,), False), ([1, [2]], [1, [2]], True), ([1], [1, 2], False), ("1", 1, False), ("a", "a", True)),
        *((float("nan"), float("nan"), True), (float("nan"), 1.0, False), (10**400, 1.5, False), (0, None, False)),
        *(
            ({"a": 1}, {"a": 1}, True),
            ({"a": True}, {"a": 1}, False),
            ({"a": 1}, {"b": 1}, False),
            ([True], [1], False),
        ),
    ],
)
def test_answers_are_compared_by_value_and_kind(answer: Any, expected: Any, same: bool) -> None:
    assert is_same_result(answer, expected) is same


def test_words_may_stand_around_the_block_and_lines_may_end_as_they_like() -> None:
    text = "Surely:\n\n```py\ndef f(a):\r\n    return a\r\n```\nThat is all."
    assert find_program(text, "f", ["a"]).runs
    assert find_program("```\ndef f(a, b: list[int] | None) -> tuple[int, ...]: ...\n```", "f", ["a", "b"]).runs


def test_helpers_inside_may_be_generators_and_have_defaults() -> None:
    inside = "def f(n):\n    def g(k=1):\n        yield k\n    return sum(g()) + n"
    assert find_program(format_code_block(inside), "f", ["n"]).runs
