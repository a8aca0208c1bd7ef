"""Finding answers and numbers in whatever a model writes, and summing rewards."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest

from minigrpo.errors import TaskError
from minigrpo.tasks.common.answers import (
    ParsedNumber,
    TaggedAnswer,
    find_answer,
    parse_fraction,
    parse_number,
    read_number,
    same_number,
)
from minigrpo.tasks.common.rewards import Reward, graded, reweighted
from minigrpo.types import Prompt

PROMPT = Prompt("p", ())


def test_an_answer_is_found_after_the_reasoning() -> None:
    assert find_answer("<think>23+8=31</think><answer> 31 </answer>") == TaggedAnswer("23+8=31", "31")
    assert find_answer("Well.\n<think>\na\n</think>\n<answer>\n31\n</answer>\n") == TaggedAnswer("a", "31")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "31",
        "<answer>31</answer>",
        "<think>a</think>31",
        "<think>a</think><answer>31",
        "<think>a<answer>31</answer>",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer> \n</answer>",
        "<think>a</think><answer>1</answer><answer>2</answer>",
        "<think>a</think><answer>1<answer>2</answer></answer>",
        "<think>a</think></answer>31<answer>",
        "<think><answer>31</answer></think>",
        "<think>the <answer> tag</think><answer>31</answer>",
        "<answer>31</answer><think>a</think>",
        "<think>a</think><think>b</think><answer>31</answer>",
        "<think>a</think><answer>31</think></answer>",
        "<THINK>a</THINK><ANSWER>31</ANSWER>",
    ],
)
def test_a_broken_form_holds_no_answer(text: str) -> None:
    assert find_answer(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("28", 28),
        ("-5", -5),
        ("−5", -5),
        ("+5", 5),
        ("007", 7),
        ("1,200", 1200),
        ("1,234,567.50", Decimal("1234567.5")),
        ("$1200", 1200),
        ("-$3", -3),
        ("$-3", -3),
        ("1200.0", 1200),
        ("28.", 28),
        ("40%", 40),
        ("20 €", 20),
        ("- 5", -5),
        ("１，２００", 1200),
        ("1.2e3", 1200),
        ("1e9", 10**9),
        (".5", Decimal("0.5")),
    ],
)
def test_a_number_is_read_as_people_write_it(text: str, number: int | Decimal) -> None:
    assert parse_number(text) == number
    assert same_number(text, number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "apples",
        "28 apples",
        "2 8",
        "12,00",
        ",5",
        "1e999",
        "1e",
        "0x1c",
        "inf",
        "nan",
        "--5",
        "-$-5",
        "٢٨",
        "²",
        "1/2",
        "5-",
    ],
)
def test_anything_else_is_no_number(text: str) -> None:
    assert parse_number(text) is None


def test_a_fraction_is_a_number_in_lowest_terms_alone() -> None:
    assert parse_fraction("1/2") == parse_fraction(" 1 / 2 ") == Fraction(1, 2)
    assert parse_fraction("-$3/4") == Fraction(-3, 4)
    assert [parse_fraction(text) for text in ("144/2", "2/4", "1/0", "0/1", "1/2/3", "x/2", "9" * 99 + "/2")] == [
        None
    ] * 7


def test_one_number_is_found_among_words_with_its_sign() -> None:
    assert read_number("72 apples") == read_number("x = 72") == ParsedNumber(Fraction(72), False)
    assert read_number("it is -$5.") == read_number("minus 5 degrees") == ParsedNumber(Fraction(-5), False)
    assert read_number("$1,200.00") == ParsedNumber(Fraction(1200), True)
    assert [read_number(text) for text in ("", "none", "7 2", "7,2", "72²", "a.5", "1.2.3", "7" * 65)] == [None] * 8
    assert read_number("word " * 500 + "72") is None  # longer than anything that is read


def test_one_number_has_one_canonical_text() -> None:
    readings = [read_number(text) for text in ("1200", "1,200.0", "$1200", "1.2e3", "1200 coins")]
    assert {reading.canonical for reading in readings if reading} == {"1200"}
    assert None not in readings


def test_long_numbers_differ_in_their_last_digit() -> None:
    digits = "9" * 60
    assert same_number(digits, digits)
    assert not same_number("-" + digits[:-1] + "8", "-" + digits)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 10**6,
        "<think>a</think><answer>" + "9" * 10**6 + "</answer>",
        "<think>a</think><answer>" + "1," * 10**6 + "</answer>",
        "<think>" * 10**5,
        "<answer>" * 10**5 + "</answer>" * 10**5,
        "<" * 10**6,
        " " * 10**6 + "1",
        "\x00\ud800" * 10**5,
    ],
    ids=["digits", "digits in tags", "commas", "think", "answers", "angles", "spaces", "not text"],
)
def test_a_hostile_text_is_parsed_quickly(text: str) -> None:
    start = time.perf_counter()
    found = find_answer(text)
    assert parse_number(text) is None
    assert found is None or parse_number(found.text) is None
    assert time.perf_counter() - start < 1.0


def test_rewards_are_weighted_and_summed_and_their_parts_are_not_weighted() -> None:
    rewards = (Reward("right", 1.0, lambda p, t: 1.0), Reward("short", 0.25, lambda p, t: -float(len(t))))
    grade = graded(rewards, PROMPT, "four", formed=True, solved=False)
    assert grade.reward == 1.0 - 0.25 * 4
    assert grade.parts == {"right": 1.0, "short": -4.0}
    assert grade.weights == {"right": 1.0, "short": 0.25}
    assert (grade.formed, grade.solved) == (True, False)


def test_weights_are_replaced_by_name() -> None:
    rewards = (Reward("right", 1.0, lambda p, t: 1.0), Reward("form", 0.2, lambda p, t: 1.0))
    assert [reward.weight for reward in reweighted(rewards, {"form": 0.0})] == [1.0, 0.0]


def test_an_unknown_or_unusable_weight_is_refused() -> None:
    rewards = (Reward("right", 1.0, lambda p, t: 1.0),)
    with pytest.raises(TaskError, match=r"names rigth.*Its rewards: right"):
        reweighted(rewards, {"rigth": 1.0})
    with pytest.raises(TaskError, match="finite"):
        reweighted(rewards, {"right": float("nan")})
    with pytest.raises(TaskError, match="share a name"):
        reweighted(rewards * 2, {})


@pytest.mark.parametrize("value", [None, "much", float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_named(value: object) -> None:
    rewards = (Reward("odd", 1.0, lambda p, t: value),)  # type: ignore[arg-type, return-value]
    with pytest.raises(TaskError, match=r"odd gave .* for prompt p"):
        graded(rewards, PROMPT, "", formed=True, solved=False)
