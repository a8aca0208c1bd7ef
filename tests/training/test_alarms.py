"""Each alarm is raised by what it is about, says so once, and a healthy run hears none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.fields import fields_by_name, sections
from minigrpo.config.schema import Recipe
from minigrpo.training.monitor.alarms import ALARMS, Alarms
from tests.helpers.curves import DECAYS, EXPLODES, HEALTHY, HEALTHY_FAST, rows

CALM = {"reward": 0.5, "reward_std": 0.4, "informative_groups": 0.8, "accuracy": 0.3, "format": 0.9}
CALM |= {"completions/clipped_ratio": 0.05, "completions/mean_length": 100.0, "entropy": 0.5, "engine_gap": 1e-6}
CALM |= {"rewards/correct/std": 0.45, "skipped": 0.0}
TIE = {"reward_std": 0.0, "informative_groups": 0.0, "rewards/correct/std": 0.0}
ZERO = CALM | TIE | {"reward": 0.0, "accuracy": 0.0}
UNFORMED = ZERO | {"format": 0.0}


def heard(steps: list[dict[str, Any]], **knobs: Any) -> list[tuple[int, str]]:
    """Return (step, message) of every alarm raised."""
    alarms = Alarms(Recipe.model_validate(knobs))
    return [(step, text) for step, row in enumerate(steps, start=1) for text in alarms.after(step, row)]


def ramp(name: str, first: float, last: float, steps: int) -> list[dict[str, Any]]:
    return [CALM | {name: first + (last - first) * step / (steps - 1)} for step in range(steps)]


RAISED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "unformed": ([UNFORMED] * 5, "every one of the 320 completions earned 0 and none had the asked-for form"),
    "broken": ([CALM] * 3 + [UNFORMED] * 5, "which 90% had had before"),
    "too hard": ([ZERO] * 5, "earned 0, though 90% had the asked-for form"),
    "constant reward": ([ZERO | {"reward": 0.7}] * 5, "earned the same 0.7"),
    "all solved": ([CALM | TIE | {"accuracy": 1.0}] * 5, "every one of the 320 completions was solved"),
    "tied": ([CALM | TIE | {"rewards/correct/std": 0.5}] * 5, "each prompt is solved always or never"),
    "truncated": ([CALM | {"completions/clipped_ratio": 0.95}] * 5, "95% of the completions of the last 5 steps"),
    "reward hacking": (ramp("reward", 0.3, 0.9, 20), "the reward rose by 0.32 while accuracy changed by +0"),
    "reward fell": ([CALM | {"reward": 0.9}] * 5 + [CALM | {"reward": 0.2}] * 6, "fell to 0.48; it had been 0.9"),
    "entropy collapse": (
        [CALM] * 5 + [CALM | {"entropy": 0.01, "informative_groups": 0.2}] * 5,
        "Entropy is 0.01 nats, it began at 0.5",
    ),
    "length explosion": (
        [CALM] * 5 + [CALM | {"completions/mean_length": 300.0}] * 5,
        "220 tokens, they began with 100",
    ),
    "length collapse": ([CALM] * 5 + [CALM | {"completions/mean_length": 10.0}] * 5, "28 tokens, they began with 100"),
    "engine mismatch": ([CALM | {"engine_gap": 0.1}] * 3, "disagree by 0.1 nats a token"),
    "form lost": ([CALM] * 5 + [CALM | {"format": 0.4}] * 5, "60% of the completions have the asked-for form; 90% had"),
    "too easy": ([CALM | {"informative_groups": 0.05, "accuracy": 0.98}] * 10, "only 5% of the groups compared"),
    "KL": ([CALM | {"kl": 3.0}] * 5, "3 nats a token away"),
    "skipped": ([CALM, CALM | {"skipped": 1.0}, CALM, CALM | {"skipped": 1.0}], "not finite in 2 of the last 4 steps"),
    "unscored": ([CALM | {"unscored": 0.3}] * 5, "30% of the completions of the last 5 steps could not be scored"),
    "resampling in vain": (
        [CALM | {"resample/tried": 16.0, "resample/found": 0.5}] * 10,
        "tried 16 more prompts a step and found 0.5",
    ),
}


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.name)
def test_an_alarm_says_what_it_saw_as_soon_as_it_can_and_alone(alarm: Any) -> None:
    steps, words = RAISED[alarm.name]
    said = heard(steps)
    assert len(said) == 1, said
    assert words in said[0][1]
    assert said[0][1].startswith(f"alarm, {alarm.name}: ")  # by which docs/alarms.md lists it
    assert "\n" not in said[0][1]
    assert "nan" not in said[0][1].split()


@pytest.mark.parametrize("curve", [HEALTHY, HEALTHY_FAST], ids=["healthy", "healthy fast"])
def test_a_healthy_run_hears_nothing(curve: str) -> None:
    assert heard(rows(curve)) == []


def test_a_reward_that_is_always_zero_is_explained_within_five_steps() -> None:
    for dead in (UNFORMED, ZERO):
        assert [step for step, _ in heard([dead] * 6)] == [5]


def test_a_run_that_broke_or_decays_is_told_to_take_a_lower_rate() -> None:
    for curve in (EXPLODES, DECAYS):
        assert any("train.lr" in text for _, text in heard(rows(curve)))


@pytest.mark.parametrize(
    "steps",
    [
        # Entropy that falls because the task is solved.
        [CALM] * 5 + [CALM | {"entropy": 0.01, "accuracy": 0.97, "informative_groups": 0.2, "reward": 1.0}] * 20,
        # Longer, or much shorter, and better for it.
        [CALM] * 5 + [CALM | {"completions/mean_length": 400.0, "accuracy": 0.6, "reward": 0.8}] * 20,
        [CALM] * 5 + [CALM | {"completions/mean_length": 10.0, "accuracy": 0.6, "reward": 0.8}] * 20,
        # The reward rises because the form is learned first.
        [row | {"format": row["reward"]} for row in ramp("reward", 0.3, 0.9, 20)],
        # A bare reward function, for which nothing counts as solved.
        [row | {"accuracy": 0.0} for row in ramp("reward", 0.3, 0.9, 20)],
        # Half of the steps have nothing to compare: prompts are hard, not all alike.
        [CALM | (TIE if step % 2 else {}) for step in range(30)],
        # Nothing but the reward is known.
        [{"reward": 0.1}, {"reward": None}, {"reward": float("nan"), "entropy": None}] * 10,
        [{}] * 30,
    ],
)
def test_what_only_looks_alarming_is_not(steps: list[dict[str, Any]]) -> None:
    assert heard(steps) == []


def test_an_alarm_that_lasts_is_repeated_every_so_many_steps() -> None:
    assert [step for step, _ in heard([UNFORMED] * 30, watch={"every": 7})] == [5, 12, 19, 26]


def test_an_alarm_that_comes_and_goes_is_not_told_more_often() -> None:
    assert [step for step, _ in heard(([ZERO] * 5 + [CALM]) * 5, watch={"every": 20})] == [5, 29]


def test_a_resumed_run_says_nothing_twice_and_leaves_nothing_out() -> None:
    steps = [{"step": n, **row} for n, row in enumerate([CALM | {"kl": float("nan")}, *[UNFORMED] * 40], start=1)]
    logged = [json.loads(json.dumps(row).replace("NaN", "null")) for row in steps]
    whole = heard(steps)
    for cut in (3, 6, 7, 25, 26):
        alarms = Alarms.replayed(Recipe(), logged[:cut])
        rest = [(row["step"], text) for row in steps[cut:] for text in alarms.after(row["step"], row)]
        assert [said for said in whole if said[0] > cut] == rest


def test_what_rounding_explains_depends_on_the_number_type() -> None:
    gap = [CALM | {"engine_gap": 0.01}] * 3
    assert not heard(gap, model={"dtype": "bfloat16"})
    assert heard(gap, model={"dtype": "float32"})
    alarms = Alarms(Recipe(), sixteen_bit=False)
    assert [bool(alarms.after(step, row)) for step, row in enumerate(gap, start=1)] == [False, False, True]
    assert not heard([CALM | {"engine_gap": 0.1}] * 3, groups={"replay": 2})


def test_every_alarm_is_documented_and_names_knobs_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "alarms.md").read_text(encoding="utf-8")
    assert [name for name in RAISED if f"| {name} |" not in page] == []
    said = " ".join([page, *(text for steps, _ in RAISED.values() for _, text in heard(steps))])
    words = set(re.findall(r"\b[a-z]+\.[a-z_]+\b", said)) - {"groups.jsonl"}
    named = {word for word in words if word.partition(".")[0] in sections()}
    assert named
    assert not named - fields_by_name().keys()


def test_a_task_that_asks_for_no_form_is_not_said_to_have_it() -> None:
    """Such a task counts every answer as formed."""
    ((_, told),) = heard([ZERO | {"format": 1.0}] * 5)
    assert "completions earned 0. Either the task is too hard" in told


@pytest.mark.parametrize(("share", "alarms"), [(0.6, 1), (0.4, 0)])
def test_an_alarm_is_raised_where_more_answers_are_cut_off_than_end(share: float, alarms: int) -> None:
    assert len(heard([CALM | {"completions/clipped_ratio": share}] * 5)) == alarms
