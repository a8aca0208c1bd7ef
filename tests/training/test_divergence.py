"""A step that was too large is noticed, dated and explained; a healthy run is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.load import load_recipe, recipe_names
from minigrpo.config.schema import Recipe, WatchConfig
from minigrpo.training.monitor.divergence import HIGHEST_RATE, DivergenceMonitor, Explosion, message, propose_rate
from tests.helpers.curves import DECAYS, EXPLODES, EXPLODES_AT_ONCE, EXPLODES_KL, HEALTHY, HEALTHY_FAST, rows

USUAL = {"reward": 0.5, "reward_std": 0.4, "informative_groups": 1.0, "accuracy": 0.3, "format": 0.8}
USUAL |= {"completions/clipped_ratio": 0.1, "completions/mean_length": 40.0, "learning_rate": 1e-3}
USUAL |= {"loss": 1e-9, "grad_norm": 0.1, "entropy": 0.5, "kl": 0.001}
GONE = {"reward": 0.0, "informative_groups": 0.0, "format": 0.0, "grad_norm": 0.0}


def watched(steps: list[dict[str, Any]], **knobs: Any) -> tuple[int, Explosion] | None:
    """Return (the step at which the explosion was reported, the explosion)."""
    watch = DivergenceMonitor(WatchConfig(**knobs))
    for step, metrics in enumerate(steps, start=1):
        if explosion := watch.after(step, metrics):
            return step, explosion
    return None


@pytest.mark.parametrize("curve", [HEALTHY, HEALTHY_FAST, DECAYS], ids=["healthy", "healthy fast", "decays"])
def test_a_run_without_a_leap_is_left_alone(curve: str) -> None:
    watch = DivergenceMonitor(WatchConfig())
    for row in rows(curve):
        assert watch.after(int(row["step"] or 0), row) is None
        assert not watch.suspicious


@pytest.mark.parametrize(
    ("curve", "onset"), [(EXPLODES_AT_ONCE, 1), (EXPLODES_KL, 1), (EXPLODES, 2)], ids=["at once", "with KL", "later"]
)
def test_a_far_too_large_learning_rate_is_told_within_three_steps_of_what_shows(curve: str, onset: int) -> None:
    told, explosion = watched(rows(curve)) or pytest.fail("not noticed")
    assert explosion.onset == onset
    assert explosion.step == onset + 1
    assert told == onset + 3


@pytest.mark.parametrize(("name", "value"), [("loss", -5.0), ("grad_norm", 3.0), ("kl", 2.0), ("entropy", 6.0)])
@pytest.mark.parametrize("healthy", [2, 30])
def test_a_figure_that_leaps_three_times_in_a_row_is_an_explosion(name: str, value: float, healthy: int) -> None:
    told, explosion = watched([USUAL] * healthy + [USUAL | {name: value}] * 3) or pytest.fail("not noticed")
    assert (told, explosion.step, explosion.onset) == (healthy + 3, healthy + 1, healthy)
    assert "times what is usual" in explosion.what


def test_a_leap_of_one_step_is_suspicious_but_no_explosion() -> None:
    watch = DivergenceMonitor(WatchConfig())
    seen = []
    for step, norm in enumerate([0.1] * 8 + [9.0] + [0.1] * 3, start=1):
        assert watch.after(step, USUAL | {"grad_norm": norm}) is None
        seen.append(watch.suspicious)
    assert [step for step, suspicious in enumerate(seen, start=1) if suspicious] == [9]


def test_the_knobs_say_how_large_how_long_and_whether_at_all() -> None:
    leaps = [USUAL] * 8 + [USUAL | {"grad_norm": 3.0}] * 4
    assert watched(leaps, explosion=40) is None
    assert watched(leaps, patience=5) is None
    assert watched(leaps, explosion=0) is None
    assert (watched(leaps, patience=1) or (0,))[0] == 9


def test_figures_near_zero_by_construction_may_grow_from_there() -> None:
    calm = [USUAL | {"loss": 1e-9, "kl": 0.0}] * 6
    assert watched(calm + [USUAL | {"loss": 0.3, "kl": 0.2}] * 6) is None


def test_a_gradient_that_shrank_as_the_task_was_solved_may_come_back() -> None:
    assert watched([USUAL] * 6 + [USUAL | {"grad_norm": 1e-3}] * 40 + [USUAL] * 5) is None


@pytest.mark.parametrize(
    "change", [{"format": 0.0}, {"completions/clipped_ratio": 0.9}, {"completions/mean_length": 2.0}]
)
def test_a_policy_that_is_gone_is_an_explosion(change: dict[str, float]) -> None:
    told, explosion = watched([USUAL] * 6 + [USUAL | GONE | {"format": 0.8} | change] * 3) or pytest.fail("missed")
    assert (told, explosion.onset, explosion.rate) == (9, 6, 1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"reward": 1.0, "accuracy": 1.0, "completions/mean_length": 10.0},  # solved, and shorter
        {"format": 0.8},  # a row of hard prompts
        {"informative_groups": 0.5, "format": 0.0, "grad_norm": 0.1},  # worse, but something is still compared
    ],
)
def test_what_is_not_gone_is_no_explosion(change: dict[str, float]) -> None:
    assert watched([USUAL] * 6 + [USUAL | GONE | change] * 6) is None


def test_a_model_that_was_never_better_has_not_exploded() -> None:
    assert watched([USUAL | GONE | {"completions/clipped_ratio": 1.0}] * 10) is None


def test_steps_that_were_skipped_and_figures_that_are_not_there_change_nothing() -> None:
    odd: list[dict[str, Any]] = [{"skipped": 1.0, "grad_norm": None, "loss": float("nan")}, {}, {"loss": None}]
    assert watched(odd * 5) is None
    told, explosion = watched([USUAL] * 6 + [USUAL | GONE, odd[0], USUAL | GONE, USUAL | GONE]) or pytest.fail("missed")
    assert (told, explosion.step, explosion.onset) == (10, 7, 6)


def test_a_resumed_run_judges_as_the_uninterrupted_one() -> None:
    steps = rows(EXPLODES)
    for cut in range(5):
        watch = DivergenceMonitor.replayed(WatchConfig(), steps[:cut])
        ends = [watch.after(int(row["step"] or 0), row) for row in steps[cut:5]]
        assert [end is not None for end in ends] == [False] * (4 - cut) + [True]


def test_the_rate_proposed_is_below_the_one_that_exploded() -> None:
    assert propose_rate(0.01, Explosion(3, 2, "", 0.01)) == 0.001
    assert propose_rate(0.1, Explosion(3, 2, "", 0.02)) == 0.002  # on its way up in the warm-up
    assert propose_rate(0.003, Explosion(90, 80, "", 0.003)) == 0.001
    assert propose_rate(0.003, Explosion(3, 2, "")) == 0.0003
    for lr in (0.1, 1.0):  # so far above what trains anything that a third of it would explode as well
        assert propose_rate(lr, Explosion(90, 80, "", lr)) == HIGHEST_RATE
    assert max(load_recipe(name).train.lr for name in recipe_names()) == HIGHEST_RATE


def test_the_message_says_what_when_where_and_how_to_begin_again() -> None:
    recipe = Recipe.model_validate({"train": {"lr": 0.1}})
    _, explosion = watched(rows(EXPLODES)) or pytest.fail("not noticed")
    text = message(explosion, 1, recipe.train.lr, Path("runs/my first"))
    assert "at step 3 the reward fell from 0.428 to 0, and 0% of the answers have the asked-for form, 64% had" in text
    assert "runs/my first/checkpoints/000001 (step 1)" in text
    assert "minigrpo train 'runs/my first/recipe.yaml' --train.lr 0.003 --run 'runs/my first-lr0.003'" in text
    assert "\n" not in text
    assert "No checkpoint is older" in message(explosion, None, recipe.train.lr, Path("runs/a"))
