"""Groups that teach: resampling and replay."""

import json
from collections.abc import Callable, Sequence

import pytest

from minigrpo.config.schema import GroupsConfig
from minigrpo.training.group_source import GroupSource, StepGroups
from minigrpo.training.prompt_sampler import PromptSampler
from minigrpo.types import Completion, Grade, Group, Prompt

PROMPTS = [Prompt(f"p{i}", ()) for i in range(40)]


def asker(teaching: Callable[[str], bool], asked: list[str] | None = None) -> Callable[[Sequence[Prompt]], list[Group]]:
    """Groups whose siblings differ where `teaching` says so."""

    def ask(prompts: Sequence[Prompt]) -> list[Group]:
        if asked is not None:
            asked.extend(prompt.id for prompt in prompts)
        return [group_of(prompt, teaching(prompt.id)) for prompt in prompts]

    return ask


def group_of(prompt: Prompt, teaches: bool) -> Group:
    completions = tuple(Completion("x", (3, i), (-0.1, -0.25 * i), "stop") for i in range(2))
    grades = (Grade(1.0, {"a": 1.0}, solved=True), Grade(0.0 if teaches else 1.0))
    return Group(prompt, (1, 2), completions, grades)


def spreads(group: Group) -> bool:
    return group.spread > 0


def source(**knobs: float) -> GroupSource:
    made = GroupsConfig(**knobs)
    return GroupSource(PromptSampler(PROMPTS, 0, made), 8, made)


def even(name: str) -> bool:
    return int(name[1:]) % 2 == 0


def test_without_a_budget_ties_stay_and_nothing_more_is_asked() -> None:
    asked: list[str] = []
    gathered = source().gather(0, asker(even, asked), spreads)
    assert len(asked) == 8
    assert gathered.groups == gathered.sampled == gathered.fair
    share = sum(map(even, asked)) / 8
    assert dict(gathered.figures) == {"informative_groups": share, "frac_reward_zero_std": 1 - share}


def test_ties_are_replaced_by_groups_of_further_prompts_within_the_budget() -> None:
    asked: list[str] = []
    gathered = source(resample=2.0).gather(0, asker(even, asked), spreads)
    assert all(map(spreads, gathered.groups))
    assert len(asked) == len(set(asked)) <= 8 + 16
    assert gathered.figures["resample/tried"] == len(asked) - 8
    assert gathered.figures["resample/found"] == sum(map(even, asked[8:]))


def test_a_hopeless_search_ends_with_its_budget_and_says_what_it_cost() -> None:
    asked: list[str] = []
    gathered = source(resample=1.5).gather(0, asker(lambda name: False, asked), spreads)
    assert len(asked) == 8 + 12
    assert not any(map(spreads, gathered.groups))
    assert (gathered.figures["resample/tried"], gathered.figures["resample/found"]) == (12, 0)


def test_progress_is_judged_by_the_groups_that_were_not_chosen_for_their_rewards() -> None:
    gathered = source(resample=2.0).gather(0, asker(even), spreads)
    assert len(gathered.fair) == 8
    assert not all(map(spreads, gathered.fair))
    assert set(map(id, gathered.others)) == set(map(id, gathered.sampled)) - set(map(id, gathered.groups))


def test_a_search_that_runs_out_of_prompts_ends() -> None:
    knobs = GroupsConfig(resample=10.0)
    short = GroupSource(PromptSampler(PROMPTS[:10], 0, knobs), 8, knobs)
    assert short.gather(0, asker(lambda name: False), spreads).figures["resample/tried"] == 2


def test_groups_of_the_last_steps_stand_in_for_ties_once_and_not_when_they_are_too_old() -> None:
    steps = source(replay=2)
    good = steps.gather(0, asker(lambda name: True), spreads)
    second = steps.gather(1, asker(lambda name: False), spreads)
    assert second.figures["replayed_groups"] == 8
    assert set(map(id, second.groups)) == set(map(id, good.groups))
    assert steps.gather(2, asker(lambda name: False), spreads).figures["replayed_groups"] == 0
    late = source(replay=2)
    late.gather(0, asker(lambda name: True), spreads)
    assert late.gather(3, asker(lambda name: False), spreads).figures["replayed_groups"] == 0


def test_no_prompt_is_learned_from_twice_in_a_step() -> None:
    steps = source(replay=5)
    for step in range(6):
        groups = steps.gather(step, asker(lambda name, step=step: (int(name[1:]) + step) % 3 == 0), spreads).groups
        assert len({group.prompt.id for group in groups}) == 8


@pytest.mark.parametrize("knobs", [{"replay": 3.0}, {"resample": 1.0, "replay": 2.0, "rest": 0.9, "focus": 1.0}])
def test_a_restored_source_gathers_what_the_other_would_have(knobs: dict[str, float]) -> None:
    def told(gathered: StepGroups) -> list[tuple[object, ...]]:
        return [(group.prompt, group.completions, group.grades) for group in gathered.groups]

    def run(steps: GroupSource, first: int, last: int) -> list[list[tuple[object, ...]]]:
        return [
            told(steps.gather(n, asker(lambda name, n=n: (int(name[1:]) * 7 + n) % 4 == 0), spreads))
            for n in range(first, last)
        ]

    straight = run(source(**knobs), 0, 10)
    first = source(**knobs)
    begun = run(first, 0, 4)
    second = source(**knobs)
    second.restore(json.loads(json.dumps(first.state())))
    assert begun + run(second, 4, 10) == straight
