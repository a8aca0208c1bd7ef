"""Tasks of reasoning-gym: what it gives is told apart, graded by its own scorer, and refused in a sentence."""

import builtins

import pytest

from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.errors import TaskError
from minigrpo.tasks.registry import open_task


def gym(name="leg_counting", seed=0, size=32):
    return open_task(Recipe(seed=seed, task=TaskConfig(name=f"rg:{name}", size=size)))


@pytest.mark.extra("reasoning-gym")
def test_problems_are_the_same_for_a_seed_and_never_on_both_sides():
    train, test = gym().prompts("train"), gym().prompts("test")
    assert gym().prompts("train") == train
    assert gym(seed=1).prompts("test") == test
    assert gym(seed=1).prompts("train") != train
    assert len(train) == 32
    assert not {prompt.messages for prompt in map(hashable, train)} & {p.messages for p in map(hashable, test)}


def hashable(prompt):
    from dataclasses import replace

    return replace(prompt, messages=tuple(message["content"] for message in prompt.messages))


@pytest.mark.extra("reasoning-gym")
def test_a_right_answer_earns_all_and_a_wrong_one_its_form_alone():
    task = gym()
    prompt = task.prompts("train")[0]
    right = task.grade(prompt, task.gold(prompt))
    assert (right.parts, right.solved) == ({"score": 1.0, "format": 1.0}, True)
    wrong = task.grade(prompt, "<think></think><answer>-1</answer>")
    assert (wrong.parts, wrong.solved) == ({"score": 0.0, "format": 1.0}, False)
    assert task.grade(prompt, prompt.target["answer"]).reward == 0.0


@pytest.mark.extra("reasoning-gym")
def test_crumbs_for_wrong_answers_are_nothing():
    task = gym("chain_sum")  # its scorer gives 0.01 and more for any wrong text
    for prompt in task.prompts("train")[:8]:
        assert task.grade(prompt, "<think></think><answer>none</answer>").parts["score"] == 0.0


@pytest.mark.extra("reasoning-gym")
def test_a_name_that_reasoning_gym_does_not_know_is_refused_with_the_nearest():
    with pytest.raises(TaskError, match=r"no data set 'leg_countin'. Did you mean rg:leg_counting\?"):
        gym("leg_countin")
    with pytest.raises(TaskError, match=r"task\.data has no meaning for rg:leg_counting"):
        open_task(Recipe(task=TaskConfig(name="rg:leg_counting", data="x.jsonl")))


def test_without_the_package_its_pip_line_is_told(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TaskError, match=r"pip install 'minigrpo\[reasoning-gym\]'"):
        gym()
