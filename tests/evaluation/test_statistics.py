"""Scores of a model, and confidence intervals of differences."""

from dataclasses import replace
from math import comb, nan

import pytest

from minigrpo.errors import ArtifactError
from minigrpo.evaluation.evaluate import grade_prompts
from minigrpo.evaluation.statistics import paired_difference, pass_at_k, sign_test
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.types import Grade, Sampling
from minigrpo.utils.rates import wilson_interval


def grade_script(task, script, tokenizer, n=1, **options):
    prompts = options.pop("prompts", task.prompts("test"))
    sampling = Sampling(max_tokens=options.pop("max_tokens", 20))
    return grade_prompts(
        Scripted(script, tokenizer), task, prompts, n=n, sampling=sampling, tokenizer=tokenizer, **options
    )


def answer_first(count):
    """Return a script that is right on the first `count` test prompts (numbered from 20) and wrong on the rest."""
    return lambda prompt, _: prompt.target if int(prompt.target) < 20 + count else "999"


def test_scores_count_what_the_grades_say(echo_task, tokenizer):
    scores = grade_script(echo_task, lambda p, _: {"20": "20", "21": "99"}.get(p.target, "??"), tokenizer)
    assert scores.accuracy.value == pytest.approx(0.1)
    assert scores.formed.value == pytest.approx(0.2)
    assert (scores.accuracy_formed.value, scores.accuracy_formed.count) == (0.5, 2)
    assert scores.mean_reward == pytest.approx(0.11)
    assert scores.mean_tokens == 3
    assert scores.truncated.value == 0


def test_every_answer_is_kept(echo_task, tokenizer):
    scores = grade_script(echo_task, answer_first(1), tokenizer)
    first = scores.answers[0]
    assert first["prompt"] == "test-20"
    assert first["messages"] == [{"role": "user", "content": "say 20"}]
    assert (first["target"], first["text"], first["solved"], first["finish"]) == ("20", "20", True, "stop")
    assert first["parts"] == {"right": 1.0, "form": 1.0}
    assert len(scores.answers) == 10


def test_answers_cut_at_the_limit_are_counted(echo_task, tokenizer):
    assert grade_script(echo_task, ["123456"], tokenizer, max_tokens=3).truncated.value == 1


def test_several_samples_give_pass_at_k_and_majority(echo_task, tokenizer):
    three_of_four = grade_script(echo_task, lambda p, sibling: p.target if sibling else "no", tokenizer, n=4)
    assert three_of_four.accuracy.value == 0.75
    assert three_of_four.pass_at == {1: 0.75, 2: 1.0, 4: 1.0}
    assert three_of_four.majority == 1.0
    assert three_of_four.accuracy.count == 10  # prompts, not samples


def test_no_well_formed_answer_leaves_its_accuracy_open(echo_task, tokenizer):
    rate = grade_script(echo_task, ["?"], tokenizer).accuracy_formed
    assert (rate.value, rate.low, rate.high, rate.count) == (0.0, 0.0, 1.0, 0)


def test_batches_change_nothing_and_progress_is_reported(echo_task, tokenizer):
    told = []
    whole = grade_script(echo_task, answer_first(5), tokenizer)
    parts = grade_script(echo_task, answer_first(5), tokenizer, rows=4, report=lambda *told_now: told.append(told_now))
    assert parts == whole
    assert [done for done, _, note in told if "right" in note] == [4, 8, 10]
    assert told[-1][1:] == (10, "50% right")
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told), "between batches it never falls back"
    assert {total for _, total, _ in told} == {10}


def test_wilson_intervals_match_published_values():
    rate = wilson_interval(0.5, 10)
    assert (rate.low, rate.high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    none = wilson_interval(0.0, 20)
    assert (none.low, none.high) == (0.0, pytest.approx(0.1611, abs=1e-4))


def test_pass_at_k_is_the_chance_that_k_draws_hold_a_right_one():
    assert pass_at_k(2, 5, 1) == pytest.approx(2 / 5)
    assert pass_at_k(3, 5, 3) == 1.0


def test_mcnemar_is_exact():
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(2 / 2**5)
    assert sign_test(9, 2) == pytest.approx(2 * sum(comb(11, i) for i in range(3)) / 2**11)
    assert sign_test(2, 9) == sign_test(9, 2)


def test_a_pair_counts_what_was_gained_and_lost(echo_task, tokenizer):
    before, after = (grade_script(echo_task, answer_first(count), tokenizer) for count in (2, 9))
    change = paired_difference(before, after)
    assert (change.gained, change.lost) == (7, 0)
    assert change.difference == pytest.approx(0.7)
    assert change.low < 0.7 < change.high
    assert change.p == pytest.approx(2 / 2**7)
    assert paired_difference(after, before).difference == pytest.approx(-0.7)


def test_a_model_compared_with_itself_has_no_difference(echo_task, tokenizer):
    scores = grade_script(echo_task, answer_first(4), tokenizer)
    same = paired_difference(scores, scores)
    assert (same.difference, same.p) == (0.0, 1.0)
    assert same.low < 0 < same.high


def test_different_prompts_are_not_paired(echo_task, tokenizer):
    some = grade_script(echo_task, ["1"], tokenizer, prompts=echo_task.prompts("test")[:4])
    with pytest.raises(ArtifactError, match=r"different prompts \(10 and 4, 4 in common\)"):
        paired_difference(grade_script(echo_task, ["1"], tokenizer), some)


def test_completions_that_could_not_be_scored_are_not_right_and_not_in_the_mean(echo_task, tokenizer):
    def grade(prompt, text):
        if prompt.id == "test-20":
            return Grade(nan, formed=False, notes={"grader": "took longer than 1 s"})
        return echo_task.grade(prompt, text)

    with pytest.warns(UserWarning, match="took longer than 1 s"):
        scores = grade_script(replace(echo_task, grade=grade), lambda p, _: p.target, tokenizer)
    assert (scores.accuracy.value, scores.mean_reward) == (0.9, 1.0)
    assert scores.answers[0]["reward"] is None
    assert scores.answers[0]["notes"] == {"grader": "took longer than 1 s"}


def test_a_grader_beside_generation_changes_no_score(echo_task, tokenizer):
    with Grader(echo_task, workers=3) as grader:
        assert grade_script(echo_task, ["20"], tokenizer, grader=grader) == grade_script(echo_task, ["20"], tokenizer)
