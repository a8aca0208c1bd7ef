"""Prompts to graded groups, with a scripted engine; and which prompts a step takes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigrpo.engines.scripted import Scripted
from minigrpo.errors import TaskError
from minigrpo.rollout import PromptSampler, prompts_of, rollout
from minigrpo.types import Grade, Prompt, Sampling

PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": str(i)},)) for i in range(20)]


def roll(task, script, tokenizer, n=2, max_tokens=50):
    prompts = task.prompts("train")[:3]
    sampling = Sampling(max_tokens=max_tokens)
    return rollout(Scripted(script, tokenizer), task, prompts, n=n, sampling=sampling, tokenizer=tokenizer)


def test_every_prompt_comes_back_as_a_graded_group(echo_task, tokenizer):
    groups = roll(echo_task, ["1", "no"], tokenizer)
    assert [group.prompt.id for group in groups] == ["train-0", "train-1", "train-2"]
    assert [group.rewards for group in groups] == [(0.1, 0.0), (1.0, 0.0), (0.1, 0.0)]


def test_a_script_may_look_at_the_question(echo_task, tokenizer):
    groups = roll(echo_task, lambda prompt, sibling: prompt.target if sibling else "?", tokenizer)
    assert all(group.rewards == (0.0, 1.0) for group in groups)


def test_the_sample_is_its_token_ids_with_the_stop_token(echo_task, tokenizer):
    completion = roll(echo_task, ["12"], tokenizer)[0].completions[0]
    assert completion.token_ids == (*tokenizer.encode("12"), tokenizer.eos_token_id)
    assert completion.finish == "stop"
    assert len(completion.logprobs) == 3


def test_a_scripted_answer_is_cut_at_the_limit(echo_task, tokenizer):
    completion = roll(echo_task, ["1234"], tokenizer, max_tokens=4)[0].completions[0]
    assert (completion.text, completion.finish, len(completion.token_ids)) == ("1234", "length", 4)


def test_the_gold_answer_of_a_task_can_be_scripted(echo_task, tokenizer):
    groups = roll(echo_task, lambda prompt, _: echo_task.gold(prompt), tokenizer)
    assert all(grade.solved for group in groups for grade in group.grades)


def test_a_grader_that_raises_is_named_with_prompt_and_answer(echo_task, tokenizer):
    broken = replace(echo_task, grade=lambda prompt, text: Grade(1 / 0))
    with pytest.raises(
        TaskError, match=r"task echo raised ZeroDivisionError.*test_rollout.py:\d+.*train-0, answer 'hi'"
    ):
        roll(broken, ["hi"], tokenizer)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(echo_task, tokenizer, reward):
    broken = replace(echo_task, grade=lambda prompt, text: Grade(0.0, {"form": reward}))
    with pytest.raises(TaskError, match=r"task echo gave form = (nan|inf) on prompt train-0"):
        roll(broken, ["hi"], tokenizer)


def test_a_grader_that_returns_a_number_is_told_what_to_return(echo_task, tokenizer):
    with pytest.raises(TaskError, match=r"returned float.*Return a minigrpo\.Grade"):
        roll(replace(echo_task, grade=lambda prompt, text: 1.0), ["hi"], tokenizer)


def test_a_task_without_prompts_is_refused(echo_task):
    with pytest.raises(TaskError, match="Task echo has no test prompts"):
        prompts_of(replace(echo_task, prompts=lambda split: []), "test")


@given(st.integers(0, 100), st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_no_step_takes_a_prompt_twice(step, count, seed):
    taken = PromptSampler(PROMPTS, seed).take(step, count)
    assert len({prompt.id for prompt in taken}) == count


def test_what_a_step_takes_depends_on_seed_and_step_alone():
    straight = [PromptSampler(PROMPTS, 1).take(step, 8) for step in range(10)]
    assert [PromptSampler(PROMPTS, 1).take(step, 8) for step in reversed(range(10))] == straight[::-1]
    assert [PromptSampler(PROMPTS, 2).take(step, 8) for step in range(10)] != straight


def test_an_epoch_takes_every_prompt_once_and_the_next_is_shuffled_anew():
    sampler = PromptSampler(PROMPTS, 0)
    epochs = [[p.id for step in range(5) for p in sampler.take(5 * epoch + step, 4)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(p.id for p in PROMPTS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_too_few_prompts_come_as_copies_with_names_of_their_own():
    taken = PromptSampler(PROMPTS[:3], 0).take(0, 8)
    assert len({prompt.id for prompt in taken}) == 8
    assert {prompt.id.partition("#")[0] for prompt in taken} == {"p0", "p1", "p2"}
