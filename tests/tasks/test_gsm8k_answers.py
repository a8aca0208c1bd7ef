"""The reward of an answer to gsm8k, whatever a model writes, and majority votes among its samples."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.config.schema import Recipe
from minigrpo.evaluation.statistics import score_groups
from minigrpo.tasks.builtin import gsm8k
from minigrpo.tasks.common import math_answers
from minigrpo.tasks.registry import open_task
from minigrpo.types import Completion, Grade, Group, Prompt

pytestmark = pytest.mark.extra("math")
OPEN = open_task(Recipe.model_validate({"task": {"name": "gsm8k", "data": gsm8k.GENERATED_DATA}}))


@pytest.fixture(scope="module", autouse=True)
def math_verify_is_warm() -> None:
    """Load math-verify first: its first answers take a second, for the import and tables that are built on demand."""
    for text in (
        r"\frac{1}{2}",
        r"\boxed{-72}",
        "2^3",
        "2^{10}",
        r"-\frac{1}{2}",
        r"\boxed{\frac{1.5}{2}}",
        r"\boxed{2^3}",
    ):
        math_answers.read_answer(text)


def asked(gold: str) -> Prompt:
    return Prompt("p", ({"role": "user", "content": "?"},), {"answer": gold, "solution": ""})


def grade(text: str, gold: str = "72") -> Grade:
    return OPEN.grade(asked(gold), text)


def tagged(answer: str) -> str:
    return f"<think>Let me see.</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *((text, "1200") for text in ("1200", "1,200", "$1200", "$1,200.00", "1200.00", "1200%", "1200.", "+1200")),
        *(
            (text, "1200")
            for text in ("1.2e3", "€1200", "1200 €", "$ 1,200", "１２００", " 1200 ", "$1200$", r"\$1,200")
        ),
        *((text, "1200") for text in ("1200°", r"1200^\circ", r"\(1200\)", r"\boxed{1,200}", r"\boxed{1{,}200}")),
        *((text, "-5") for text in ("-5", "−5", "–5", "- 5", "-$5", "$-5", "－５", "-5.0", r"\boxed{-5}")),
        *((text, "1/2") for text in ("0.5", ".5", "1/2", "1 / 2", r"\frac{1}{2}", r"\dfrac{1}{2}", r"$\frac{1}{2}$")),
        ("1.200", "6/5"),
        ("1/3", "1/3"),
        ("2^3", "8"),
        ("2^{10}", "1024"),
        ("0", "0"),
        ("-0", "0"),
    ],
)
def test_the_gold_number_alone_earns_everything(answer: str, gold: str) -> None:
    graded = grade(tagged(answer), gold)
    assert (graded.reward, graded.solved, graded.formed, graded.answer) == (1.0, True, True, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *((text, "72") for text in ("72 apples", "x = 72", "Total: $72", "72kg", "**72**", "~72", "72!", "USD 72")),
        *((text, "72") for text in (r"\boxed{72} apples", r"72 \text{ apples}", "about 72.0, I think", "(72)", "72/")),
        *((text, "72") for text in ("十 bags of 72", "a total-72", "Answer - 72")),
        *((text, "-5") for text in ("minus 5", "Negative 5", "x = -5", "it is −$5 now")),
        ("1,200 dollars", "1200"),
    ],
)
def test_the_gold_number_among_words_earns_half(answer: str, gold: str) -> None:
    graded = grade(tagged(answer), gold)
    assert (graded.reward, graded.solved, graded.formed, graded.answer) == (0.5, False, True, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *((text, "72") for text in ("71", "-72", "71 72", "72 or 71", "72 72", "71-72", "1720", "7 2", "7,2", "72,0")),
        *((text, "72") for text in ("172", "720", "72.5", "0.72", "72²", "٧٢", "⑦2 72", "x2 = 72", "seventy-two", "?")),
        *((text, "72") for text in ("144/2", r"\frac{144}{2}", "8*9", "48+24", r"8 \times 9", r"\sqrt{5184}")),
        *(
            (text, "72")
            for text in ("7" * 200, "9^9^9^9", "72^", "72^^1", "72^-1", "72^1^1", r"\frac72", r"\frac{72}{0}")
        ),
        *((text, "72") for text in ("72/1", "1,72", "72.72.72", "minus 72", "x = -72", "0x48", "72e9", "7e999")),
        ("1,2", "12"),
        (r"7\,2", "72"),
        (r"7\(2\)", "72"),
        (r"7$2^3", "373248"),
        ("1.200", "1200"),
        ("1 200", "1200"),
        ("12,00", "1200"),
        ("5", "-5"),
        ("2^-1", "2"),
        ("2^3^4", "8"),
        (r"3\frac{1}{2}", "7/2"),
    ],
)
def test_anything_else_earns_nothing(answer: str, gold: str) -> None:
    graded = grade(tagged(answer), gold)
    assert graded.reward == 0.0
    assert not graded.solved


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        "<answer>72</answer>",
        "<think>a</think>72",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer> </answer>",
        "<think>a <answer>72</answer></think>",
        "<think>a</think><answer>72</answer><answer>72</answer>",
        "<think>a</think><answer><answer>72</answer></answer>",
        "<answer>72</answer><think>a</think>",
        "<think>a</think><answer>72",
    ],
)
def test_a_broken_form_earns_nothing(text: str) -> None:
    graded = grade(text)
    assert (graded.reward, graded.formed, graded.answer) == (0.0, False, None)


def test_parts_for_the_form_are_logged_with_weight_zero() -> None:
    graded = grade("<think></think><answer>71</answer>")
    assert graded.parts == {"correct": 0.0, "one_tag": 1.0, "reasoned": 0.0}
    assert grade(tagged("72")).parts == {"correct": 1.0, "one_tag": 1.0, "reasoned": 1.0}
    assert grade("<answer>1</answer><answer>2</answer>").parts["one_tag"] == 0.0
    assert graded.weights == {"correct": 1.0, "one_tag": 0.0, "reasoned": 0.0}


def test_a_number_is_one_answer_however_it_is_written() -> None:
    assert {grade(tagged(text)).answer for text in ("1200", "1,200.0", "$1200", "1200 coins", r"\boxed{1200}")} == {
        "1200"
    }
    assert grade(tagged("many")).answer is None


def test_grading_works_outside_the_main_thread() -> None:
    found: list[Grade] = []
    worker = threading.Thread(target=lambda: found.append(grade(tagged(r"\frac{3}{4}"), "3/4")))
    worker.start()
    worker.join()
    assert found[0].reward == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "9" * 10**6,
        "1," * 10**6,
        "." * 10**6 + "72",
        "-" * 10**6,
        "1" + " " * 10**6 + "2",
        "{" * 10**6,
        "\\boxed{" * 14,
        "9^9^9^9^9^9",
        "99999999^99999999",
        "\\frac{" * 12 + "1",
        "((((((((2))))))))^{99}",
        "{{{{{{{{2}}}}}}}}^{99}",
        "\ud800" * 1000,
    ],
    ids=range(13),
)
def test_hostile_answers_are_graded_quickly(answer: str) -> None:
    start = time.thread_time()
    assert grade(tagged(answer)).reward == 0.0
    assert time.thread_time() - start < 0.05


PIECES = st.sampled_from(
    [
        r"\frac",
        r"\boxed",
        "{",
        "}",
        "^",
        "-",
        "7",
        "72",
        ",",
        ".",
        "$",
        "%",
        "(",
        ")",
        " ",
        "/",
        "e9",
        r"\left",
        "½",
        "x",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(PIECES, max_size=30).map("".join)), st.booleans())
def test_no_text_crashes_the_grader_or_slows_it_down(text: str, in_tags: bool) -> None:
    start = time.thread_time()
    graded = OPEN.grade(asked("72"), tagged(text) if in_tags else text)
    seconds = time.thread_time() - start
    assert graded.reward in (0.0, 0.5, 1.0)
    assert seconds < 0.05


def test_without_math_verify_notation_earns_nothing_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math_answers.load_parser.cache_clear()
    try:
        with pytest.warns(UserWarning, match="pip install 'minigrpo\\[math\\]'") as said:
            assert [grade(tagged(text)).reward for text in (r"\boxed{72}", r"\boxed{72}", "72")] == [0.0, 0.0, 1.0]
        assert len(said) == 1
    finally:
        math_answers.load_parser.cache_clear()


# A vote among samples


def group(*answers: str) -> Group:
    texts = [tagged(answer) if answer else "no idea" for answer in answers]
    completions = tuple(Completion(text, (1,), (0.0,), "stop") for text in texts)
    return Group(asked("72"), (1,), completions, tuple(grade(text) for text in texts))


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("72", "72", "5", "6", "7"), True),
        (("72", "$72", "72.0", "5", "5"), True),
        (("5", "72", "72 ", "5.0", "5"), False),
        (("72", "5", "5", "72"), True),
        (("5", "72", "72", "5"), False),
        (("", "", "", "72"), True),
        (("", "", ""), False),
        (("72 apples", "72 nuts", "5"), False),
        (("72 apples", "72", "5"), True),
    ],
)
def test_the_answer_that_most_samples_gave_wins_and_of_equals_the_first(answers: tuple[str, ...], right: bool) -> None:
    scores = score_groups([group(*answers)])
    assert scores.majority == float(right)
    assert [found.get("answer") for found in scores.answers] == [grade.answer for grade in group(*answers).grades]


def test_without_answers_to_compare_more_than_half_must_be_right() -> None:
    completion = Completion("", (1,), (0.0,), "stop")

    def marked(*solved: bool) -> Group:
        grades = tuple(Grade(float(right), solved=right) for right in solved)
        return Group(asked("72"), (1,), (completion,) * len(solved), grades)

    assert score_groups([marked(True, True, False), marked(True, False, False)]).majority == 0.5
