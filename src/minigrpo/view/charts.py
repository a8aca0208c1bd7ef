"""The charts of a run: their titles, their figures, and the sentence of docs/metrics.md that explains each.

The page, the report and the notebook draw these, so a figure has one name and one explanation everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

SENTENCES = Path(__file__).parent / "page" / "metrics.json"
"""docs/metrics.md as a page reads it: `python -m minigrpo.view.renew --sentences` writes it."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart. `figures`: names of metrics.jsonl; `pattern`: of those that it draws besides, in the log's order.

    `about`: the figure whose sentence explains it. `band`: the figure that is drawn around the first one, as far to
    each side. `share`: from 0 to 1. `dots`: known in few steps, so drawn as points and not smoothed. `plan`: drawn
    beside what preflight planned.
    """

    id: str
    title: str
    figures: tuple[str, ...]
    about: str
    pattern: str | None = None
    band: str | None = None
    share: bool = False
    dots: bool = False
    plan: bool = False

    def figures_in(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return which of these names the chart draws."""
        own = [name for name in self.figures if name in names]
        return (*own, *(name for name in names if self.pattern and re.search(self.pattern, name)))

    @property
    def labels(self) -> tuple[str, ...]:
        """What its figures are called beside its title."""
        return tuple(map(short_name, self.figures))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"labels": self.labels}


LENGTHS = ("completions/mean_length", "completions/min_length", "completions/max_length")
CHARTS = (
    Chart("reward", "Reward", ("reward",), "reward", band="reward_std"),
    Chart("functions", "Each reward function", (), "rewards/NAME/mean", r"^rewards/.*/mean$"),
    Chart("right", "Right and well-formed", ("accuracy", "format"), "accuracy", share=True),
    Chart("informative", "Groups that teach", ("informative_groups",), "frac_reward_zero_std", share=True),
    Chart("length", "Length, tokens", LENGTHS, "completions/mean_length"),
    Chart("cut", "Cut off", ("completions/clipped_ratio",), "completions/clipped_ratio", share=True),
    Chart("held", "Held-out prompts", (), "eval/accuracy", "^eval/", dots=True),
    Chart("kl", "KL from the reference", ("kl",), "kl"),
    Chart("entropy", "Entropy, nats", ("entropy",), "entropy"),
    Chart("gradient", "Gradient norm", ("grad_norm",), "grad_norm"),
    Chart("clip", "Held back by the clip", (), "clip_ratio/region_mean", "^clip_ratio/"),
    Chart(
        "gap", "Engine and policy apart, nats", (), "engine_gap", r"^(engine|off_policy)_gap$|^servers/.*/engine_gap$"
    ),
    Chart("servers", "Groups of each server", (), "servers/NAME/groups", r"^servers/.*/groups$"),
    Chart("rate", "Learning rate", ("learning_rate",), "learning_rate"),
    Chart("advantages", "Advantages, mean size", ("advantages/abs_mean",), "advantages/abs_mean"),
    Chart("phases", "Seconds a step", (), "seconds", "^seconds(/|$)"),
    Chart("speed", "Tokens a second", ("tokens_per_second",), "tokens_per_second"),
    Chart("memory", "Memory, GB", (), "memory_gb/rollout", "^memory_gb/", plan=True),
    Chart("resample", "Prompts tried in place of ties", (), "resample/tried", "^resample/"),
    Chart("unscored", "Not scored", ("unscored",), "unscored", share=True),
    Chart("skipped", "Steps thrown away", ("skipped",), "skipped"),
)
UNSEEN = re.compile(r"^(reward_std|frac_reward_zero_std|num_tokens|loss|rewards/.*/std)$")
"""Figures without a chart of their own: others say the same, or they say nothing by themselves."""

SHORT = {
    "reward": "mean of the step",
    "accuracy": "right",
    "format": "well-formed",
    "informative_groups": "groups that differ",
    "completions/mean_length": "mean",
    "completions/min_length": "shortest",
    "completions/max_length": "longest",
    "completions/clipped_ratio": "cut off",
    "clip_ratio/low_mean": "below",
    "clip_ratio/high_mean": "above",
    "clip_ratio/region_mean": "either",
    "eval/accuracy": "right",
    "eval/reward": "reward",
    "eval/format": "well-formed",
}
"""What a figure is called beside its chart's title."""


def short_name(name: str) -> str:
    named = re.sub(r"^rewards/(.*)/mean$|^servers/(.*)/(?:engine_gap|groups)$", r"\1\2", name)
    return SHORT.get(name) or re.sub("^(seconds|memory_gb|resample)/", "", named)


def charts_of(columns: Mapping[str, Sequence[float]]) -> list[Chart]:
    """Return the charts for which a run has figures, with those figures alone, and one for each that none of them has.

    A figure that is 0 in every step has nothing to show (no truncation, no clipping), but for the reward.
    """
    names = [name for name, values in columns.items() if any(map(isfinite, values))]
    found = list(_drawn(names))
    moving = {name for name in names if any(value != 0 for value in columns[name] if isfinite(value))}
    return [chart for chart in found if chart.id == "reward" or moving & set(chart.figures)]


def _drawn(names: Sequence[str]) -> Iterator[Chart]:
    seen: set[str] = set()
    for chart in CHARTS:
        own = chart.figures_in(names)
        seen |= set(own)
        if own:
            yield replace(chart, figures=own, band=chart.band if chart.band in names else None)
    yield from (Chart(name, name, (name,), name) for name in names if name not in seen and not UNSEEN.match(name))


@cache
def known_sentences() -> dict[str, dict[str, str]]:
    """Return, for each figure's name, what it `means` and `when` to look at it."""
    found: dict[str, dict[str, str]] = json.loads(SENTENCES.read_text(encoding="utf-8"))
    return found


def sentence_of(name: str) -> str:
    """Return what a figure means as one or two sentences; "" for a figure that nobody has explained."""
    known = known_sentences().get(name)
    if known is None:
        return ""
    means = known["means"][:1].upper() + known["means"][1:]
    return f"{means}." + (f" Look closer when: {known['when']}." if known["when"] else "")
