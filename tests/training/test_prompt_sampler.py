"""Which prompts a step asks."""

import json
from collections import Counter
from typing import Any

import pytest

from minigrpo.config.schema import EvalConfig, GroupsConfig, Recipe
from minigrpo.errors import ArtifactError, RecipeError
from minigrpo.training.prompt_sampler import PromptSampler, split_held_out
from minigrpo.types import Completion, Grade, Group, Prompt

PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": str(i)},)) for i in range(20)]


def answered(prompt: Prompt, right: int, of: int = 4) -> Group:
    completions = tuple(Completion("", (3,), (0.0,), "stop") for _ in range(of))
    return Group(prompt, (1, 2), completions, tuple(Grade(float(i < right), solved=i < right) for i in range(of)))


def names(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


@pytest.mark.parametrize("seed", [0, 7])
def test_every_prompt_comes_once_an_epoch_and_none_twice_in_a_step(seed: int) -> None:
    sampler = PromptSampler(PROMPTS, seed)
    epoch = [name for _ in range(5) for name in names(sampler.take(4))]
    assert sorted(epoch) == sorted(names(PROMPTS))
    assert [name for _ in range(5) for name in names(sampler.take(4))] != epoch


def test_what_is_left_over_at_the_end_of_an_epoch_waits_for_the_next() -> None:
    sampler = PromptSampler(PROMPTS, 0)
    taken = Counter(name for _ in range(20) for name in names(sampler.take(8)))
    assert max(taken.values()) <= 10


def test_a_step_that_takes_more_than_there_are_gets_copies_with_names_of_their_own() -> None:
    taken = names(PromptSampler(PROMPTS[:3], 0).take(8))
    assert len(set(taken)) == 8
    assert {name.partition("#")[0] for name in taken} == {"p0", "p1", "p2"}


def test_more_prompts_for_a_step_are_none_that_it_has_had() -> None:
    sampler = PromptSampler(PROMPTS, 0)
    step = names(sampler.take(8))
    for _ in range(3):
        step += names(sampler.more(4))
    assert sorted(step) == sorted(names(PROMPTS))
    assert sampler.more(4) == []


def test_a_mastered_prompt_rests_for_some_epochs_and_is_then_tried_again() -> None:
    sampler = PromptSampler(PROMPTS, 0, GroupsConfig(rest=0.9, rest_epochs=2))
    for prompt in sampler.take(20):
        sampler.learn([answered(prompt, right=4 if prompt.id == "p3" else 2)])
    epochs = [names(sampler.take(19)) for _ in range(3)]
    assert "p3" not in epochs[0] + epochs[1]
    assert "p3" in epochs[2] + names(sampler.more(1))


def test_where_all_prompts_rest_all_are_woken() -> None:
    sampler = PromptSampler(PROMPTS, 0, GroupsConfig(rest=0.5))
    sampler.learn([answered(prompt, right=4) for prompt in sampler.take(20)])
    assert len(sampler.take(20)) == 20


def test_half_solved_prompts_come_more_often_by_the_stated_factor() -> None:
    sampler = PromptSampler(PROMPTS, 0, GroupsConfig(focus=3.0))

    def fare(prompt: Prompt) -> Group:
        return answered(prompt, right=2 if prompt.id in ("p0", "p1") else 4)

    taken: Counter[str] = Counter()
    for _ in range(2000):
        step = sampler.take(2)
        sampler.learn([fare(prompt) for prompt in step])
        taken.update(names(step))
    half = (taken["p0"] + taken["p1"]) / 2
    others = (4000 - 2 * half) / 18
    assert half / others == pytest.approx(4.0, rel=0.15)


@pytest.mark.parametrize("knobs", [GroupsConfig(), GroupsConfig(rest=0.9, focus=2.0)])
def test_a_restored_sampler_goes_on_where_the_other_stood(knobs: GroupsConfig) -> None:
    def step(sampler: PromptSampler, number: int) -> list[str]:
        taken = [*sampler.take(4), *sampler.more(2)]
        sampler.learn([answered(prompt, right=(number + len(prompt.id)) % 5) for prompt in taken])
        return names(taken)

    whole = PromptSampler(PROMPTS, 1, knobs)
    straight = [step(whole, number) for number in range(12)]
    first = PromptSampler(PROMPTS, 1, knobs)
    begun = [step(first, number) for number in range(5)]
    state: dict[str, Any] = json.loads(json.dumps(first.state()))
    second = PromptSampler(PROMPTS, 1, knobs)
    second.restore(state)
    assert begun + [step(second, number) for number in range(5, 12)] == straight


def test_a_state_of_more_prompts_than_there_are_is_refused() -> None:
    sampler = PromptSampler(PROMPTS, 0)
    sampler.take(4)
    with pytest.raises(ArtifactError, match="more prompts than the 5"):
        PromptSampler(PROMPTS[:5], 0).restore(sampler.state())


def test_held_out_prompts_are_kept_aside_only_where_they_are_asked_for() -> None:
    recipe = Recipe.model_validate({"eval": {"every": 5, "held_out": 6}})
    training, aside = split_held_out(PROMPTS, recipe.eval, recipe.seed)
    assert len(aside) == 6
    assert sorted(names(training) + names(aside)) == sorted(names(PROMPTS))
    assert split_held_out(PROMPTS, EvalConfig(), 0) == (PROMPTS, [])


def test_keeping_all_prompts_aside_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"eval\.held_out keeps 64 of the 20"):
        split_held_out(PROMPTS, EvalConfig(every=5), 0)
