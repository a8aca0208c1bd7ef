"""Prompts to graded groups, with a scripted engine; and which prompts a step takes."""

from dataclasses import replace

import pytest

from minigrpo.errors import ModelError, TaskError
from minigrpo.models.context_window import check_room
from minigrpo.rollouts.engines.scripted import Scripted
from minigrpo.rollouts.groups import prompts_of, rollout
from minigrpo.types import Grade, Prompt, Rendered, Sampling

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
        TaskError, match=r"task echo raised ZeroDivisionError.*test_groups.py:\d+.*train-0, answer 'hi'"
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


@pytest.mark.parametrize("max_tokens", [600, 500])
def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(tokenizer, max_tokens):
    short = Rendered(Prompt("short", ()), (1,) * 5)
    long = Rendered(Prompt("long", ()), (1,) * 300)
    check_room([short, long], 512 - 300, 512)
    check_room([short, long], max_tokens, None)
    with pytest.raises(ModelError, match=r"Prompt (short|long) has \d+ tokens.*more than the 512"):
        check_room([short, long], max_tokens, 512)
    with pytest.raises(ModelError, match=r"Prompt over has 512 tokens.* Leave it out"):
        check_room([Rendered(Prompt("over", ()), (1,) * 512)], 1, 512)
    for text, said in (
        ("2 + 2?", "Leave it out. Its messages are 6 bytes: the rest is what the chat"),
        ("你" * 171, "it out."),
    ):
        asked = Prompt("over", ({"role": "user", "content": text},))
        with pytest.raises(ModelError, match=rf"{said}( template adds\.)?$"):
            check_room([Rendered(asked, (1,) * 512)], 1, 512)
