"""Reward functions that strangers bring: what they give is what is counted, and whatever else they do is a sentence."""

from __future__ import annotations

import builtins
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.helpers.command_line import DONE, REFUSED, UNFIT, Ended, called, started
from tests.strangers import LIMIT_S, cases

pytestmark = [pytest.mark.long, pytest.mark.timeout(LIMIT_S)]

LONG = "and so on " * 10_000
"""The very long answer that check-task tries."""
ROWS = 'rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(6)]\n'
HEAD = """
import asyncio
import decimal
import fractions
import functools
import sys
import types

class Shapeless:
    def __float__(self):
        raise RuntimeError("a tensor of two numbers")
    def __repr__(self):
        raise RuntimeError("no picture")

class Half:
    def __float__(self):
        return 0.5

class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no words")

class Outcome(BaseException):
    pass

def fall(fault):
    raise fault

"""

# What a function gives for a text, as Python, and what that is worth.


@dataclass(frozen=True)
class Gift:
    """An expression over `text`. `worth` of a text: None where the function does not apply; no `worth`: it is refused,
    in a sentence with these words."""

    code: str
    worth: Callable[[str], float | None] | None = None
    words: str = ""


def number(code: str, worth: float) -> Gift:
    return Gift(code, lambda text: worth)


finite = st.floats(-1e16, 1e16) | st.integers(-(10**16), 10**16)
given_numbers = (
    finite.map(lambda value: number(repr(value), float(value)))
    | finite.map(lambda value: number(f"decimal.Decimal({str(value)!r})", float(value)))
    | st.fractions(-5, 5).map(lambda value: number(f"fractions.Fraction({str(value)!r})", float(value)))
    | st.sampled_from([number("True", 1), number("False", 0), number("Half()", 0.5), number("-0.0", 0)])
    | st.sampled_from(
        [
            Gift("len(text)", lambda text: float(len(text))),
            Gift("-len(text) / 7", lambda text: -len(text) / 7),
            Gift("text == 'and so on ' * 10_000", lambda text: float(text == LONG)),
            Gift("text.count('o')", lambda text: float(text.count("o"))),
        ]
    )
)
nothing = st.sampled_from(
    [Gift("None", lambda text: None), Gift("1 if text else None", lambda text: 1.0 if text else None)]
)
no_numbers = (
    st.sampled_from(["float('nan')", "float('inf')", "-float('inf')", "10**400", "decimal.Decimal('sNaN')", "1j"])
    | st.sampled_from(["'1'", "b'1'", "''", "[1.0]", "(1.0,)", "{}", "object()", "Shapeless()", "print", "...", "int"])
    | st.sampled_from(["(x for x in [1.0])", "types.SimpleNamespace(tolist=lambda: 1.0)", "range(1)", "{1.0}"])
).map(lambda code: Gift(code, words="Return a finite number"))
too_large = st.floats(1.1e16, allow_infinity=False).map(lambda value: Gift(repr(value), words="beyond 1e+16"))

raisable = sorted(
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and name == kind.__name__  # IOError is OSError
    if not name.endswith(("ExceptionGroup", "Warning"))
)
made_of_more = {
    "UnicodeDecodeError": "UnicodeDecodeError('utf-8', b'x', 0, 1, 'why')",
    "UnicodeEncodeError": "UnicodeEncodeError('utf-8', 'x', 0, 1, 'why')",
    "UnicodeTranslateError": "UnicodeTranslateError('x', 0, 1, 'why')",
}
faults = (
    st.sampled_from(raisable).map(lambda name: (name, made_of_more.get(name, f"{name}('why')")))
    | st.sampled_from(["UnspeakableError", "Outcome", "asyncio.CancelledError"]).map(lambda name: (name, f"{name}()"))
    | st.sampled_from(
        [
            ("ExceptionGroup", "ExceptionGroup('two', [ValueError(), TypeError()])"),
            ("BaseExceptionGroup", "BaseExceptionGroup('two', [SystemExit(1), ValueError()])"),
            ("ValueError", "ValueError('x' * 10_000)"),
            ("ValueError", "ValueError('[red]{half} \\ud800 \\x1b[2J')"),
            ("SystemExit", "SystemExit(0)"),
        ]
    )
)
raised = faults.map(lambda fault: Gift(f"fall({fault[1]})", words=f"raised {fault[0].rpartition('.')[2]}"))

# How a function is made.

per_row = (
    "def score(completion):",
    "def score(prompt, completion, answer, more=1, **rest):",
    "async def score(completion):",
    "@functools.cache\ndef score(completion):",
    "score = [one := lambda completion: made(completion)]\ndef made(completion):",
    "score = lambda completion: made(completion)\ndef made(completion):",
    "score = functools.partial(lambda by, completion: made(completion), 2)\ndef made(completion):",
    "score = functools.partial(lambda completion, by: made(completion), by=2)\ndef made(completion):",
    "score = type('Made', (), {'__call__': lambda self, completion: made(completion)})()\ndef made(completion):",
    "score = type('Made', (), {'one': lambda self, completion: made(completion)})().one\ndef made(completion):",
)
per_group = (
    "def score(prompts, completions, **columns):",
    "async def score(completions, answer, **columns):",
    "score = type('M', (), {'__call__': lambda self, completions, **_: made(completions)})()\ndef made(completions):",
)
ROW_BODY = "\n    text = completion\n    return CODE\n"
LIST_BODY = "\n    return [CODE for text in completions]\n"
TUPLE_BODY = "\n    return tuple(CODE for text in completions)\n"
makes = st.sampled_from(per_row).map(lambda head: head + ROW_BODY) | st.builds(
    str.__add__, st.sampled_from(per_group), st.sampled_from([LIST_BODY, TUPLE_BODY])
)
wrong_lists = st.sampled_from(
    [
        "[]",
        "[1.0]",
        "[1.0] * 99",
        "None",
        "1.0",
        "'111'",
        "(1.0 for _ in completions)",
        "{1.0}",
        "{}",
        "iter([1.0])",
        "dict.fromkeys(completions, 1.0)",
        "[[1.0]] * len(completions)",
        "types.SimpleNamespace(tolist=lambda: [1.0])",
    ]
)


def checked(folder: Path, source: str, *, run: Callable[..., Ended] = called) -> Ended:
    (folder / "mine.py").write_text(source, encoding="utf-8")
    return run("check-task", "--task.name", f"{folder}/mine.py:score", "--task.seconds", "5", "--json")


def in_folder(source: str, **options: Any) -> Ended:
    with tempfile.TemporaryDirectory() as folder:
        return checked(Path(folder), source, **options)


@cases(100)
@given(makes, given_numbers | nothing)
def test_what_a_function_gives_is_what_is_counted(make: str, gift: Gift) -> None:
    ended = in_folder(HEAD + ROWS + make.replace("CODE", gift.code))
    found = json.loads(ended.out)
    assert gift.worth is not None
    for kind in found["kinds"]:
        for name, text in (("empty", ""), ("long", LONG)):
            if kind["name"] == name:
                worth = gift.worth(text)
                assert (kind["low"], kind["high"]) == (worth, worth), found
    assert ended.code == (DONE if found["ok"] else UNFIT)
    assert found["ok"] == (not [fault for fault in found["faults"] if fault["stops"]])
    assert found["prompts"] == {"train": 5, "test": 1}


@cases(100)
@given(makes, no_numbers | too_large | raised)
def test_what_is_no_reward_is_told_with_function_row_and_file(make: str, gift: Gift) -> None:
    ended = in_folder(HEAD + ROWS + make.replace("CODE", gift.code))
    event(gift.words)
    told = " ".join(fault["what"] for fault in json.loads(ended.out)["faults"])
    assert ended.code == UNFIT
    assert gift.words in told
    assert "mine.py: rows[" in told
    assert len(told) < 6000


@cases(100)
@given(wrong_lists, st.booleans())
def test_a_list_that_is_none_is_told(code: str, later: bool) -> None:
    head = "async def" if later else "def"
    ended = in_folder(f"{HEAD}{ROWS}{head} score(completions, **columns):\n    return {code}\n")
    (told, *_) = json.loads(ended.out)["faults"]
    assert ended.code == UNFIT
    assert "The reward function score gave" in told["what"]
    assert "mine.py: rows[" in told["what"]


# Files that cannot be opened. Each is refused with the file's name.

SCORE = "def score(completion, answer=None):\n    return len(completion)\n"
raising_files = faults.map(lambda fault: f"fall({fault[1]})\n")
raising_rows = faults.map(lambda fault: f"def rows():\n    fall({fault[1]})\n")
raising_generators = faults.map(lambda fault: f'def rows():\n    yield {{"prompt": "x"}}\n    fall({fault[1]})\n')
raising_tasks = faults.map(lambda fault: f"def score(recipe):\n    fall({fault[1]})\n")
wrong_rows = st.sampled_from(
    [
        "3",
        "None",
        "[]",
        "''",
        "'text'",
        "{}",
        "[3]",
        "[{}]",
        "[None]",
        "(x for x in [1])",
        "abs",
        "lambda: 3",
        "object()",
        "lambda: (lambda: 1)",
        "[{'prompt': 'x'}]",
        "[{3: 'x'}]",
        "[{'prompt': {'x'}}, {'prompt': 'y'}]",
        "lambda x: [x]",
        "[{'prompt': [{'role': 'assistant', 'tool_calls': [{'a': {1}}]}]}, {'prompt': [{}]}]",
        "iter(int, 1)",
        "type('Rows', (), {'__iter__': lambda self: fall(ValueError('why'))})()",
    ]
).map(lambda code: f"rows = {code}\n")
wrong_systems = st.sampled_from(["3", "['x']", "b'x'", "' '", "'\\ud800'", "abs"]).map(
    lambda code: f"{ROWS}system = {code}\n"
)
wrong_golds = st.sampled_from(["3", "'x'", "[]", "object()"]).map(lambda code: f"{ROWS}gold = {code}\n")
wrong_scores = st.sampled_from(
    [
        "score = 3",
        "score = None",
        "score = []",
        "score = [len, 3]",
        "score = 'text'",
        "score = abs",
        "score = int",
        "def score(): pass",
        "def score(completon): pass",
        "def score(a, b): pass",
        "def score(completion, /): pass",
        "def score(completion, wishes): pass",
        "def score(*completion): pass",
        "class score:\n    def __call__(self): pass",
        "score = 'judge:'",
        "score = ['judge:nowhere.yaml']",
        "score = 'classifier:nowhere'",
        "score = object()",
    ]
).map(lambda code: f"{ROWS}{code}\n")

no_python = st.sampled_from(
    [
        "def score(completion)\n",
        "  x = 1\ny",
        "x = '",
        "\0",
        "import nowhere_to_be_found",
        "x = 1/0",
        "(" * 300,
        "from mine import score",
        "return 3",
        "async def",
        "if True:\n\tx = 1\n        y = 2\n",
        "# coding: martian\n",
    ]
)
wrong_files = (
    (raising_files | raising_rows | raising_generators | wrong_rows | wrong_systems | wrong_golds).map(SCORE.__add__)
    | raising_tasks
    | wrong_scores
    | no_python
)


@cases(100)
@given(wrong_files)
def test_a_file_that_cannot_be_opened_is_refused_with_its_name(source: str) -> None:
    ended = in_folder(HEAD + source)
    assert "mine.py" in ended.refused
    assert len(ended.refused) < 1500


@cases(100)
@given(st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_that_are_no_python_are_refused_with_the_files_name(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mine.py").write_bytes(raw)
        ended = called("check-task", "--task.name", f"{folder}/mine.py:score")
    assert "mine.py" in ended.refused


# Functions beside the reward: the right answer, and whole tasks.

golds = st.sampled_from(["3", "None", "['x']", "b'x'", "'\\ud800'"]).map(
    lambda code: (f"{ROWS}def gold(prompt):\n    return {code}\n", "The `gold` of task score gave")
) | faults.map(
    lambda fault: (
        f"{ROWS}def gold(prompt):\n    fall({fault[1]})\n",
        f"The `gold` of task score raised {fault[0].rpartition('.')[2]}",
    )
)


@cases(100)
@given(golds)
def test_a_right_answer_that_is_none_is_refused_with_the_prompt(case: tuple[str, str]) -> None:
    source, words = case
    assert words in (told := in_folder(HEAD + source + SCORE).refused)
    assert "on prompt t" in told


TASK = """
from minigrpo import Grade, Prompt, Task
asked = [Prompt("a", ({"role": "user", "content": "x"},)), Prompt("b", ({"role": "user", "content": "y"},))]
def prompts(split):
    return asked[:1] if split == "train" else asked[1:]
def grade(prompt, text):
    return Grade(float(len(text)))
"""
tasks = faults.map(lambda fault: f"prompts = lambda split: fall({fault[1]})\n") | st.sampled_from(
    [
        "lambda split: 3",
        "lambda split: None",
        "lambda split: [3]",
        "3",
        "lambda split: []",
        "lambda: asked",
        "lambda split: (p for p in asked)",
        "lambda split: asked + asked",
        "lambda split: {'a': asked}",
    ]
).map(lambda code: f"prompts = {code}\n")


@cases(100)
@given(tasks)
def test_a_task_without_prompts_is_refused_with_its_name(source: str) -> None:
    told = in_folder(f"{HEAD}{TASK}{source}score = Task('mine', prompts, grade)\n").refused
    assert "task mine" in told


@cases(10)
@given(makes, given_numbers, raised, wrong_files)
def test_a_process_of_its_own_says_the_same(make: str, gift: Gift, fault: Gift, source: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def run(*args: str | Path) -> Ended:
            return started(*args, cwd=folder)

        found = json.loads(checked(folder, HEAD + ROWS + make.replace("CODE", gift.code), run=run).out)
        assert found["prompts"] == {"train": 5, "test": 1}
        ended = checked(folder, HEAD + ROWS + make.replace("CODE", fault.code), run=run)
        assert fault.words in ended.out
        assert checked(folder, HEAD + source, run=run).code == REFUSED
