"""Compare twins: models that went apart at one checkpoint, because of one change, and shared every random number.

Both answer the same prompts, with the same random numbers, and are graded alike. What differs between them comes from
the change. With one draw the interval is over prompts, and speaks of these two models alone: how far another draw of
answers would have taken them apart is not in it. With several draws it is over the draws, and speaks of the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from minigrpo.evaluation.statistics import Scores, paired_difference
from minigrpo.ui.tables import plain_table, titled
from minigrpo.utils.rates import Mean, mean_interval
from minigrpo.utils.svg import BLUE, ORANGE, Frame, label, picture, widened

FIGURES: Mapping[str, tuple[str, str]] = {
    "reward": ("reward", "reward"),
    "right": ("solved", "right"),
    "length": ("tokens", "length in tokens"),
}
"""What is compared -> its key in a recorded answer, and its name for people."""
_SHOWN_PROMPTS = 3  # of those that changed most, in either direction


@dataclass(frozen=True, slots=True)
class TwinPair:
    """One draw: both twins' answers to the same prompts. `kl`: KL(unchanged || changed) on the unchanged one's answers,
    in nats a token."""

    unchanged: Scores
    changed: Scores
    kl: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TwinPair:
        return cls(Scores.from_dict(data["unchanged"]), Scores.from_dict(data["changed"]), data["kl"])

    def by_prompt(self, key: str) -> dict[str, tuple[float, float]]:
        """Return (unchanged, changed) of each prompt for which both could be told."""
        pairs = zip(self.unchanged.answers, self.changed.answers, strict=True)
        return {
            one["prompt"]: (float(one[key]), float(other[key]))
            for one, other in pairs
            if one[key] is not None and other[key] is not None
        }


@dataclass(frozen=True, slots=True)
class TwinFigure:
    """One figure of both twins, and the difference that the change made."""

    name: str
    unchanged: float
    changed: float
    difference: Mean


@dataclass(frozen=True, slots=True)
class TwinComparison:
    """What a change did, over all draws."""

    change: str
    pairs: tuple[TwinPair, ...]

    @property
    def figures(self) -> tuple[TwinFigure, ...]:
        return tuple(self._figure(name, key) for name, (key, _) in FIGURES.items())

    @property
    def kl(self) -> Mean:
        return mean_interval([pair.kl for pair in self.pairs])

    @property
    def over(self) -> str:
        """Say what the intervals are over."""
        several = len(self.pairs) > 1
        return f"{len(self.pairs)} draws" if several else f"{len(self.pairs[0].changed.answers)} prompts, one draw"

    def differences(self, key: str) -> dict[str, float]:
        """Return the difference of each prompt, a mean over the draws in which it could be told."""
        found: dict[str, list[float]] = {}
        for pair in self.pairs:
            for name, (before, after) in pair.by_prompt(key).items():
                found.setdefault(name, []).append(after - before)
        return {name: fmean(values) for name, values in found.items()}

    def _figure(self, name: str, key: str) -> TwinFigure:
        told = [list(pair.by_prompt(key).values()) for pair in self.pairs]
        told = [values for values in told if values] or [[(0.0, 0.0)]]
        before, after = ([fmean(each[side] for each in values) for values in told] for side in (0, 1))
        if len(told) > 1:
            found = mean_interval([b - a for a, b in zip(before, after, strict=True)])
        elif key == "solved":  # shares need an interval that is no point where no prompt changed
            paired = paired_difference(self.pairs[0].unchanged, self.pairs[0].changed)
            found = Mean(paired.difference, paired.low, paired.high, len(told[0]))
        else:
            found = mean_interval([b - a for a, b in told[0]])
        return TwinFigure(name, fmean(before), fmean(after), found)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, and the differences prompt by prompt, for JSON."""
        by_prompt = {name: self.differences(key) for name, (key, _) in FIGURES.items()}
        return {
            "change": self.change,
            "draws": len(self.pairs),
            "over": self.over,
            "figures": {figure.name: asdict(figure) for figure in self.figures},
            "kl": self.kl.value,
            "kl_of_draws": [pair.kl for pair in self.pairs],
            "prompts": {
                name: {figure: values[name] for figure, values in by_prompt.items() if name in values}
                for name in by_prompt["right"]
            },
        }


def twin_table(found: TwinComparison) -> RenderableType:
    """Show both twins side by side. In brackets: 95 % intervals."""
    table = plain_table("unchanged", "changed", "difference")
    for figure in found.figures:
        percent = figure.name == "right"
        shown = [f"{value:.1%}" if percent else f"{value:.4g}" for value in (figure.unchanged, figure.changed)]
        style = "bold" if figure.difference.count > 1 and figure.difference.excludes_zero else ""
        words = _in_points(figure.difference) if percent else str(figure.difference)
        table.add_row(FIGURES[figure.name][1], *shown, Text(words, style))
    kl = found.kl
    spread = f" [{max(0.0, kl.low):.2g}, {kl.high:.2g}]" if kl.count > 1 else ""
    table.add_row("KL from unchanged", "", "", f"{kl.value:.2g}{spread} nats a token")
    return titled(f"{found.change}: intervals over {found.over}", table, *map(Text, _prompt_lines(found)))


def _in_points(mean: Mean) -> str:
    return f"{100 * mean.value:+.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}] points"


def _prompt_lines(found: TwinComparison) -> Iterator[str]:
    """Yield how many prompts changed, and those that changed most."""
    right, reward = found.differences("solved"), found.differences("reward")
    gained, lost = sum(value > 0 for value in right.values()), sum(value < 0 for value in right.values())
    rest = len(right) - gained - lost
    yield f"prompt by prompt: right more often on {gained}, less often on {lost}, as often on {rest}"
    order = sorted(reward, key=lambda name: (reward[name], name))
    lost_most = [name for name in order[:_SHOWN_PROMPTS] if reward[name] < 0]
    gained_most = [name for name in order[: -_SHOWN_PROMPTS - 1 : -1] if reward[name] > 0]
    for words, names in (("lost", lost_most), ("gained", gained_most)):
        if names:
            yield f"  most reward {words}: {', '.join(f'{name} {reward[name]:+.2g}' for name in names)}"


WIDTH, HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = (52, 364), (440, 744), 34, 260
Curve = Sequence[Sequence[tuple[float, float]]]
"""One (step, value) line for each draw."""


def render_twin_svg(found: TwinComparison, unchanged: Curve, changed: Curve) -> str:
    """Draw the share of right answers over the forked steps, each twin's mean and range over the draws, beside the
    difference in reward of every prompt, sorted."""
    every = [point for draw in (*unchanged, *changed) for point in draw]
    steps = widened(step for step, _ in every)
    frame = Frame(_LEFT[0], _TOP, _LEFT[1], _BOTTOM, steps, widened(value for _, value in every))
    parts = [label(_LEFT[0], 16, "right, of the answers of each step"), *frame.grid()]
    for name, draws, color, at in (("unchanged", unchanged, BLUE, 12), ("changed", changed, ORANGE, 26)):
        columns = [(points[0][0], [value for _, value in points]) for points in zip(*draws, strict=False)]
        low, high = ([(step, pick(values)) for step, values in columns] for pick in (min, max))
        if len(draws) > 1:
            parts.append(frame.band(low, high, color))
        parts.append(frame.line([(step, fmean(values)) for step, values in columns], color))
        parts.append(label(_LEFT[1], at, name, "end", color))
    parts += [label(_LEFT[0], 276, f"step {min(step for step, _ in every):g}")]
    parts += [label(_LEFT[1], 276, f"step {max(step for step, _ in every):g}", "end")]
    return picture(WIDTH, HEIGHT, f"what {found.change} did", [*parts, *_prompt_bars(found)])


def _prompt_bars(found: TwinComparison) -> Iterator[str]:
    values = sorted(found.differences("reward").values())
    frame = Frame(_RIGHT[0], _TOP, _RIGHT[1], _BOTTOM, (0, max(1, len(values))), widened((*values, 0.0)))
    yield label(_RIGHT[0], 16, "reward, changed minus unchanged, of each prompt")
    yield from frame.grid()
    zero, wide = frame.place_y(0), (frame.right - frame.left) / max(1, len(values))
    for place, value in enumerate(values):
        y, color = frame.place_y(value), ORANGE if value < 0 else BLUE
        yield (
            f'<rect x="{frame.place_x(place):.2f}" y="{min(y, zero):.1f}" width="{wide:.2f}" '
            f'height="{abs(y - zero):.1f}" fill="{color}"/>'
        )
    yield f'<line x1="{frame.left}" y1="{zero:.1f}" x2="{frame.right}" y2="{zero:.1f}" stroke="#555"/>'
    yield label(_RIGHT[0], 276, f"{len(values)} prompts, sorted")
