"""The change of the mean reward is split exactly, and into the parts that it is made of."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from math import isnan, nan
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.view.decomposition import Answer, Change, Split, decompose, fitted_weights

EXACT = 1e-9

answers = st.builds(
    Answer,
    prompt=st.sampled_from("abcdef"),
    reward=st.one_of(st.floats(-100, 100), st.just(nan)),
    parts=st.dictionaries(st.sampled_from(("form", "right", "short")), st.floats(-10, 10), max_size=3),
    cut=st.booleans(),
    formed=st.booleans(),
    right=st.booleans(),
    label=st.sampled_from((None, "kind", "other")),
)
windows = st.lists(answers, max_size=12)


@settings(max_examples=150, deadline=None)
@given(windows, windows)
def test_the_parts_of_every_split_sum_to_the_change(before: list[Answer], after: list[Answer]) -> None:
    change = decompose(before, after)
    means = [[answer.reward for answer in window if not isnan(answer.reward)] for window in (before, after)]
    if not all(means):
        assert change is None
        return
    assert change is not None
    assert change.total.value == pytest.approx(fmean(means[1]) - fmean(means[0]), abs=EXACT)
    assert [split.name for split in change.splits] == ["functions", "prompts", "length", "outcome"]
    for split in change.splits:
        assert sum(term.value for term in split.terms) == pytest.approx(change.total.value, abs=EXACT)


def split_of(change: Change | None, name: str) -> dict[str, float]:
    assert change is not None
    found: Split = next(split for split in change.splits if split.name == name)
    return {term.name: term.value for term in found.terms}


def many(count: int, prompt: str, reward: float, **facts: bool) -> list[Answer]:
    return [Answer(prompt, reward, **facts) for _ in range(count)]


def test_prompts_that_are_drawn_alike_and_done_better_are_all_of_the_change() -> None:
    before = many(4, "easy", 0.5) + many(4, "hard", 0.0)
    after = many(4, "easy", 1.0) + many(4, "hard", 0.5)
    found = split_of(decompose(before, after), "prompts")
    assert found["the same prompts, done differently"] == pytest.approx(0.5)
    assert found["the same prompts, drawn more or less often"] == pytest.approx(0)


def test_prompts_that_are_done_alike_and_drawn_differently_are_all_of_the_change() -> None:
    before = many(2, "easy", 1.0) + many(6, "hard", 0.0)
    after = many(6, "easy", 1.0) + many(2, "hard", 0.0)
    found = split_of(decompose(before, after), "prompts")
    assert found["the same prompts, done differently"] == pytest.approx(0)
    assert found["the same prompts, drawn more or less often"] == pytest.approx(0.5)


def test_new_and_gone_prompts_count_by_their_distance_from_those_that_stay() -> None:
    before = many(4, "stays", 0.4) + many(4, "goes", 0.0)  # the ones that stay earn 0.4 of a mean of 0.2
    after = many(4, "stays", 0.5) + many(4, "comes", 1.0)
    found = split_of(decompose(before, after), "prompts")
    assert found["the same prompts, done differently"] == pytest.approx(0.1)
    assert found["prompts of the later window only"] == pytest.approx(0.5 * (1.0 - 0.5))
    assert found["prompts of the earlier window only"] == pytest.approx(0.5 * (0.4 - 0.0))


def test_windows_without_a_common_prompt_say_so() -> None:
    assert split_of(decompose(many(2, "a", 0.0), many(2, "b", 1.0)), "prompts") == {"no prompt in common": 1.0}


def test_prompts_of_one_kind_are_pooled() -> None:
    before = [replace(each, label="sums") for each in many(2, "a", 0.0)]
    after = [replace(each, label="sums") for each in many(2, "b", 1.0)]
    assert split_of(decompose(before, after), "prompts")["the same prompts, done differently"] == pytest.approx(1.0)


def test_an_answer_is_worth_what_its_form_and_its_rightness_are_worth() -> None:
    """From half to all well-formed, and from half to all of these right; form earns 0.2, a right answer 1.2."""
    before = many(4, "p", 0.0, formed=False) + many(2, "p", 0.2) + many(2, "p", 1.2, right=True)
    after = many(8, "p", 1.2, right=True)
    found = split_of(decompose(before, after), "outcome")
    # Middle rightness 0.75: a well-formed answer is worth 0.75 * 1.2 + 0.25 * 0.2. Middle form 0.75, rightness + 0.5.
    assert found["well-formed more or less often"] == pytest.approx(0.5 * (0.75 * 1.2 + 0.25 * 0.2))
    assert found["right more or less often, if well-formed"] == pytest.approx(0.75 * 0.5 * 1.0)
    assert [found[name] for name in ("malformed", "well-formed and wrong", "right")] == pytest.approx([0, 0, 0])


def test_what_the_same_outcome_earns_is_a_part_of_its_own() -> None:
    found = split_of(decompose(many(2, "p", 1.0, right=True), many(2, "p", 1.5, right=True)), "outcome")
    assert found["right"] == pytest.approx(0.5)


def test_being_cut_off_less_often_is_told_from_earning_more() -> None:
    before = many(5, "p", 0.0, cut=True) + many(5, "p", 1.0)
    after = many(10, "p", 1.2)
    found = split_of(decompose(before, after), "length")
    assert found["cut off more or less often"] == pytest.approx(0.5 * (1.1 - 0.0))
    assert found["ended by themselves"] == pytest.approx(0.75 * 0.2)


def test_reward_functions_count_by_the_weights_that_the_log_does_not_hold() -> None:
    draw = random.Random(0)

    def window(right: float, form: float) -> list[Answer]:
        drawn = [{"right": float(draw.random() < right), "form": float(draw.random() < form)} for _ in range(50)]
        return [Answer(f"p{i}", parts["right"] + 0.2 * parts["form"], parts) for i, parts in enumerate(drawn)]

    before, after = window(0.2, 0.5), window(0.9, 1.0)
    means = [{name: fmean(a.parts[name] for a in each) for name in ("right", "form")} for each in (before, after)]
    found = split_of(decompose(before, after), "functions")
    assert found["right"] == pytest.approx(means[1]["right"] - means[0]["right"])
    assert found["form"] == pytest.approx(0.2 * (means[1]["form"] - means[0]["form"]))
    assert found["the rest"] == pytest.approx(0, abs=EXACT)


def test_a_reward_that_is_no_sum_of_its_parts_leaves_a_rest() -> None:
    """The product of two parts that both double: no weights give 1, 1 and 4, but the terms sum all the same."""
    cases = [(1.0, 1.0, 1.0), (2.0, 1.0, 2.0), (2.0, 2.0, 4.0)]
    before, *_, after = ([Answer(f"{a}{b}", r, {"a": a, "b": b})] * 3 for a, b, r in cases)
    found = split_of(decompose([*before, Answer("x", 2.0, {"a": 1.0, "b": 2.0})], after), "functions")
    assert abs(found["the rest"]) > 0.01
    assert sum(found.values()) == pytest.approx(4.0 - 5 / 4, abs=EXACT)


def test_reward_functions_that_always_agree_are_told_as_one() -> None:
    before = [Answer("p", reward, {"a": reward, "b": reward}) for reward in (0.0, 1.0)]
    after = [Answer("p", 1.0, {"a": 1.0, "b": 1.0})]
    change = decompose(before, after)
    assert change is not None
    functions = change.splits[0]
    assert len(functions.terms) == 2  # one of the two, and the rest
    assert functions.notes["tied"] in (("a",), ("b",))
    assert fitted_weights(("a", "b"), before) in ({"a": 1.0}, {"b": 1.0})


def test_intervals_cover_the_true_change_about_as_often_as_they_say() -> None:
    """Twelve new prompts a window, whose siblings are alike: an interval over completions would be far too narrow."""
    draw = random.Random(1)

    def window(mean: float, name: str) -> list[Answer]:
        levels = [draw.gauss(mean, 1) for _ in range(12)]
        return [Answer(f"{name}{i}", draw.gauss(level, 0.1)) for i, level in enumerate(levels) for _ in range(8)]

    covered = 0
    for _ in range(60):
        change = decompose(window(0, "a"), window(0.5, "b"))
        assert change is not None
        assert change.total.half is not None
        covered += abs(change.total.value - 0.5) <= change.total.half
    assert 50 <= covered <= 60  # of 57 to be expected; intervals over completions would cover some 28


def test_a_prompt_of_both_windows_gives_a_narrower_interval_than_two_prompts() -> None:
    """Its own level is in both means, and cancels."""
    levels = [0.0, 1.0, 2.0, 3.0]
    pairs = {
        same: decompose(
            list(itertools.chain(*(many(2, f"p{i}", level) for i, level in enumerate(levels)))),
            list(
                itertools.chain(*(many(2, f"{'p' if same else 'q'}{i}", level + 1) for i, level in enumerate(levels)))
            ),
        )
        for same in (True, False)
    }
    halves = {same: change.total.half if change else None for same, change in pairs.items()}
    assert halves[True] == pytest.approx(0, abs=EXACT)
    assert (halves[False] or 0) > 1


def test_the_interval_of_paired_prompts_is_that_of_their_mean_difference() -> None:
    """1.96 standard errors of the mean of 0, 1, 2 and 3: sqrt(5 / 3) / 2."""
    before = list(itertools.chain(*(many(3, f"p{i}", 10.0 * i) for i in range(4))))
    after = list(itertools.chain(*(many(3, f"p{i}", 11.0 * i) for i in range(4))))
    change = decompose(before, after)
    assert change is not None
    assert change.total.half == pytest.approx(1.959964 * (5 / 3) ** 0.5 / 2)


def test_a_part_that_did_not_apply_counts_as_0() -> None:
    before = [Answer("a", 0.5, {"one": 0.5, "two": nan}), Answer("b", 1.0, {"one": 1.0})]
    after = [Answer("a", 3.0, {"one": 1.0, "two": 2.0}), Answer("b", 2.0, {"one": 2.0, "two": nan})]
    found = split_of(decompose(before, after), "functions")
    assert found["one"] == pytest.approx(1.5 - 0.75)
    assert found["two"] == pytest.approx(1.0)


def test_one_prompt_alone_has_no_interval() -> None:
    change = decompose(many(2, "p", 0.0), many(2, "p", 1.0))
    assert change is not None
    assert change.total.half is None
