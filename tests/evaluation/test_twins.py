"""Twins: intervals over prompts where there is one draw, over draws where there are several."""

from xml.etree import ElementTree

import pytest

from minigrpo.evaluation.statistics import score_groups
from minigrpo.evaluation.twins import TwinComparison, TwinPair, render_twin_svg
from minigrpo.types import Completion, Grade, Group, Prompt
from minigrpo.utils.rates import mean_interval, student_t


def scores(rewards, tokens=3):
    """Scores of one answer to each prompt; right where it earns more than 0.5."""
    return score_groups(
        [
            Group(
                Prompt(f"p{i}", ()),
                (),
                (Completion("", (0,) * tokens, (), "stop"),),
                (Grade(reward, solved=reward > 0.5),),
            )
            for i, reward in enumerate(rewards)
        ]
    )


def test_the_interval_of_a_mean_is_students():
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.value, found.count) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.303 / 3**0.5)
    assert found.excludes_zero is False
    assert mean_interval([5.0]).low == float("-inf")
    # From tables: 2.120 for 16 degrees of freedom, 2.042 for 30, 1.980 for 120.
    assert [student_t(n) for n in (16, 30, 120)] == pytest.approx([2.120, 2.042, 1.980], abs=2e-3)


def test_one_draw_is_judged_over_its_prompts_and_several_over_the_draws():
    first, second = (
        TwinPair(scores([1, 1, 0, 1]), scores([0, 1, 0, 0]), 0.1),
        TwinPair(scores([1] * 4), scores([1] * 4), 0.3),
    )
    one, both = TwinComparison("x=1", (first,)), TwinComparison("x=1", (first, second))
    alone, together = ({figure.name: figure for figure in found.figures}["reward"] for found in (one, both))
    assert (alone.unchanged, alone.changed) == (0.75, 0.25)
    assert alone.difference == mean_interval([-1, 0, 0, -1])
    assert together.difference == mean_interval([-0.5, 0.0])
    assert (one.over, both.over) == ("4 prompts, one draw", "2 draws")
    assert both.differences("solved") == {"p0": -0.5, "p1": 0, "p2": 0, "p3": -0.5}
    assert both.kl.value == pytest.approx(0.2)


def test_a_reward_that_could_not_be_told_takes_its_prompt_out_of_the_reward_alone():
    pair = TwinPair(scores([1, float("nan")]), scores([0, 1]), 0.0)
    found = TwinComparison("x=1", (pair,))
    assert found.differences("reward") == {"p0": -1.0}
    assert found.differences("solved") == {"p0": -1.0, "p1": 1.0}


def test_a_pair_is_read_back_as_it_was_written():
    pair = TwinPair(scores([1, 0]), scores([0, 1]), 0.25)
    assert TwinPair.from_dict(pair.to_dict()) == pair


@pytest.mark.parametrize("draws", [1, 3])
def test_the_plot_has_a_line_for_each_twin_a_band_for_several_draws_and_a_bar_for_each_prompt(draws):
    pairs = tuple(TwinPair(scores([1, 0, 0]), scores([0, 1, 0]), 0.0) for _ in range(draws))
    curves = [[[(3.0, 0.5 + i / 10), (4.0, 0.6)] for i in range(draws)] for _ in range(2)]
    root = ElementTree.fromstring(render_twin_svg(TwinComparison("a<b", pairs), *curves))
    tags = [each.tag.rpartition("}")[2] for each in root]
    assert (tags.count("polyline"), tags.count("polygon"), tags.count("rect")) == (2, 2 * (draws > 1), 1 + 3)
