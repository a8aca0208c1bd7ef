"""Evaluations and comparisons, with scripted models."""

import json

import pytest

from minigrpo.errors import ArtifactError, RecipeError
from minigrpo.evaluation.evaluate import compare, evaluate, pick_example_pairs, pick_examples
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.types import Sampling


@pytest.fixture
def judge(echo_task, tokenizer):
    def run(script, name="model", temperature=0.0, n=1, count=10):
        sampling = Sampling(temperature, max_tokens=20)
        prompts = echo_task.prompts("test")[:count]
        return evaluate(
            Scripted(script, tokenizer),
            echo_task,
            name=name,
            prompts=prompts,
            sampling=sampling,
            tokenizer=tokenizer,
            n=n,
        )

    return run


def half_right(prompt, sibling):
    return prompt.target if int(prompt.target) % 2 else "no"


def gold(prompt, sibling):
    return prompt.target


def test_an_evaluation_can_be_written_as_json_with_every_answer(judge):
    whole = json.loads(json.dumps(judge(half_right).to_dict()))
    assert whole["scores"]["accuracy"]["value"] == 0.5
    assert [answer["text"] for answer in whole["scores"]["answers"]][:2] == ["no", "21"]
    assert whole["sampling"] == {"temperature": 0.0, "max_tokens": 20, "seed": 0}


def test_a_summary_leaves_the_answers_out(judge):
    assert "answers" not in judge(gold).summary()["scores"]


def test_several_greedy_samples_are_refused(judge):
    with pytest.raises(RecipeError, match="4 samples at temperature 0 are all the same"):
        judge(gold, n=4)


def test_decodings_have_names(judge):
    assert judge(gold).decoding == "greedy"
    assert judge(gold, temperature=1.0).decoding == "temperature 1"
    assert judge(gold, temperature=0.7, n=4).decoding == "temperature 0.7 x 4 samples"


def test_a_comparison_pairs_the_prompts(judge):
    comparison = compare(judge(half_right, "base"), judge(gold, "tuned"))
    assert (comparison.change.gained, comparison.change.lost) == (5, 0)
    assert comparison.change.difference == pytest.approx(0.5)


def test_different_decodings_are_not_compared(judge):
    with pytest.raises(ArtifactError, match="base and tuned were evaluated differently"):
        compare(judge(gold, "base"), judge(gold, "tuned", temperature=1.0))


def test_different_prompts_are_not_compared(judge):
    with pytest.raises(ArtifactError, match="different prompts"):
        compare(judge(gold), judge(gold, count=4))


def test_examples_show_right_and_wrong_answers(judge):
    assert [answer["solved"] for answer in pick_examples(judge(half_right))] == [True, True, False, False]
    assert [answer["solved"] for answer in pick_examples(judge(gold))] == [True, True]


def test_pairs_of_examples_show_what_was_gained_first(judge):
    before, after = pick_example_pairs(compare(judge(half_right), judge(gold)))[0]
    assert before["prompt"] == after["prompt"]
    assert (before["solved"], after["solved"]) == (False, True)
